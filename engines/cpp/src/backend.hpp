// Backends that run an engine file: ONNX Runtime, OpenVINO and TensorRT, each loaded with dlopen.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <export_zoo/engine.hpp>

#include "files.hpp"

namespace export_zoo::detail {

// An engine's file. Its checksum and those of the weight files were checked.
struct EngineSource {
  Source file;
  std::map<std::string, Source> weights;  // weight files, by the names that the graph gives them
};

// A port's shape for a batch of images of this size.
inline std::vector<std::int64_t> shape_of(const Port& port, std::int64_t batch, InputSize size) {
  auto shape = port.shape;
  shape[0] = batch;
  for (std::size_t i = 1; i < shape.size(); ++i) {
    if (shape[i] == -1) shape[i] = i == 2 ? size.height : size.width;
  }
  return shape;
}

// Number of values of one image in a port, for an input of this size.
inline std::size_t values_of_image(const Port& port, InputSize size) {
  const auto shape = shape_of(port, 1, size);
  return static_cast<std::size_t>(std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>()));
}

using Outputs = std::span<const std::span<float>>;

// All outputs of the network, the first one first.
inline std::vector<Port> outputs_of(const Metadata& metadata) {
  std::vector<Port> ports{metadata.output};
  ports.insert(ports.end(), metadata.further_outputs.begin(), metadata.further_outputs.end());
  return ports;
}

// Buffers, stream and execution context of one thread.
class Runner {
 public:
  Runner() = default;
  Runner(const Runner&) = delete;
  Runner& operator=(const Runner&) = delete;
  virtual ~Runner() = default;

  // `input` holds `batch` images of `size`. `outputs` has space for what they give in the network's first output, or in
  // each. The caller has checked all of them. Throws Error.
  virtual void run(std::span<const float> input, std::int64_t batch, InputSize size, Outputs outputs) = 0;

  // From another thread: the run that is on, or about to begin, ends as soon as the library allows it, and may throw.
  virtual void cancel() noexcept {}

  // After a run that was cancelled has ended: the next one runs.
  virtual void renew() noexcept {}
};

class Backend {
 public:
  Backend() = default;
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;
  virtual ~Backend() = default;

  [[nodiscard]] virtual std::unique_ptr<Runner> runner() const = 0;
  [[nodiscard]] virtual const std::string& description() const noexcept = 0;
};

// Throws Error: backend_missing, backend_version, runtime, cpu.
std::unique_ptr<Backend> open_onnxruntime(const EngineSource& engine, const EngineInfo& info,
                                          const Metadata& metadata, const Options& options);

// Exists only where EXPORT_ZOO_WITH_OPENVINO is defined. It takes no weight files in memory. Throws Error:
// backend_missing, backend_version, runtime.
std::unique_ptr<Backend> open_openvino(const EngineSource& engine, const EngineInfo& info,
                                       const Metadata& metadata, const Options& options);

// The functions below exist only where EXPORT_ZOO_WITH_TENSORRT is defined.
//
// Compute capability of the GPU that Options select, such as "9.0"; nullopt if there is no such GPU.
std::optional<std::string> compute_capability(const Options& options);

// Throws Error: as open_onnxruntime, and device.
std::unique_ptr<Backend> open_tensorrt(const EngineSource& plan, const EngineInfo& info,
                                       const Metadata& metadata, const Options& options);

}  // namespace export_zoo::detail
