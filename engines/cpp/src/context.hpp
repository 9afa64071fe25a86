// What a Context holds.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include <export_zoo/engine.hpp>

#include "backend.hpp"

namespace export_zoo::detail {

class EngineState {
 public:
  Metadata metadata;
  EngineInfo info;
  std::string why;
  std::unique_ptr<Backend> backend;
};

// The size of a batch's images: zeros are Metadata::size_opt. Throws Error (shape) if the batch or the size is outside the
// bundle's range.
InputSize verified_size(const Metadata& metadata, std::int64_t batch, InputSize size);

// A batch, and where its outputs go. The arguments were checked.
struct Call {
  std::span<const float> input;
  std::int64_t batch;
  InputSize size;
  std::vector<std::span<float>> outputs;
};

// Runs one call at a time, in the thread that asks or in one of its own.
class ContextState {
 public:
  explicit ContextState(std::shared_ptr<const EngineState> engine);
  ContextState(const ContextState&) = delete;
  ContextState& operator=(const ContextState&) = delete;
  ~ContextState() { close(); }

  // Cancels the call that runs, and waits for its end. Calls that Done starts meanwhile end as cancelled.
  void close();

  // The call, whose outputs go to the context's own memory: the first one, or all. Throws Error (shape).
  [[nodiscard]] Call own(std::span<const float> input, std::int64_t batch, InputSize size, bool all);
  // The call, whose outputs go to the caller's memory. Throws Error (shape).
  [[nodiscard]] Call into(Outputs outputs, std::span<const float> input, std::int64_t batch, InputSize size) const;

  void run(const Call& call);
  void start(Call call, Context::Done done);
  void cancel() noexcept;

  const std::shared_ptr<const EngineState> engine;

 private:
  struct Started {
    Call call;
    Context::Done done;
  };

  [[nodiscard]] Call checked(std::span<const float> input, std::int64_t batch, InputSize size) const;
  void begin();
  [[nodiscard]] std::exception_ptr compute(const Call& call) noexcept;
  void work();

  std::unique_ptr<Runner> runner_;
  std::vector<Port> ports_;                 // outputs
  std::vector<std::vector<float>> values_;  // by output
  std::mutex mutex_;                        // of all below
  std::condition_variable changed_;
  bool busy_ = false;
  bool cancelled_ = false;
  bool closing_ = false;
  std::optional<Started> started_;
  std::thread thread_;
};

}  // namespace export_zoo::detail
