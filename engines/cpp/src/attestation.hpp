// What `export-zoo verify` found of a bundle on machines like this one.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include <export_zoo/metadata.hpp>

namespace export_zoo::detail {

// Give each engine the state that the newest attestation of a machine like this one ran it to, if there is one.
// `compute_capability` is that of the GPU that would run TensorRT's engines. Attestations that cannot be read, or of
// another manifest, are left out.
void apply_attestations(const std::filesystem::path& bundle, const std::optional<std::string>& compute_capability,
                        std::vector<EngineInfo>& engines);

}  // namespace export_zoo::detail
