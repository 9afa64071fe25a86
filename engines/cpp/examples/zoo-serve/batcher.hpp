// Collects requests of many threads, and runs them in batches, in as many threads as the engine has streams.
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

// What runs the batches.
struct Contexts {
  std::vector<export_zoo::Context> streams;  // of one engine, one for each stream
  // The context of an engine of one stream with all threads. It runs, alone, where there is less work than streams.
  std::optional<export_zoo::Context> whole;
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

  Batcher(Contexts contexts, Limits limits);
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

  struct Batch {
    std::vector<Item> items;
    bool alone = false;  // whether it is for `Contexts::whole`
  };

  // Waits for the next batch; without items when all is done. Drops requests that nobody waits for.
  Batch next();
  void work(export_zoo::Context& stream);
  // All with the lock. Learns from a batch that ended: it took from the end of the one before, of any stream, or after a
  // pause, from its own beginning.
  void learn(std::size_t images);
  void note_idle();
  [[nodiscard]] Clock::duration expected_of(std::size_t position) const;
  [[nodiscard]] double seconds_per_image() const;

  Limits limits_;
  Contexts contexts_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Item> queue_;
  std::size_t coming_ = 0;
  std::size_t running_ = 0;       // images
  std::size_t busy_ = 0;          // streams that run them
  // End of the last batch, if there has been a request ever since; or the beginning of the first one after a pause.
  std::optional<Clock::time_point> busy_since_;
  // Averages over batches, the newest with the largest weight: of the seconds that each took, and of its images.
  double seconds_ = 0;
  double images_each_ = 0;
  bool closing_ = false;
  std::atomic<std::uint64_t> batches_{0};
  std::atomic<std::uint64_t> images_{0};
  std::atomic<std::uint64_t> dropped_{0};
  std::vector<std::thread> threads_;  // last: they use all of the above
};

}  // namespace zoo_serve
