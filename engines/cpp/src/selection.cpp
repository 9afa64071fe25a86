#include "selection.hpp"

#include <algorithm>
#include <cstdio>
#include <numeric>
#include <tuple>

#include "cpu.hpp"
#include "targets.hpp"

namespace export_zoo::detail {

std::string Speeds::told(const std::string& engine) const {
  const auto found = by_engine.find(engine);
  if (found == by_engine.end()) return "";
  char number[64];
  std::snprintf(number, sizeof number, "%.2f", found->second);
  return "measured " + where + ", " + number + unit;
}

Speeds speeds(const std::vector<EngineInfo>& engines, const Attested& attested,
              const std::optional<std::string>& capability) {
  for (const auto& run : attested.timed) {
    const auto counts = [&](const EngineInfo& engine) {
      return (target_of(engine).on_gpu ? run.gpu_like_here : run.cpu_like_here) && run.speedups.contains(engine.name);
    };
    if (std::all_of(engines.begin(), engines.end(), counts)) {
      return {.by_engine = run.speedups, .where = "by " + run.source, .like_here = true};
    }
  }
  Speeds exported{.by_engine = {}, .where = "at export", .like_here = true};
  const EngineInfo* elsewhere = nullptr;
  for (const auto& engine : engines) {
    exported.like_here = exported.like_here && engine.speedup.has_value();
    if (!engine.speedup) continue;
    exported.by_engine.emplace(engine.name, *engine.speedup);
    const auto& gpus = engine.compute_capabilities;
    const bool on_gpu = target_of(engine).on_gpu;
    const bool alike = on_gpu ? capability && std::find(gpus.begin(), gpus.end(), *capability) != gpus.end()
                              : engine.instruction_set == instruction_set();
    if (!alike && (elsewhere == nullptr || target_of(*elsewhere).on_gpu)) elsewhere = &engine;
  }
  if (elsewhere != nullptr) {
    exported.like_here = false;
    exported.where = target_of(*elsewhere).on_gpu
                         ? "on another GPU, at export"
                         : "on another instruction set (" + elsewhere->instruction_set + "), at export";
  }
  return exported;
}

std::vector<std::size_t> fastest_first(const std::vector<EngineInfo>& engines, const Speeds& speeds) {
  const auto key = [&](std::size_t index) {
    const auto& engine = engines[index];
    const auto timed = speeds.by_engine.find(engine.name);
    const bool is_timed = timed != speeds.by_engine.end();
    return std::tuple(target_of(engine).on_gpu && !is_timed, is_timed ? timed->second : 0.0,
                      order_of(precision_of(engine)));
  };
  std::vector<std::size_t> order(engines.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return key(a) > key(b); });
  return order;
}

}  // namespace export_zoo::detail
