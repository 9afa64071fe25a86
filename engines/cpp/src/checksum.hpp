#pragma once

#include <string>

#include "bundle_files.hpp"

namespace export_zoo::detail {

// Hex SHA-256 of a file; empty if it cannot be read.
[[nodiscard]] std::string sha256_of(const Source& source);

// The same of a bundle's manifest, which tells bundles apart.
[[nodiscard]] std::string manifest_sha256(const BundleFiles& bundle);

}  // namespace export_zoo::detail
