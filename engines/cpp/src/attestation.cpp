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
#include "targets.hpp"

namespace export_zoo::detail {

namespace {

using nlohmann::json;

struct Attestation {
  std::string name;  // its path within the bundle
  json document;
};

// Paths of the bundle's attestations, newest first: their names sort by time.
std::vector<std::string> newest_first(const BundleFiles& bundle) {
  auto found = bundle.list("attestations");
  std::erase_if(found, [](const std::string& file) { return std::filesystem::path(file).extension() != ".json"; });
  std::sort(found.rbegin(), found.rend());
  return found;
}

// Value of a key; null if the document does not have it.
const json& entry(const json& document, const char* key) {
  static const json nothing;
  const auto found = document.find(key);
  return found == document.end() ? nothing : *found;
}

// Reads an attestation; nullopt if the file is not one that this version can read.
std::optional<json> read_attestation(const std::optional<Source>& source) {
  if (!source) return std::nullopt;
  try {
    auto document = read_json(*source);
    if (document.is_object() && entry(document, "schema_version") == 1 && entry(document, "manifest_sha256").is_string() &&
        entry(document, "engines").is_object()) {
      return document;
    }
  } catch (const std::runtime_error&) {
  }
  return std::nullopt;
}

// The attestation's path within the bundle, and its machine.
std::string describe(const Attestation& attestation) {
  const auto& machine = entry(attestation.document, "machine");
  return attestation.name + (machine.is_string() ? ": " + machine.get<std::string>() : "");
}

// Speedups over FP32, by engine. Entries that are not numbers are left out.
std::map<std::string, double> speedups_of(const json& attestation) {
  std::map<std::string, double> found;
  for (const auto& [engine, latency] : entry(attestation, "latencies").items()) {
    const auto& speedup = latency.is_object() ? entry(latency, "speedup") : latency;
    if (speedup.is_number()) found.emplace(engine, speedup.get<double>());
  }
  return found;
}

// Name of the CPU that was emulated; empty for a real machine.
std::string emulated_cpu(const json& attestation) {
  const auto& emulation = entry(attestation, "emulation");
  if (emulation.is_null()) return "";
  const auto& name = emulation.is_object() ? entry(emulation, "cpu") : emulation;
  return name.is_string() && !name.empty() ? name.get<std::string>() : "unknown";
}

// State of an engine according to the attestation; nullopt if the engine was not run.
std::optional<State> state_of(const json& attestation, const std::string& engine) {
  const auto& engines = attestation["engines"];
  const auto gate = engines.find(engine);
  if (gate == engines.end() || !gate->is_object() || entry(*gate, "ran") != "engine") return std::nullopt;
  const auto& failures = entry(*gate, "failures");
  if (!failures.is_array()) return std::nullopt;
  return failures.empty() ? State::verified : State::built;
}

}  // namespace

Attested apply_attestations(const BundleFiles& bundle, const std::optional<std::string>& compute_capability,
                            std::vector<EngineInfo>& engines) {
  Attested attested;
  attested.sources.resize(engines.size());
  const auto files = newest_first(bundle);
  if (files.empty()) return attested;
  const auto manifest = manifest_sha256(bundle);
  const auto instructions = instruction_set();
  std::vector<Attestation> attestations;
  for (const auto& file : files) {
    auto document = read_attestation(bundle.find(file));
    if (!document) {
      attested.unreadable.push_back(file);
    } else if (entry(*document, "manifest_sha256") == manifest) {
      attestations.push_back({file, std::move(*document)});
    }
  }
  // Attestations of real machines come before those of emulated CPUs.
  const auto is_real = [](const Attestation& one) { return entry(one.document, "emulation").is_null(); };
  std::stable_partition(attestations.begin(), attestations.end(), is_real);
  std::set<std::pair<std::string, std::string>> settled;  // engine, and the emulated CPU or "" for a real machine
  for (const auto& attestation : attestations) {
    const auto& document = attestation.document;
    const bool cpu = entry(document, "instruction_set") == instructions;
    const bool gpu = compute_capability && entry(document, "compute_capability") == *compute_capability;
    if (is_real(attestation)) attested.timed.push_back({describe(attestation), cpu, gpu, speedups_of(document)});
    for (std::size_t i = 0; i < engines.size(); ++i) {
      auto& engine = engines[i];
      if (!(target_of(engine).on_gpu ? gpu : cpu) || settled.contains({engine.name, ""})) continue;
      if (const auto state = state_of(document, engine.name)) {
        // Emulation verifies nothing. But an engine that failed its newest run on an emulated CPU is not verified any
        // more.
        if (!settled.insert({engine.name, emulated_cpu(document)}).second) continue;
        if (!is_real(attestation) && *state != State::built) continue;
        engine.state = *state;
        attested.sources[i] = describe(attestation);
      }
    }
  }
  return attested;
}

}  // namespace export_zoo::detail
