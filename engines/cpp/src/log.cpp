#include "log.hpp"

#include <iostream>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

namespace export_zoo {

namespace {

std::mutex& mutex() {
  static std::mutex one;
  return one;
}

// Never destroyed: a runtime's threads may log while the process ends.
std::shared_ptr<const Log>& current() {
  static auto& log = *std::make_unique<std::shared_ptr<const Log>>().release();
  return log;
}

}  // namespace

void set_log(Log log) {
  auto fresh = log ? std::make_shared<const Log>(std::move(log)) : nullptr;
  const std::lock_guard lock(mutex());
  current().swap(fresh);
}

namespace detail {

void log(Severity severity, std::string_view runtime, std::string_view message) noexcept {
  try {
    std::shared_ptr<const Log> log;
    {
      const std::lock_guard lock(mutex());
      log = current();
    }
    if (log) {
      (*log)(severity, runtime, message);
    } else if (severity == Severity::error) {
      std::cerr << std::string(runtime) + ": " + std::string(message) + '\n';
    }
  } catch (...) {  // nobody could be told
  }
}

}  // namespace detail

}  // namespace export_zoo
