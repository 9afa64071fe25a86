#include "cores.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <fstream>
#include <limits>
#include <string>
#include <thread>

#include <sched.h>

#include <export_zoo/engine.hpp>

namespace export_zoo::detail {

namespace {

namespace fs = std::filesystem;

constexpr double kNoLimit = std::numeric_limits<double>::infinity();

// Cores' worth of CPU time that one control group allows.
double quota_of(const fs::path& group) {
  std::int64_t quota = 0;
  std::int64_t period = 0;
  // "max 100000" without a limit.
  if (std::ifstream both(group / "cpu.max"); both >> quota >> period && quota > 0 && period > 0) {
    return static_cast<double>(quota) / static_cast<double>(period);
  }
  std::ifstream first(group / "cpu.cfs_quota_us");
  std::ifstream second(group / "cpu.cfs_period_us");
  // -1 without a limit.
  if (first >> quota && second >> period && quota > 0 && period > 0) {
    return static_cast<double>(quota) / static_cast<double>(period);
  }
  return kNoLimit;
}

}  // namespace

double cpu_quota(const fs::path& cgroups, const fs::path& process) {
  double least = kNoLimit;
  std::ifstream lines(process);
  // "0::/path" of version 2, "4:cpu,cpuacct:/path" of version 1.
  for (std::string line; std::getline(lines, line);) {
    const auto first = line.find(':');
    const auto second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const auto controllers = line.substr(first + 1, second - first - 1);
    if (!controllers.empty() && ("," + controllers + ",").find(",cpu,") == std::string::npos) continue;
    const auto mount = controllers.empty() ? cgroups : cgroups / "cpu";
    // In a container, the path may be that of the host; the mount is then the process's own group.
    for (auto place = mount / fs::path(line.substr(second + 1)).relative_path();; place = place.parent_path()) {
      least = std::min(least, quota_of(place));
      if (place == mount || place == place.parent_path()) break;
    }
  }
  return least;
}

}  // namespace export_zoo::detail

namespace export_zoo {

int usable_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  const int allowed = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set)  // fails above 1024 cores
                                                                  : static_cast<int>(std::thread::hardware_concurrency());
  return std::max(1, static_cast<int>(std::ceil(std::min<double>(allowed, detail::cpu_quota()))));
}

}  // namespace export_zoo

namespace export_zoo::detail {

int threads_of_stream(int threads, int streams) {
  if (threads > 0) return threads;
  const int usable = usable_cores();
  if (streams == 1 && usable >= static_cast<int>(std::thread::hardware_concurrency())) return 0;
  return std::max(1, usable / streams);
}

}  // namespace export_zoo::detail
