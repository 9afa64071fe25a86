// Which engine of a bundle is the fastest here: the rules of Python (engines/bundle/selection.py).
#pragma once

#include <cstddef>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include <export_zoo/metadata.hpp>

#include "attestation.hpp"

namespace export_zoo::detail {

// Speeds of engines, measured in one run.
struct Speeds {
  std::map<std::string, double> by_engine;  // the largest is the fastest; engines that were not timed are missing
  std::string where;                        // where they were measured, for messages
  bool like_here = false;                   // whether that was a machine like this one, and all engines were timed
  std::string unit = "x the speed of FP32";

  // Where the engine was measured and its speed, as text; empty if it was not timed.
  [[nodiscard]] std::string told(const std::string& engine) const;
};

// The speeds of engines as measured on a machine like this one, otherwise as measured at export. An attestation counts
// if it timed all of the engines; the newest one goes first. `capability` is that of the GPU here.
Speeds speeds(const std::vector<EngineInfo>& engines, const Attested& attested,
              const std::optional<std::string>& capability);

// Indices of the engines, the fastest first. GPU engines that were not timed come before all others, lower precisions
// first.
std::vector<std::size_t> fastest_first(const std::vector<EngineInfo>& engines, const Speeds& speeds);

}  // namespace export_zoo::detail
