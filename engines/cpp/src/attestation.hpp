// Attestations that `export-zoo verify` wrote on machines like this one.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include <export_zoo/metadata.hpp>

#include "bundle_files.hpp"

namespace export_zoo::detail {

// Latencies that a real machine measured.
struct Timed {
  std::string source;   // the attestation, and its machine
  bool cpu_like_here;   // same instruction set
  bool gpu_like_here;   // same compute capability
  std::map<std::string, double> speedups;  // over FP32, by engine
};

struct Attested {
  // For each engine, the attestation that its state comes from, and its machine; empty if the state is the manifest's.
  std::vector<std::string> sources;
  // Paths, within the bundle, of attestations that this version cannot read.
  std::vector<std::string> unreadable;
  std::vector<Timed> timed;  // newest first
};

// Sets each engine's state from the newest attestation of a machine like this one that ran the engine, if there is one.
// `compute_capability` is that of the GPU that would run TensorRT's engines. Attestations of another manifest are
// ignored.
Attested apply_attestations(const BundleFiles& bundle, const std::optional<std::string>& compute_capability,
                            std::vector<EngineInfo>& engines);

}  // namespace export_zoo::detail
