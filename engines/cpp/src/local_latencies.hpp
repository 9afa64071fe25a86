// Latencies of a bundle's engines that Engine::load measured on this machine, kept for the next process. Python reads
// and writes the same files (engines/bundle/local_latencies.py).
#pragma once

#include <filesystem>
#include <map>
#include <optional>
#include <string>

#include "bundle_files.hpp"

namespace export_zoo::detail {

// Median latency in milliseconds, by engine.
using Medians = std::map<std::string, double>;

// The file of a bundle's latencies on machines like this one, with this number of threads (0: all cores). `gpu` is the
// compute capability of the GPU that would run the bundle's engines. nullopt if the user has no home directory.
std::optional<std::filesystem::path> latencies_file(const BundleFiles& bundle, const std::optional<std::string>& gpu,
                                                    int threads);

// Empty if there is no file, or if it is damaged.
Medians read_latencies(const std::optional<std::filesystem::path>& path);

// A file that cannot be written is no error: the next process measures again.
void write_latencies(const std::optional<std::filesystem::path>& path, const Medians& medians);

}  // namespace export_zoo::detail
