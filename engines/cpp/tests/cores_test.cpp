// Quotas of CPU time, of containers and services.

#include <cmath>
#include <filesystem>
#include <string>

#include <gmock/gmock.h>

#include <export_zoo/engine.hpp>

#include "cores.hpp"
#include "support.hpp"

namespace {

namespace fs = std::filesystem;

class Quota : public testing::Test {
 protected:
  [[nodiscard]] double of(const std::string& groups) const {
    support::write(root() / "groups", groups);
    return export_zoo::detail::cpu_quota(root(), root() / "groups");
  }

  void give(const std::string& file, const std::string& text) const {
    fs::create_directories((root() / file).parent_path());
    support::write(root() / file, text);
  }

  [[nodiscard]] fs::path root() const { return directory_.path(); }

  support::Temporary directory_;
};

TEST_F(Quota, IsTheLeastOfTheGroupAndThoseAboveIt) {
  EXPECT_TRUE(std::isinf(of("0::/a/b\n")));
  give("a/b/cpu.max", "max 100000\n");
  EXPECT_TRUE(std::isinf(of("0::/a/b\n")));
  give("a/cpu.max", "250000 100000\n");
  EXPECT_EQ(of("0::/a/b\n"), 2.5);
  EXPECT_TRUE(std::isinf(of("0::/c\n")));
  give("cpu.max", "50000 100000\n");
  EXPECT_EQ(of("0::/a/b\n"), 0.5);
  EXPECT_EQ(of("0::/of/the/host\n"), 0.5);
  EXPECT_EQ(of("0::/\n"), 0.5);
}

TEST_F(Quota, OfTheFirstVersionOfControlGroupsCounts) {
  give("cpu/docker/cpu.cfs_quota_us", "-1\n");
  give("cpu/docker/cpu.cfs_period_us", "100000\n");
  EXPECT_TRUE(std::isinf(of("5:memory:/docker\n4:cpu,cpuacct:/docker\n0::/\n")));
  give("cpu/docker/cpu.cfs_quota_us", "300000\n");
  EXPECT_EQ(of("5:memory:/docker\n4:cpu,cpuacct:/docker\n0::/\n"), 3);
  EXPECT_TRUE(std::isinf(of("3:cpuset:/docker\n"))) << "another controller";
}

TEST_F(Quota, IsNoneWhereFilesAreDamagedOrAbsent) {
  give("cpu.max", "many\n");
  EXPECT_TRUE(std::isinf(of("nonsense\n0::/\n")));
  EXPECT_TRUE(std::isinf(export_zoo::detail::cpu_quota(root() / "absent", root() / "absent")));
}

TEST(Cores, AreSharedByStreams) {
  const int cores = export_zoo::usable_cores();
  EXPECT_GE(cores, 1);
  EXPECT_EQ(export_zoo::detail::threads_of_stream(3, 8), 3);
  EXPECT_EQ(export_zoo::detail::threads_of_stream(0, cores + 1), 1);
  EXPECT_EQ(export_zoo::detail::threads_of_stream(0, 2), std::max(1, cores / 2));
}

}  // namespace
