// How many cores this process may use. `usable_cores` is in engine.hpp.
#pragma once

#include <filesystem>

namespace export_zoo::detail {

// Cores' worth of CPU time that this process's control groups allow; infinity without a limit. Of its own group and of all
// groups above it: cpu.max of version 2, cpu.cfs_quota_us of version 1. `cgroups` is where they are mounted, `process` the
// file with the groups of the process. As Python's base/machine.py.
[[nodiscard]] double cpu_quota(const std::filesystem::path& cgroups = "/sys/fs/cgroup",
                               const std::filesystem::path& process = "/proc/self/cgroup");

// Threads of each of `streams`, for a runtime; `threads` as in Options. 0: the runtime's own default, for a process that has
// the whole machine.
[[nodiscard]] int threads_of_stream(int threads, int streams);

}  // namespace export_zoo::detail
