// What `export-zoo verify` found of a bundle on machines like this one.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include <export_zoo/metadata.hpp>

namespace export_zoo::detail {

struct Attested {
  // Of each engine, the attestation that its state comes from and the machine of that; empty for the manifest.
  std::vector<std::string> sources;
  // Paths within the bundle of what is no attestation that this version can read.
  std::vector<std::string> unreadable;
};

// Give each engine the state that the newest attestation of a machine like this one ran it to, if there is one.
// `compute_capability` is that of the GPU that would run TensorRT's engines. Attestations of another manifest are left
// out.
Attested apply_attestations(const std::filesystem::path& bundle, const std::optional<std::string>& compute_capability,
                            std::vector<EngineInfo>& engines);

}  // namespace export_zoo::detail
