// Safe reading of a bundle's files, which may be directories, pipes, huge, or nested a million deep.
#pragma once

#include <cstddef>
#include <filesystem>

#include <nlohmann/json_fwd.hpp>

namespace export_zoo::detail {

// Reads JSON from a regular file. Throws std::runtime_error with the reason if it is not a regular file or not JSON, is
// larger than 8 MiB, or is nested deeper than 64.
nlohmann::json read_json(const std::filesystem::path& path);

}  // namespace export_zoo::detail
