// Targets and precisions that this version knows. To add one, add a line to targets.cpp and the function that opens
// its engines.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <string_view>

#include <export_zoo/engine.hpp>

#include "backend.hpp"

namespace export_zoo::detail {

struct Target {
  using Open = std::unique_ptr<Backend>(const EngineSource& engine, const EngineInfo& info,
                                        const Metadata& metadata, const Options& options);

  std::string_view name;
  std::string_view library;  // library that runs its engines
  bool on_gpu;  // engines are plans, compiled for GPUs, and attested by compute capability
  bool int8_on_x86_only;  // on other CPUs, INT8 was wrong: docs/cpu.md
  bool weights_in_memory;  // opens engines with weight files from memory
  Open* open;   // nullptr: this library was built without it
};

struct Precision {
  std::string_view name;
  bool integer_sums;  // products are added as integers, which saturates on some CPUs
  bool float16;       // tensors are float16
};

// nullptr for a name that this version does not know.
const Target* find_target(std::string_view name) noexcept;
const Precision* find_precision(std::string_view name) noexcept;

// Target and precision of an engine from a manifest. Reading the manifest has checked both names.
const Target& target_of(const EngineInfo& info);
const Precision& precision_of(const EngineInfo& info);

// Number of precisions that are more exact.
std::size_t order_of(const Precision& precision) noexcept;

}  // namespace export_zoo::detail
