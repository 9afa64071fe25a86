#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <export_zoo/metadata.hpp>
#include <export_zoo/visibility.hpp>

namespace export_zoo {

/// What ONNX Runtime calls session options. None changes the logits, except `providers`.
struct OnnxRuntimeOptions {
  struct Provider {
    std::string name;  ///< as ONNX Runtime's AppendExecutionProvider takes it, such as "XNNPACK"
    std::map<std::string, std::string> options;
  };

  /// Whether threads that wait for work within a call keep their core busy. That saves microseconds for each layer, and
  /// costs the CPU time of whatever else runs on the machine.
  bool spinning = true;
  /// Whether memory is kept for the next call. Without, large batches leave nothing behind, and calls are slower.
  bool arena = true;
  /// Session entries (onnxruntime_session_options_config_keys.h). Those that the library sets itself are refused.
  std::map<std::string, std::string> entries;
  /// Execution providers that go before the CPU's. Engines were not verified with them: none counts as more than
  /// State::graph_verified, and their logits differ.
  std::vector<Provider> providers;
};

/// Instead of a library, its directory may be given.
struct Options {
  std::string engine;  ///< engine name; empty: the fastest engine in the strongest state that may be loaded here
  State least = State::graph_verified;  ///< weakest state that may be loaded
  bool allow_failed = false;       ///< load from a bundle that failed its parity gate, for inspection
  bool measure = true;             ///< time the engines here, in a few runs, if no machine like this one timed them
  /// Threads of each stream of ONNX Runtime and OpenVINO. 0: the cores that this process may use, by affinity and the
  /// quota of its container, shared by the streams.
  int threads = 0;
  /// Contexts that compute at the same time, each with threads of its own. One stream with all threads answers one
  /// request soonest; a stream of one thread for each core answers the most. ONNX Runtime and OpenVINO only.
  int streams = 1;
  int device = 0;                  ///< CUDA device of TensorRT
  OnnxRuntimeOptions onnxruntime_session;  ///< how ONNX Runtime uses threads and memory
  std::filesystem::path onnxruntime;  ///< libonnxruntime.so.1; empty: $EXPORT_ZOO_ONNXRUNTIME, then the system's
  std::filesystem::path openvino;     ///< libopenvino_c.so; empty: $EXPORT_ZOO_OPENVINO, then the system's
  std::filesystem::path tensorrt;     ///< libnvinfer or libtensorrt_rtx; empty: $EXPORT_ZOO_TENSORRT, then the system's
};

/// Cores that this process may run on (taskset, cpuset), at most the quota of CPU time of its container, rounded up.
[[nodiscard]] EXPORT_ZOO_API int usable_cores();

namespace detail {
class EngineState;
class ContextState;
}  // namespace detail

/// Execution context of one thread. It owns the buffers and, on a GPU, the stream. Do not share it between threads; only
/// cancel() may be called from any thread. A moved-from object may only be destroyed or assigned to. No thread may be in
/// infer() when the process calls exit().
///
/// All calls take `batch` preprocessed images, `input`, which holds batch * channels * height * width values. They have the
/// size that Metadata::preprocess produces, or another one from Metadata::size_min to size_max, `size`: preprocess them with
/// at_size(options, size). All calls throw Error: shape, before anything runs or is written; runtime, if the backend fails
/// or the context has an asynchronous call; cancelled.
class EXPORT_ZOO_API Context {
 public:
  /// Called in a thread of the context at the end of an asynchronous call, with what it threw or nullptr. It may start the
  /// next call. It must not throw, nor destroy the context.
  using Done = std::function<void(std::exception_ptr)>;

  Context(Context&&) noexcept;
  Context& operator=(Context&&) noexcept;
  /// Cancels an asynchronous call, and waits for its end.
  ~Context();

  /// Returns the values of the first output, image by image: of a classification, batch * classes logits. The result is
  /// valid until the next call, or until the context is destroyed.
  [[nodiscard]] std::span<const float> infer(std::span<const float> input, std::int64_t batch, InputSize size = {});

  /// The same of all outputs: of Metadata::output, then of further_outputs.
  [[nodiscard]] std::vector<std::span<const float>> infer_all(std::span<const float> input, std::int64_t batch,
                                                              InputSize size = {});

  /// The same, into the caller's memory: `logits` holds as many values as the batch has in the first output.
  void infer_into(std::span<float> logits, std::span<const float> input, std::int64_t batch, InputSize size = {});

  /// The same, of all outputs.
  void infer_into(std::span<const std::span<float>> outputs, std::span<const float> input, std::int64_t batch,
                  InputSize size = {});

  /// The same, in a thread of the context. `input` and the memory of the outputs must stay as they are until `done` is
  /// called. What is wrong with the arguments is thrown at once. The context takes one call at a time: for several at once,
  /// use several contexts.
  void infer_async(std::span<float> logits, std::span<const float> input, std::int64_t batch, Done done, InputSize size = {});
  void infer_async(std::span<const std::span<float>> outputs, std::span<const float> input, std::int64_t batch, Done done,
                   InputSize size = {});

  /// The same, with a future that holds nothing, or what the call threw.
  [[nodiscard]] std::future<void> infer_async(std::span<float> logits, std::span<const float> input, std::int64_t batch,
                                              InputSize size = {});
  [[nodiscard]] std::future<void> infer_async(std::span<const std::span<float>> outputs, std::span<const float> input,
                                              std::int64_t batch, InputSize size = {});

  /// Makes the call that runs now, if there is one, end soon and throw Error (cancelled); its outputs are then undefined.
  /// ONNX Runtime and OpenVINO end after the layer that they compute, TensorRT after the batch.
  void cancel() noexcept;

  /// Runs zeros twice, so that later calls with this batch and size do not pay for what runtimes do in the first ones:
  /// allocate, choose kernels, and record CUDA graphs.
  void warm_up(std::int64_t batch, InputSize size = {});

 private:
  friend class Engine;
  explicit Context(std::unique_ptr<detail::ContextState> state);
  std::unique_ptr<detail::ContextState> state_;
};

/// A loaded engine: immutable, cheap to copy, shared by all threads. A moved-from object may only be destroyed or
/// assigned to.
class EXPORT_ZOO_API Engine {
 public:
  /// Loads an engine after checking its files' hashes. Attestations that `export-zoo verify` wrote into the bundle on a
  /// machine like this one (same instruction set; for a GPU, same compute capability) override the manifest's states.
  ///
  /// The fastest engine is the one that was fastest on a machine like this one: by an attestation, otherwise at export.
  /// If no such machine timed the engines, this function times them (see Options::measure) and keeps the result in
  /// $EXPORT_ZOO_CACHE/latencies, otherwise in $XDG_CACHE_HOME/export-zoo/latencies or ~/.cache/export-zoo/latencies.
  /// Throws Error.
  [[nodiscard]] static Engine load(const std::filesystem::path& bundle, const Options& options = {});

  /// The same from memory, with the same checks. The bytes must not change until it returns, and may be freed then: the
  /// runtimes keep copies. OpenVINO's engines with weights in files of their own (`weights-*.bin`, of graphs that are
  /// too large for one file) are left out.
  [[nodiscard]] static Engine load(const Files& bundle, const Options& options = {});

  /// Creates a context for one thread. The context keeps the engine alive. Throws Error (runtime, device).
  [[nodiscard]] Context context() const;

  [[nodiscard]] const Metadata& metadata() const noexcept;
  [[nodiscard]] const EngineInfo& info() const noexcept;

  /// Name and version of the library that runs the engine: "ONNX Runtime 1.31.1". On a CPU whose INT8 sums saturate,
  /// ", exact INT8 sums (session.x64quantprecision)" follows if that session entry makes the engine exact.
  [[nodiscard]] const std::string& backend() const noexcept;

  /// Why this engine was chosen: "asked for", or "fastest verified engine that may be loaded here, measured at export,
  /// 2.31x the speed of FP32". After the latter, the text lists each engine that cannot be loaded here:
  /// "; onnxruntime-int8 was left out: <reason>". Last, it lists each attestation that cannot be read.
  [[nodiscard]] const std::string& why() const noexcept;

 private:
  explicit Engine(std::shared_ptr<const detail::EngineState> state);
  std::shared_ptr<const detail::EngineState> state_;
};

}  // namespace export_zoo
