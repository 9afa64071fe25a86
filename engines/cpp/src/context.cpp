#include "context.hpp"

#include <algorithm>
#include <array>
#include <future>
#include <system_error>
#include <utility>

#include <export_zoo/error.hpp>

namespace export_zoo {

namespace detail {

namespace {

std::string text(InputSize size) { return std::to_string(size.height) + "x" + std::to_string(size.width); }

}  // namespace

InputSize verified_size(const Metadata& metadata, std::int64_t batch, InputSize size) {
  if (size == InputSize{}) size = metadata.size_opt;
  if (batch < metadata.batch_min || batch > metadata.batch_max) {
    throw Error(ErrorCode::shape, "batch " + std::to_string(batch) + " is outside this bundle's range " +
                                      std::to_string(metadata.batch_min) + " to " +
                                      std::to_string(metadata.batch_max) +
                                      ": split it, or export with a wider --batch MIN:OPT:MAX");
  }
  const auto& low = metadata.size_min;
  const auto& high = metadata.size_max;
  if (size.height < low.height || size.height > high.height || size.width < low.width || size.width > high.width) {
    throw Error(ErrorCode::shape, "size " + text(size) + " is outside this bundle's range " + text(low) + " to " +
                                      text(high) + ": resize, or export with a wider --dynamic-size MIN:OPT:MAX");
  }
  return size;
}

ContextState::ContextState(std::shared_ptr<const EngineState> from)
    : engine(std::move(from)),
      runner_(engine->backend->runner()),
      ports_(outputs_of(engine->metadata)),
      values_(ports_.size()) {}

void ContextState::close() {
  {
    const std::lock_guard lock(mutex_);
    closing_ = true;
  }
  cancel();
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

Call ContextState::checked(std::span<const float> input, std::int64_t batch, InputSize size) const {
  const auto& metadata = engine->metadata;
  size = verified_size(metadata, batch, size);
  const auto wanted = static_cast<std::size_t>(batch) * values_of_image(metadata.input, size);
  if (input.size() != wanted) {
    throw Error(ErrorCode::shape, "input has " + std::to_string(input.size()) + " values, batch " +
                                      std::to_string(batch) + " of " + text(size) + " needs " + std::to_string(wanted));
  }
  return {input, batch, size, {}};
}

Call ContextState::own(std::span<const float> input, std::int64_t batch, InputSize size, bool all) {
  auto call = checked(input, batch, size);
  for (std::size_t i = 0; i < (all ? ports_.size() : 1); ++i) {
    values_[i].resize(static_cast<std::size_t>(batch) * values_of_image(ports_[i], call.size));
    call.outputs.emplace_back(values_[i]);
  }
  return call;
}

Call ContextState::into(Outputs outputs, std::span<const float> input, std::int64_t batch, InputSize size) const {
  auto call = checked(input, batch, size);
  if (outputs.size() != 1 && outputs.size() != ports_.size()) {
    throw Error(ErrorCode::shape, "memory of " + std::to_string(outputs.size()) + " outputs was given, the network has " +
                                      std::to_string(ports_.size()) + ": give that of the first one, or of all");
  }
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    const auto wanted = static_cast<std::size_t>(batch) * values_of_image(ports_[i], call.size);
    if (outputs[i].size() != wanted) {
      throw Error(ErrorCode::shape, ports_[i].name + " has space for " + std::to_string(outputs[i].size()) +
                                        " values, batch " + std::to_string(batch) + " gives " + std::to_string(wanted));
    }
  }
  call.outputs.assign(outputs.begin(), outputs.end());
  return call;
}

void ContextState::begin() {
  const std::lock_guard lock(mutex_);
  if (busy_) {
    throw Error(ErrorCode::runtime, "this context has a call that has not ended: wait for it, or create another context");
  }
  busy_ = true;
  cancelled_ = closing_;
  if (cancelled_) runner_->cancel();
}

// Returns what the call threw.
std::exception_ptr ContextState::compute(const Call& call) noexcept {
  std::exception_ptr failure;
  try {
    runner_->run(call.input, call.batch, call.size, call.outputs);
  } catch (...) {
    failure = std::current_exception();
  }
  const std::lock_guard lock(mutex_);
  busy_ = false;
  if (!cancelled_) return failure;
  runner_->renew();
  return std::make_exception_ptr(Error(ErrorCode::cancelled, "the call was cancelled"));
}

void ContextState::run(const Call& call) {
  begin();
  if (const auto failure = compute(call)) std::rethrow_exception(failure);
}

void ContextState::start(Call call, Context::Done done) {
  begin();
  const std::lock_guard lock(mutex_);
  try {
    if (!thread_.joinable()) thread_ = std::thread([this] { work(); });
  } catch (const std::system_error& error) {
    busy_ = false;
    throw Error(ErrorCode::runtime, std::string("no thread for an asynchronous call: ") + error.what() +
                                        ": create fewer contexts, or use infer()");
  }
  started_ = {std::move(call), std::move(done)};
  changed_.notify_all();
}

void ContextState::cancel() noexcept {
  const std::lock_guard lock(mutex_);
  if (!busy_) return;
  cancelled_ = true;
  runner_->cancel();
}

void ContextState::work() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return closing_ || started_; });
    if (!started_) return;
    const auto [call, done] = *std::exchange(started_, std::nullopt);
    lock.unlock();
    const auto failure = compute(call);
    if (done) done(failure);
    lock.lock();
  }
}

}  // namespace detail

Context::Context(std::unique_ptr<detail::ContextState> state) : state_(std::move(state)) {}
Context::Context(Context&&) noexcept = default;

Context& Context::operator=(Context&& other) noexcept {
  if (state_ && this != &other) state_->close();
  state_ = std::move(other.state_);
  return *this;
}

// Closed first: while the pointer is destroyed, Done must not find it empty.
Context::~Context() {
  if (state_) state_->close();
}

std::span<const float> Context::infer(std::span<const float> input, std::int64_t batch, InputSize size) {
  const auto call = state_->own(input, batch, size, false);
  state_->run(call);
  return call.outputs.front();
}

std::vector<std::span<const float>> Context::infer_all(std::span<const float> input, std::int64_t batch, InputSize size) {
  const auto call = state_->own(input, batch, size, true);
  state_->run(call);
  return {call.outputs.begin(), call.outputs.end()};
}

void Context::infer_into(std::span<float> logits, std::span<const float> input, std::int64_t batch, InputSize size) {
  infer_into(std::array{logits}, input, batch, size);
}

void Context::infer_into(std::span<const std::span<float>> outputs, std::span<const float> input, std::int64_t batch,
                         InputSize size) {
  state_->run(state_->into(outputs, input, batch, size));
}

void Context::infer_async(std::span<float> logits, std::span<const float> input, std::int64_t batch, Done done,
                          InputSize size) {
  infer_async(std::array{logits}, input, batch, std::move(done), size);
}

void Context::infer_async(std::span<const std::span<float>> outputs, std::span<const float> input, std::int64_t batch,
                          Done done, InputSize size) {
  state_->start(state_->into(outputs, input, batch, size), std::move(done));
}

std::future<void> Context::infer_async(std::span<float> logits, std::span<const float> input, std::int64_t batch,
                                       InputSize size) {
  return infer_async(std::array{logits}, input, batch, size);
}

std::future<void> Context::infer_async(std::span<const std::span<float>> outputs, std::span<const float> input,
                                       std::int64_t batch, InputSize size) {
  const auto promise = std::make_shared<std::promise<void>>();
  auto future = promise->get_future();
  infer_async(
      outputs, input, batch,
      [promise](const std::exception_ptr& failure) {
        failure ? promise->set_exception(failure) : promise->set_value();
      },
      size);
  return future;
}

void Context::cancel() noexcept { state_->cancel(); }

void Context::warm_up(std::int64_t batch, InputSize size) {
  const auto& metadata = state_->engine->metadata;
  const auto real = detail::verified_size(metadata, batch, size);
  const std::vector<float> zeros(static_cast<std::size_t>(batch) * detail::values_of_image(metadata.input, real));
  for (int i = 0; i < 2; ++i) static_cast<void>(infer(zeros, batch, real));
}

}  // namespace export_zoo
