#include "local_latencies.hpp"

#include <cstdlib>
#include <fstream>
#include <random>
#include <stdexcept>
#include <system_error>

#include <nlohmann/json.hpp>

#include "checksum.hpp"
#include "cpu.hpp"

namespace export_zoo::detail {

namespace {

using nlohmann::json;
namespace fs = std::filesystem;

// Value of an environment variable; nullopt if it is not set or empty.
std::optional<std::string> variable(const char* name) {
  const char* value = std::getenv(name);
  if (value == nullptr || *value == '\0') return std::nullopt;
  return value;
}

// As Python's cache directory.
std::optional<fs::path> cache_directory() {
  if (const auto own = variable("EXPORT_ZOO_CACHE")) return *own;
  if (const auto caches = variable("XDG_CACHE_HOME")) return fs::path(*caches) / "export-zoo";
  if (const auto home = variable("HOME")) return fs::path(*home) / ".cache" / "export-zoo";
  return std::nullopt;
}

}  // namespace

std::optional<fs::path> latencies_file(const BundleFiles& bundle, const std::optional<std::string>& gpu, int threads) {
  const auto directory = cache_directory();
  if (!directory) return std::nullopt;
  const auto machine = instruction_set() + (gpu ? "-" + *gpu : "");
  const auto manifest = manifest_sha256(bundle).substr(0, 32);
  return *directory / "latencies" / (manifest + "-" + machine + "-" + std::to_string(threads) + ".json");
}

Medians read_latencies(const std::optional<fs::path>& path) {
  Medians found;
  if (!path) return found;
  try {
    const auto document = read_json({*path});
    for (const auto& [engine, median] : document.at("median_ms").items()) {
      if (median.is_number() && median.get<double>() > 0) found.emplace(engine, median.get<double>());
    }
  } catch (const std::runtime_error&) {
    return {};
  } catch (const json::exception&) {
    return {};
  }
  return found;
}

void write_latencies(const std::optional<fs::path>& path, const Medians& medians) {
  if (!path) return;
  std::error_code error;
  fs::create_directories(path->parent_path(), error);
  // Another process may write the same file: it is complete or absent.
  const auto temporary = path->parent_path() / (path->stem().string() + "." + std::to_string(std::random_device()()));
  std::ofstream file(temporary);
  file << json{{"median_ms", medians}}.dump(1) << '\n';
  file.close();
  if (file) fs::rename(temporary, *path, error);
  if (!file || error) fs::remove(temporary, error);
}

}  // namespace export_zoo::detail
