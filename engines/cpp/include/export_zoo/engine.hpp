#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>

#include <export_zoo/metadata.hpp>
#include <export_zoo/visibility.hpp>

namespace export_zoo {

struct Options {
  std::string engine;  ///< name of an engine; empty: the fastest of those in the strongest state that may be loaded here
  State least = State::graph_verified;  ///< weakest state that may be loaded
  bool allow_failed = false;       ///< load from a bundle that failed its gate, to look into it
  int threads = 0;                 ///< of ONNX Runtime, 0: all cores
  int device = 0;                  ///< CUDA device of TensorRT
  std::filesystem::path onnxruntime;  ///< libonnxruntime.so.1; empty: $EXPORT_ZOO_ONNXRUNTIME, then the system's
  std::filesystem::path tensorrt;     ///< libnvinfer or libtensorrt_rtx; empty: $EXPORT_ZOO_TENSORRT, then the system's
};

namespace detail {
class EngineState;
class ContextState;
}  // namespace detail

/// What one thread runs an engine with: it owns the buffers and, on a GPU, the stream. Not to be shared. One that was
/// moved from may only be destroyed or assigned to. Threads must not be in infer() when the process calls exit().
class EXPORT_ZOO_API Context {
 public:
  Context(Context&&) noexcept;
  Context& operator=(Context&&) noexcept;
  ~Context();

  /// Logits of `batch` preprocessed images of the size that Metadata::preprocess makes, batch * classes values, image by
  /// image.
  ///
  /// `input` holds batch * 3 * height * width values. The result is valid until the next call or the context's end.
  /// Throws Error: shape before anything is run, runtime if the backend fails.
  [[nodiscard]] std::span<const float> infer(std::span<const float> input, std::int64_t batch);

  /// The same for images of another size, within Metadata::size_min and size_max. To make them, preprocess with
  /// at_size(options, size).
  [[nodiscard]] std::span<const float> infer(std::span<const float> input, std::int64_t batch, InputSize size);

 private:
  friend class Engine;
  explicit Context(std::unique_ptr<detail::ContextState> state);
  std::unique_ptr<detail::ContextState> state_;
};

/// A loaded engine: immutable, cheap to copy, shared by all threads. One that was moved from may only be destroyed or
/// assigned to.
class EXPORT_ZOO_API Engine {
 public:
  /// Load an engine after checking its files' hashes. What `export-zoo verify` attested in the bundle on a machine like
  /// this one (instruction set; for a GPU, compute capability) overrules the manifest's states. Throws Error.
  [[nodiscard]] static Engine load(const std::filesystem::path& bundle, const Options& options = {});

  /// A context for one thread. Throws Error (runtime, device). It keeps the engine alive.
  [[nodiscard]] Context context() const;

  [[nodiscard]] const Metadata& metadata() const noexcept;
  [[nodiscard]] const EngineInfo& info() const noexcept;

  /// Name and version of the library that runs it: "ONNX Runtime 1.31.1". On a CPU whose INT8 sums saturate,
  /// ", exact INT8 sums (session.x64quantprecision)" follows where that entry makes the engine exact.
  [[nodiscard]] const std::string& backend() const noexcept;

  /// Why this engine was chosen: "asked for", or "fastest verified engine that may be loaded here". Each engine that
  /// cannot be loaded here follows: "; onnxruntime-int8 was left out: <reason>", and
  /// each attestation that cannot be read.
  [[nodiscard]] const std::string& why() const noexcept;

 private:
  explicit Engine(std::shared_ptr<const detail::EngineState> state);
  std::shared_ptr<const detail::EngineState> state_;
};

}  // namespace export_zoo
