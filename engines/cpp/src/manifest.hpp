// A bundle's manifest, with what only the library itself needs of it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include <export_zoo/metadata.hpp>

namespace export_zoo::detail {

struct File {
  std::string path;  // relative to the bundle
  std::string sha256;
  std::uint64_t size_bytes = 0;
};

struct EngineFiles {
  File engine;
  std::vector<File> beside;  // weights that the engine refers to
};

struct Manifest {
  Metadata metadata;
  std::vector<EngineFiles> files;    // by index of metadata.engines
  std::vector<std::string> unknown;  // engines of a later version's targets and precisions
};

// Throws Error (bundle).
Manifest read_manifest(const std::filesystem::path& bundle);

// The path of a bundle's file after checking its size and SHA-256. Throws Error (checksum).
std::filesystem::path checked(const std::filesystem::path& bundle, const File& file);

}  // namespace export_zoo::detail
