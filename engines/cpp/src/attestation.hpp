// Attestations that `export-zoo verify` wrote on machines like this one.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include <export_zoo/metadata.hpp>

namespace export_zoo::detail {

struct Attested {
  // For each engine, the attestation that its state comes from, and its machine; empty if the state is the manifest's.
  std::vector<std::string> sources;
  // Paths, within the bundle, of attestations that this version cannot read.
  std::vector<std::string> unreadable;
};

// Sets each engine's state from the newest attestation of a machine like this one that ran the engine, if there is one.
// `compute_capability` is that of the GPU that would run TensorRT's engines. Attestations of another manifest are
// ignored.
Attested apply_attestations(const std::filesystem::path& bundle, const std::optional<std::string>& compute_capability,
                            std::vector<EngineInfo>& engines);

}  // namespace export_zoo::detail
