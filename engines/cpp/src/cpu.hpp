// The instruction set of the CPU that this process runs on.
#pragma once

#include <string>

namespace export_zoo::detail {

// The widest integer instruction set by which ONNX Runtime chooses its kernels, named as in the attestations:
// "avx512-vnni", "avx2", ... Without any of them, the machine's name, such as "x86_64" or "aarch64". It is read from
// CPUID, because /proc/cpuinfo describes the host where the CPU is emulated.
[[nodiscard]] std::string instruction_set();

}  // namespace export_zoo::detail
