// A bundle's manifest, with the fields that only the library itself needs.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <export_zoo/metadata.hpp>

#include "bundle_files.hpp"

namespace export_zoo::detail {

struct File {
  std::string path;  // relative to the bundle
  std::string sha256;
  std::uint64_t size_bytes = 0;
};

struct EngineFiles {
  File engine;
  std::vector<File> beside;  // weight files that the engine refers to
};

struct Manifest {
  Metadata metadata;
  std::vector<EngineFiles> files;    // by index of metadata.engines
  std::vector<std::string> unknown;  // names of engines whose target or precision is of a later version
};

// Throws Error (bundle).
Manifest read_manifest(const BundleFiles& bundle);

// Checks the size and SHA-256 of a bundle's file and returns it. Throws Error (checksum).
Source checked(const BundleFiles& bundle, const File& file);

}  // namespace export_zoo::detail
