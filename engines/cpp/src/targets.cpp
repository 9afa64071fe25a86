#include "targets.hpp"

#include <algorithm>
#include <array>
#include <stdexcept>

namespace export_zoo::detail {

namespace {

#ifdef EXPORT_ZOO_WITH_OPENVINO
constexpr Target::Open* kOpenOpenVino = open_openvino;
#else
constexpr Target::Open* kOpenOpenVino = nullptr;
#endif
#ifdef EXPORT_ZOO_WITH_TENSORRT
constexpr Target::Open* kOpenTensorRT = open_tensorrt;
#else
constexpr Target::Open* kOpenTensorRT = nullptr;
#endif

constexpr std::array kTargets{
    Target{"onnxruntime", "ONNX Runtime", false, false, true, open_onnxruntime},
    Target{"openvino", "OpenVINO", false, true, false, kOpenOpenVino},
    Target{"tensorrt", "TensorRT", true, false, true, kOpenTensorRT},
    Target{"tensorrt-rtx", "TensorRT", true, false, true, kOpenTensorRT},
};

// The most exact first, as in Python.
constexpr std::array kPrecisions{
    Precision{"fp32", false, false},
    Precision{"fp16", false, true},
    Precision{"int8", true, false},
};

template <typename Known>
const typename Known::value_type* find(const Known& known, std::string_view name) noexcept {
  const auto found = std::find_if(known.begin(), known.end(), [&](const auto& one) { return one.name == name; });
  return found == known.end() ? nullptr : &*found;
}

template <typename Item>
const Item& known(const Item* found, const EngineInfo& info) {
  if (found == nullptr) throw std::logic_error("engine " + info.name + " is of no known target and precision");
  return *found;
}

}  // namespace

const Target* find_target(std::string_view name) noexcept { return find(kTargets, name); }
const Precision* find_precision(std::string_view name) noexcept { return find(kPrecisions, name); }
const Target& target_of(const EngineInfo& info) { return known(find_target(info.target), info); }
const Precision& precision_of(const EngineInfo& info) { return known(find_precision(info.precision), info); }

std::size_t order_of(const Precision& precision) noexcept {
  return static_cast<std::size_t>(&precision - kPrecisions.data());
}

}  // namespace export_zoo::detail
