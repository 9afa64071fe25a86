// Safe reading of a bundle's files, which may be directories, pipes, huge, or nested a million deep.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <istream>
#include <memory>
#include <optional>
#include <span>

#include <nlohmann/json_fwd.hpp>

namespace export_zoo::detail {

// A file on disk or in memory.
struct Source {
  std::filesystem::path path;  // messages begin with it; in memory, it is the path within the bundle
  std::optional<std::span<const std::byte>> bytes{};  // nullopt: the file is on disk

  // nullopt if it is not a regular file.
  [[nodiscard]] std::optional<std::uint64_t> size() const;

  // A stream that has failed if the file cannot be read. Opening a pipe blocks: ask for the size first.
  [[nodiscard]] std::unique_ptr<std::istream> open() const;
};

// Reads JSON from a regular file. Throws std::runtime_error with the reason if it is not a regular file or not JSON, is
// larger than 8 MiB, or is nested deeper than 64.
nlohmann::json read_json(const Source& source);

}  // namespace export_zoo::detail
