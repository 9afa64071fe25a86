// Targets and precisions that this version knows. A new one is a line in targets.cpp, and what opens its engines.
#pragma once

#include <cstddef>
#include <filesystem>
#include <memory>
#include <optional>
#include <string_view>

#include <export_zoo/engine.hpp>

#include "backend.hpp"

namespace export_zoo::detail {

struct Target {
  using Open = std::unique_ptr<Backend>(const std::filesystem::path& engine, const EngineInfo& info,
                                        const Metadata& metadata, const Options& options);

  std::string_view name;
  std::string_view library;  // that runs its engines
  bool on_gpu;  // engines are plans, compiled for GPUs, and attested by compute capability
  Open* open;   // nullptr: this library was built without it
};

struct Precision {
  std::string_view name;
  bool integer_sums;  // products are added as integers, which saturates on some CPUs
  bool float16;       // tensors are float16
};

// nullptr for those of later versions.
const Target* find_target(std::string_view name) noexcept;
const Precision* find_precision(std::string_view name) noexcept;

// Of an engine of a manifest, whose names were looked up when it was read.
const Target& target_of(const EngineInfo& info);
const Precision& precision_of(const EngineInfo& info);

// How many precisions are more exact.
std::size_t order_of(const Precision& precision) noexcept;

}  // namespace export_zoo::detail
