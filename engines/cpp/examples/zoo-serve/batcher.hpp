// Collects requests of many threads, and runs them in batches in one thread.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <future>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#include <export_zoo/engine.hpp>

namespace zoo_serve {

// The queue is full, or the server is shutting down: try again later.
struct Busy : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Limits {
  std::size_t batch = 8;                  // maximum batch size
  std::chrono::microseconds wait{2000};   // maximum time that a request waits for others
  std::size_t queue = 256;                // maximum number of waiting requests
};

class Batcher {
 public:
  // A request that is being prepared. A batch waits, for a limited time, only while there is such a request.
  class Coming {
   public:
    // Throws Busy.
    explicit Coming(Batcher& batcher);
    Coming(const Coming&) = delete;
    Coming& operator=(const Coming&) = delete;
    ~Coming();  // also without submit(), if the preparation failed

    // Queues one preprocessed image. The future holds its logits.
    std::future<std::vector<float>> submit(std::vector<float> input);

   private:
    Batcher& batcher_;
    bool submitted_ = false;
  };

  Batcher(const export_zoo::Engine& engine, Limits limits);
  Batcher(const Batcher&) = delete;
  Batcher& operator=(const Batcher&) = delete;
  // Answers all waiting requests, then stops.
  ~Batcher();

  [[nodiscard]] std::size_t waiting() const;
  [[nodiscard]] std::uint64_t batches() const noexcept { return batches_; }
  [[nodiscard]] std::uint64_t images() const noexcept { return images_; }

 private:
  struct Item {
    std::vector<float> input;
    std::promise<std::vector<float>> logits;
  };

  // Waits for the next batch; empty when all is done.
  std::vector<Item> next();
  void work();

  Limits limits_;
  export_zoo::Context context_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Item> queue_;
  std::size_t coming_ = 0;
  bool closing_ = false;
  std::atomic<std::uint64_t> batches_{0};
  std::atomic<std::uint64_t> images_{0};
  std::thread thread_;  // last: it uses all of the above
};

}  // namespace zoo_serve
