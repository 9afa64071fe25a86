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

Batcher::Batcher(Contexts contexts, Limits limits) : limits_(limits), contexts_(std::move(contexts)) {
  for (auto& stream : contexts_.streams) threads_.emplace_back([this, &stream] { work(stream); });
}

Batcher::~Batcher() {
  {
    const std::lock_guard lock(mutex_);
    closing_ = true;
  }
  changed_.notify_all();
  for (auto& thread : threads_) thread.join();
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

double Batcher::seconds_per_image() const { return images_each_ == 0 ? 0 : seconds_ / images_each_; }

Clock::duration Batcher::expected_of(std::size_t position) const {
  return seconds(seconds_per_image() * static_cast<double>(position + running_));
}

Batcher::Batch Batcher::next() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [this] { return closing_ || !queue_.empty(); });
    if (queue_.empty()) return {};
    changed_.wait_for(lock, limits_.wait, [this] { return closing_ || coming_ == 0 || queue_.size() >= limits_.batch; });
    // Streams that do nothing share what waits.
    const auto idle = contexts_.streams.size() - busy_;
    Batch batch;
    batch.alone = contexts_.whole && busy_ == 0 && queue_.size() < idle;
    const auto most = std::min(limits_.batch, batch.alone ? queue_.size() : (queue_.size() + idle - 1) / idle);
    batch.items.reserve(most);
    const auto takes = seconds(seconds_per_image() * static_cast<double>(most * (busy_ + 1)));
    while (!queue_.empty() && batch.items.size() < most) {
      auto item = std::move(queue_.front());
      queue_.pop_front();
      try {
        // The last one is tried whatever was expected: else, one slow batch would be the last for short deadlines.
        item.patience.check(batch.items.empty() && queue_.empty() ? Clock::duration{} : takes);
        batch.items.push_back(std::move(item));
      } catch (const Late&) {
        ++dropped_;
        item.logits.set_exception(std::current_exception());
      }
    }
    if (batch.items.empty()) {
      note_idle();
      continue;
    }
    running_ += batch.items.size();
    ++busy_;
    if (!busy_since_) busy_since_ = Clock::now();
    if (!queue_.empty()) changed_.notify_one();  // for a stream that does nothing
    return batch;
  }
}

void Batcher::note_idle() {
  if (queue_.empty() && coming_ == 0 && busy_ == 0) busy_since_.reset();
}

void Batcher::learn(std::size_t images) {
  const auto now = Clock::now();
  const double took = std::chrono::duration<double>(now - *busy_since_).count();
  const auto count = static_cast<double>(images);
  const double weight = images_each_ == 0 ? 1 : kNewest;
  seconds_ = (1 - weight) * seconds_ + weight * took;
  images_each_ = (1 - weight) * images_each_ + weight * count;
  running_ -= images;
  --busy_;
  busy_since_ = now;
  note_idle();
}

void Batcher::work(export_zoo::Context& stream) {
  std::vector<float> inputs;
  for (auto batch = next(); !batch.items.empty(); batch = next()) {
    auto& items = batch.items;
    std::size_t answered = 0;
    try {
      inputs.clear();
      for (const auto& item : items) inputs.insert(inputs.end(), item.input.begin(), item.input.end());
      auto& context = batch.alone ? *contexts_.whole : stream;
      const auto logits = context.infer(inputs, static_cast<std::int64_t>(items.size()));
      const auto classes = static_cast<std::ptrdiff_t>(logits.size() / items.size());
      ++batches_;
      images_ += items.size();
      auto from = logits.begin();
      for (auto& item : items) {
        item.logits.set_value({from, from + classes});
        from += classes;
        ++answered;
      }
    } catch (...) {
      for (; answered < items.size(); ++answered) items[answered].logits.set_exception(std::current_exception());
    }
    const std::lock_guard lock(mutex_);
    learn(items.size());
  }
}

}  // namespace zoo_serve
