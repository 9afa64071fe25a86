// The instruction set of the CPU that this process runs on.
#pragma once

#include <string>

namespace export_zoo::detail {

// The widest integer instruction set that ONNX Runtime's kernels choose by, named as in the attestations: "avx512-vnni",
// "avx2", ...; the machine's name, such as "x86_64" or "aarch64", where there is none of them. It comes from CPUID:
// /proc/cpuinfo describes the host where the CPU is emulated.
[[nodiscard]] std::string instruction_set();

}  // namespace export_zoo::detail
