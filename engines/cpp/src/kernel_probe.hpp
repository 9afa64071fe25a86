// Whether ONNX Runtime's INT8 kernels are exact on this CPU.
#pragma once

#include "onnxruntime.hpp"

namespace export_zoo::detail {

// True if the uint8 x int8 kernels add two products in 16 bits, which saturates. They do so on x86-64 CPUs without
// VNNI, such as those with AVX2 only. The function runs one small product with a known sum, once per process. It is
// safe to call from several threads. ONNX Runtime must be loaded. Throws Error (runtime).
[[nodiscard]] bool int8_sums_saturate(const Ort::Env& env);

}  // namespace export_zoo::detail
