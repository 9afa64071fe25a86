#include "batcher.hpp"

#include <algorithm>

namespace zoo_serve {

Batcher::Batcher(const export_zoo::Engine& engine, Limits limits)
    : limits_(limits), context_(engine.context()), thread_([this] { work(); }) {}

Batcher::~Batcher() {
  {
    const std::lock_guard lock(mutex_);
    closing_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

Batcher::Coming::Coming(Batcher& batcher) : batcher_(batcher) {
  const std::lock_guard lock(batcher_.mutex_);
  if (batcher_.closing_) throw Busy("shutting down");
  if (batcher_.queue_.size() + batcher_.coming_ >= batcher_.limits_.queue) throw Busy("too many requests wait");
  ++batcher_.coming_;
}

Batcher::Coming::~Coming() {
  if (submitted_) return;
  {
    const std::lock_guard lock(batcher_.mutex_);
    --batcher_.coming_;
  }
  batcher_.changed_.notify_one();
}

std::future<std::vector<float>> Batcher::Coming::submit(std::vector<float> input) {
  std::future<std::vector<float>> logits;
  {
    const std::lock_guard lock(batcher_.mutex_);
    batcher_.queue_.push_back({std::move(input), {}});
    logits = batcher_.queue_.back().logits.get_future();
    --batcher_.coming_;
    submitted_ = true;
  }
  batcher_.changed_.notify_one();
  return logits;
}

std::size_t Batcher::waiting() const {
  const std::lock_guard lock(mutex_);
  return queue_.size();
}

std::vector<Batcher::Item> Batcher::next() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return closing_ || !queue_.empty(); });
  if (queue_.empty()) return {};
  changed_.wait_for(lock, limits_.wait, [this] { return closing_ || coming_ == 0 || queue_.size() >= limits_.batch; });
  std::vector<Item> batch;
  batch.reserve(limits_.batch);
  while (!queue_.empty() && batch.size() < limits_.batch) {
    batch.push_back(std::move(queue_.front()));
    queue_.pop_front();
  }
  return batch;
}

void Batcher::work() {
  std::vector<float> inputs;
  for (auto batch = next(); !batch.empty(); batch = next()) {
    std::size_t answered = 0;
    try {
      inputs.clear();
      for (const auto& item : batch) inputs.insert(inputs.end(), item.input.begin(), item.input.end());
      const auto logits = context_.infer(inputs, static_cast<std::int64_t>(batch.size()));
      const auto classes = static_cast<std::ptrdiff_t>(logits.size() / batch.size());
      ++batches_;
      images_ += batch.size();
      auto from = logits.begin();
      for (auto& item : batch) {
        item.logits.set_value({from, from + classes});
        from += classes;
        ++answered;
      }
    } catch (...) {
      for (; answered < batch.size(); ++answered) batch[answered].logits.set_exception(std::current_exception());
    }
  }
}

}  // namespace zoo_serve
