#include "cpu.hpp"

#include <sys/utsname.h>

#if defined(__x86_64__)
#include <array>
#include <cstdint>
#include <utility>

#include <cpuid.h>
#endif

namespace export_zoo::detail {

namespace {

#if defined(__x86_64__)

struct Registers {
  unsigned eax = 0;
  unsigned ebx = 0;
  unsigned ecx = 0;
  unsigned edx = 0;
};

// Registers of a CPUID leaf; all zeros if the CPU does not have it.
Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers found;
  if (__get_cpuid_count(leaf, subleaf, &found.eax, &found.ebx, &found.ecx, &found.edx) == 0) return {};
  return found;
}

// Register state that the operating system saves (XCR0); 0 if it saves none beyond SSE's.
std::uint64_t saved_state() {
  constexpr unsigned kOsxsave = 1U << 27;
  if ((cpuid(1, 0).ecx & kOsxsave) == 0) return 0;
  unsigned low = 0;
  unsigned high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return std::uint64_t{high} << 32 | low;
}

// Name of the widest instruction set; empty if the CPU or the operating system supports none of them.
std::string vector_set() {
  constexpr std::uint64_t kAvxState = 0x6;      // XMM, YMM
  constexpr std::uint64_t kAvx512State = 0xe6;  // and masks, ZMM
  constexpr std::uint64_t kAmxState = 0x60000;  // tiles
  const auto first = cpuid(7, 0);
  const auto second = first.eax >= 1 ? cpuid(7, 1) : Registers{};  // eax: the last subleaf
  const auto state = saved_state();
  const auto has = [&](unsigned bits, int bit, std::uint64_t needs) {
    return (bits >> bit & 1) != 0 && (state & needs) == needs;
  };
  const std::array<std::pair<bool, const char*>, 5> sets{{{has(first.edx, 25, kAmxState), "amx-int8"},
                                                          {has(first.ecx, 11, kAvx512State), "avx512-vnni"},
                                                          {has(second.eax, 4, kAvxState), "avx-vnni"},
                                                          {has(first.ebx, 30, kAvx512State), "avx512"},  // AVX512BW
                                                          {has(first.ebx, 5, kAvxState), "avx2"}}};
  for (const auto& [here, name] : sets) {
    if (here) return name;
  }
  return {};
}

#else

std::string vector_set() { return {}; }

#endif

}  // namespace

std::string instruction_set() {
  if (auto found = vector_set(); !found.empty()) return found;
  utsname here{};
  uname(&here);
  return here.machine;
}

}  // namespace export_zoo::detail
