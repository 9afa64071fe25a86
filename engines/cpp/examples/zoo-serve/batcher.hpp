// Collects requests of many threads, and runs them in batches in one thread.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <future>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <thread>
#include <vector>

#include <export_zoo/engine.hpp>

namespace zoo_serve {

using Clock = std::chrono::steady_clock;

// The queue is full, the answer would come too late, or the server is shutting down: try again later.
struct Busy : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The deadline has passed, or the client is gone: nobody waits for the answer.
struct Late : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Limits {
  std::size_t batch = 8;                  // maximum batch size
  std::chrono::microseconds wait{2000};   // maximum time that a request waits for others
  std::size_t queue = 256;                // maximum number of waiting requests
};

// Until when a request is waited for.
struct Patience {
  Clock::time_point deadline;
  std::function<bool()> gone;  // whether the client has left before

  // Throws Late if nobody waits any more, or will wait after `more` time.
  void check(Clock::duration more = {}) const;
};

class Batcher {
 public:
  // A request that is being prepared. A batch waits, for a limited time, only while there is such a request.
  class Coming {
   public:
    // Throws Busy, also if those before it are expected to take until after its deadline.
    Coming(Batcher& batcher, Patience patience);
    Coming(const Coming&) = delete;
    Coming& operator=(const Coming&) = delete;
    ~Coming();  // also without submit(), if the preparation failed

    // Queues one preprocessed image. The future holds its logits, or throws Late.
    std::future<std::vector<float>> submit(std::vector<float> input);

   private:
    Batcher& batcher_;
    Patience patience_;
    bool submitted_ = false;
  };

  Batcher(const export_zoo::Engine& engine, Limits limits);
  Batcher(const Batcher&) = delete;
  Batcher& operator=(const Batcher&) = delete;
  // Answers all waiting requests, then stops.
  ~Batcher();

  [[nodiscard]] std::size_t waiting() const;
  // Expected time until a new request is answered.
  [[nodiscard]] Clock::duration expected() const;
  [[nodiscard]] std::uint64_t batches() const noexcept { return batches_; }
  [[nodiscard]] std::uint64_t images() const noexcept { return images_; }
  [[nodiscard]] std::uint64_t dropped() const noexcept { return dropped_; }

 private:
  struct Item {
    std::vector<float> input;
    std::promise<std::vector<float>> logits;
    Patience patience;
  };

  // Waits for the next batch; empty when all is done. Drops requests that nobody waits for.
  std::vector<Item> next();
  void work();
  // Both with the lock. Learns from a batch that ended: it began when the one before ended, or after a pause, when it was
  // there.
  void learn(std::size_t images);
  void note_idle();
  [[nodiscard]] Clock::duration expected_of(std::size_t position) const;

  Limits limits_;
  export_zoo::Context context_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Item> queue_;
  std::size_t coming_ = 0;
  std::size_t running_ = 0;
  std::optional<Clock::time_point> busy_since_;  // end of the last batch, if there has been a request ever since
  Clock::time_point began_;                      // of the running batch
  double seconds_per_image_ = 0;  // at which requests are answered under load; 0: not known yet
  bool closing_ = false;
  std::atomic<std::uint64_t> batches_{0};
  std::atomic<std::uint64_t> images_{0};
  std::atomic<std::uint64_t> dropped_{0};
  std::thread thread_;  // last: it uses all of the above
};

}  // namespace zoo_serve
