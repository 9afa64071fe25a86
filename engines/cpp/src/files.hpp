// Files of a bundle, read with care: they may be directories, pipes, huge, or nested a million deep.
#pragma once

#include <cstddef>
#include <filesystem>

#include <nlohmann/json_fwd.hpp>

namespace export_zoo::detail {

// JSON of a regular file. Throws std::runtime_error, with what is wrong, where it is none, over 64 MiB, or nested over
// 64 deep.
nlohmann::json read_json(const std::filesystem::path& path);

}  // namespace export_zoo::detail
