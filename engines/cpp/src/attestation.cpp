#include "attestation.hpp"

#include <algorithm>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "checksum.hpp"
#include "cpu.hpp"
#include "files.hpp"

namespace export_zoo::detail {

namespace {

using nlohmann::json;
namespace fs = std::filesystem;

// Files by name, the newest first: they are named by time.
std::vector<fs::path> newest_first(const fs::path& directory) {
  std::vector<fs::path> found;
  std::error_code error;
  for (fs::directory_iterator entry(directory, error), end; !error && entry != end; entry.increment(error)) {
    std::error_code unreadable;
    if (entry->path().extension() == ".json" && entry->is_regular_file(unreadable)) found.push_back(entry->path());
  }
  std::sort(found.rbegin(), found.rend());
  return found;
}

// null where it has none.
const json& entry(const json& document, const char* key) {
  static const json nothing;
  const auto found = document.find(key);
  return found == document.end() ? nothing : *found;
}

// Nothing where it is none, or of another manifest.
std::optional<json> read_attestation(const fs::path& path, const std::string& manifest_sha256) {
  try {
    auto document = read_json(path);
    if (document.is_object() && entry(document, "schema_version") == 1 &&
        entry(document, "manifest_sha256") == manifest_sha256 && entry(document, "engines").is_object()) {
      return document;
    }
  } catch (const std::runtime_error&) {
  }
  return std::nullopt;
}

// Name of the CPU that was emulated; empty for a real machine.
std::string emulated_cpu(const json& attestation) {
  const auto& emulation = entry(attestation, "emulation");
  if (emulation.is_null()) return "";
  const auto& name = emulation.is_object() ? entry(emulation, "cpu") : emulation;
  return name.is_string() && !name.empty() ? name.get<std::string>() : "unknown";
}

// What the attestation says of an engine, if it was run.
std::optional<State> state_of(const json& attestation, const std::string& engine) {
  const auto& engines = attestation["engines"];
  const auto gate = engines.find(engine);
  if (gate == engines.end() || !gate->is_object() || entry(*gate, "ran") != "engine") return std::nullopt;
  const auto& failures = entry(*gate, "failures");
  if (!failures.is_array()) return std::nullopt;
  return failures.empty() ? State::verified : State::built;
}

}  // namespace

void apply_attestations(const fs::path& bundle, const std::optional<std::string>& compute_capability,
                        std::vector<EngineInfo>& engines) {
  const auto files = newest_first(bundle / "attestations");
  if (files.empty()) return;
  const auto manifest_sha256 = sha256_of(bundle / "manifest.json");
  const auto instructions = instruction_set();
  std::vector<json> attestations;
  for (const auto& path : files) {
    if (auto attestation = read_attestation(path, manifest_sha256)) attestations.push_back(std::move(*attestation));
  }
  // A real machine's go before those of emulated CPUs.
  const auto is_real = [](const json& attestation) { return entry(attestation, "emulation").is_null(); };
  std::stable_partition(attestations.begin(), attestations.end(), is_real);
  std::set<std::pair<std::string, std::string>> settled;  // engine, and the emulated CPU or "" for a real machine
  for (const auto& attestation : attestations) {
    const bool cpu = entry(attestation, "instruction_set") == instructions;
    const bool gpu = compute_capability && entry(attestation, "compute_capability") == *compute_capability;
    for (auto& engine : engines) {
      if (!(engine.target == "onnxruntime" ? cpu : gpu) || settled.contains({engine.name, ""})) continue;
      if (const auto state = state_of(attestation, engine.name)) {
        // Nothing is verified by emulation, but an engine that failed on an emulated CPU, when it last ran there, is
        // not verified any more.
        if (!settled.insert({engine.name, emulated_cpu(attestation)}).second) continue;
        if (is_real(attestation) || *state == State::built) engine.state = *state;
      }
    }
  }
}

}  // namespace export_zoo::detail
