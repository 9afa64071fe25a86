#pragma once

#include <filesystem>
#include <string>

namespace export_zoo::detail {

// Hex SHA-256 of a file; empty if it cannot be read.
[[nodiscard]] std::string sha256_of(const std::filesystem::path& path);

}  // namespace export_zoo::detail
