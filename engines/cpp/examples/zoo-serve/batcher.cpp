#include "batcher.hpp"

#include <algorithm>
#include <string>
#include <utility>

namespace zoo_serve {

namespace {

constexpr double kNewest = 0.2;  // weight of the newest batch in the average

Clock::duration seconds(double value) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(value));
}

}  // namespace

void Patience::check(Clock::duration more) const {
  if (Clock::now() + more > deadline) throw Late("the answer would come after the deadline");
  if (gone && gone()) throw Late("the client is gone");
}

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

Batcher::Coming::Coming(Batcher& batcher, Patience patience) : batcher_(batcher), patience_(std::move(patience)) {
  const std::lock_guard lock(batcher_.mutex_);
  if (batcher_.closing_) throw Busy("shutting down");
  const auto ahead = batcher_.queue_.size() + batcher_.coming_;
  if (ahead >= batcher_.limits_.queue) throw Busy("too many requests wait");
  patience_.check();
  const auto expected = batcher_.expected_of(ahead + 1);
  // A server that does nothing tries: only an answer tells whether it still takes as long as it did.
  if (ahead + batcher_.running_ > 0 && Clock::now() + expected > patience_.deadline) {
    throw Busy("the answer is expected in " +
               std::to_string(std::chrono::duration_cast<std::chrono::milliseconds>(expected).count()) +
               " ms, after the deadline");
  }
  ++batcher_.coming_;
}

Batcher::Coming::~Coming() {
  if (submitted_) return;
  {
    const std::lock_guard lock(batcher_.mutex_);
    --batcher_.coming_;
    batcher_.note_idle();
  }
  batcher_.changed_.notify_one();
}

std::future<std::vector<float>> Batcher::Coming::submit(std::vector<float> input) {
  std::future<std::vector<float>> logits;
  {
    const std::lock_guard lock(batcher_.mutex_);
    batcher_.queue_.push_back({std::move(input), {}, std::move(patience_)});
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

Clock::duration Batcher::expected() const {
  const std::lock_guard lock(mutex_);
  return expected_of(queue_.size() + coming_ + 1);
}

Clock::duration Batcher::expected_of(std::size_t position) const {
  return seconds(seconds_per_image_ * static_cast<double>(position + running_));
}

std::vector<Batcher::Item> Batcher::next() {
  std::unique_lock lock(mutex_);
  running_ = 0;
  while (true) {
    changed_.wait(lock, [this] { return closing_ || !queue_.empty(); });
    if (queue_.empty()) return {};
    changed_.wait_for(lock, limits_.wait, [this] { return closing_ || coming_ == 0 || queue_.size() >= limits_.batch; });
    std::vector<Item> batch;
    batch.reserve(limits_.batch);
    const auto takes = seconds(seconds_per_image_ * static_cast<double>(std::min(queue_.size(), limits_.batch)));
    while (!queue_.empty() && batch.size() < limits_.batch) {
      auto item = std::move(queue_.front());
      queue_.pop_front();
      try {
        // The last one is tried whatever was expected: else, one slow batch would be the last for short deadlines.
        item.patience.check(batch.empty() && queue_.empty() ? Clock::duration{} : takes);
        batch.push_back(std::move(item));
      } catch (const Late&) {
        ++dropped_;
        item.logits.set_exception(std::current_exception());
      }
    }
    if (batch.empty()) {
      note_idle();
      continue;
    }
    running_ = batch.size();
    began_ = busy_since_.value_or(Clock::now());
    return batch;
  }
}

void Batcher::note_idle() {
  if (queue_.empty() && coming_ == 0) busy_since_.reset();
}

void Batcher::learn(std::size_t images) {
  const auto now = Clock::now();
  const double found = std::chrono::duration<double>(now - began_).count() / static_cast<double>(images);
  seconds_per_image_ = seconds_per_image_ == 0 ? found : (1 - kNewest) * seconds_per_image_ + kNewest * found;
  busy_since_ = now;
  note_idle();
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
    const std::lock_guard lock(mutex_);
    learn(batch.size());
  }
}

}  // namespace zoo_serve
