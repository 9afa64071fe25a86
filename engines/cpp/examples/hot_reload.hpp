// A service that takes a new bundle while it serves: docs/cpp.md, "A new bundle while a service runs".
#pragma once

#include <cstdint>
#include <filesystem>
#include <mutex>
#include <optional>
#include <utility>

#include <export_zoo/engine.hpp>
#include <export_zoo/preprocess.hpp>

namespace hot_reload {

// The engine that serves. All functions may be called from any thread.
class Served {
 public:
  explicit Served(export_zoo::Engine engine) : engine_(std::move(engine)) {}

  // Loads another bundle and runs it once. If that throws, the old engine goes on.
  void reload(const std::filesystem::path& bundle, const export_zoo::Options& options = {}) {
    auto fresh = export_zoo::Engine::load(bundle, options);
    fresh.context().warm_up(fresh.metadata().batch_opt);
    const std::lock_guard lock(mutex_);
    std::swap(engine_, fresh);  // the old engine goes with its last context
    ++version_;
  }

 private:
  friend class Worker;
  std::mutex mutex_;
  export_zoo::Engine engine_;
  std::uint64_t version_ = 1;
};

// What belongs to one engine: never preprocess for one bundle and run another.
struct Serving {
  explicit Serving(export_zoo::Engine from)
      : engine(std::move(from)), preprocess(engine.metadata().preprocess), context(engine.context()) {}

  export_zoo::Engine engine;
  export_zoo::Preprocessor preprocess;
  export_zoo::Context context;
};

// Each thread has one, and asks it before each batch.
class Worker {
 public:
  explicit Worker(Served& served) : served_(served) {}

  Serving& serving() {
    std::optional<export_zoo::Engine> fresh;
    {
      const std::lock_guard lock(served_.mutex_);
      if (std::exchange(version_, served_.version_) != served_.version_) fresh = served_.engine_;
    }
    if (fresh) serving_.emplace(std::move(*fresh));
    return *serving_;
  }

 private:
  Served& served_;
  std::uint64_t version_ = 0;
  std::optional<Serving> serving_;
};

}  // namespace hot_reload
