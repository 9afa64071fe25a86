// TensorRT and TensorRT-RTX. Compiled where NVIDIA's headers are found. Their libraries and CUDA's runtime are loaded
// with dlopen. This file has not been run on a GPU yet: see docs/cpp.md.

#include <algorithm>
#include <array>
#include <cstdint>
#include <iterator>
#include <mutex>
#include <vector>

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <export_zoo/error.hpp>

#include "backend.hpp"
#include "library.hpp"
#include "log.hpp"

namespace export_zoo::detail {

namespace {

constexpr std::array<const char*, 2> kTensorRT{"libnvinfer.so.11", "libnvinfer.so"};
constexpr std::array<const char*, 2> kTensorRTRTX{"libtensorrt_rtx.so.1", "libtensorrt_rtx.so"};
constexpr std::array<const char*, 3> kCudart{"libcudart.so.13", "libcudart.so.12", "libcudart.so"};

// The functions of CUDA's runtime that this file calls.
struct Cuda {
  Library library;
#define EXPORT_ZOO_CUDA(name) decltype(&::name) name = reinterpret_cast<decltype(&::name)>(library.symbol(#name))
  EXPORT_ZOO_CUDA(cudaGetErrorString);
  EXPORT_ZOO_CUDA(cudaGetDeviceCount);
  EXPORT_ZOO_CUDA(cudaSetDevice);
  EXPORT_ZOO_CUDA(cudaDeviceGetAttribute);
  EXPORT_ZOO_CUDA(cudaMalloc);
  EXPORT_ZOO_CUDA(cudaFree);
  EXPORT_ZOO_CUDA(cudaFreeHost);
  EXPORT_ZOO_CUDA(cudaMemcpyAsync);
  EXPORT_ZOO_CUDA(cudaStreamCreateWithFlags);
  EXPORT_ZOO_CUDA(cudaStreamDestroy);
  EXPORT_ZOO_CUDA(cudaStreamSynchronize);
  EXPORT_ZOO_CUDA(cudaStreamBeginCapture);
  EXPORT_ZOO_CUDA(cudaStreamEndCapture);
  EXPORT_ZOO_CUDA(cudaGraphDestroy);
  EXPORT_ZOO_CUDA(cudaGraphExecDestroy);
  EXPORT_ZOO_CUDA(cudaGraphLaunch);
#undef EXPORT_ZOO_CUDA
  // Overloaded or inline in the C++ headers, so declared with their C signature.
  cudaError_t (*cudaHostAlloc)(void**, std::size_t, unsigned int) =
      reinterpret_cast<decltype(cudaHostAlloc)>(library.symbol("cudaHostAlloc"));
  cudaError_t (*cudaGraphInstantiate)(cudaGraphExec_t*, cudaGraph_t, unsigned long long) =
      reinterpret_cast<decltype(cudaGraphInstantiate)>(library.symbol("cudaGraphInstantiate"));

  explicit Cuda() : library({}, "EXPORT_ZOO_CUDART", kCudart, "CUDA's runtime") {}

  void check(cudaError_t status, const char* what, ErrorCode code = ErrorCode::runtime) const {
    if (status == cudaSuccess) return;
    throw Error(code, std::string("CUDA: ") + what + ": " + cudaGetErrorString(status) +
                          ": check the driver, free memory and other processes with nvidia-smi");
  }
};

std::string capability_of(const Cuda& cuda, int device) {
  int major = 0;
  int minor = 0;
  cuda.check(cuda.cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "device");
  cuda.check(cuda.cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "device");
  return std::to_string(major) + "." + std::to_string(minor);
}

class Logger final : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override {
    if (severity > Severity::kWARNING) return;
    const bool is_error = severity <= Severity::kERROR;
    detail::log(is_error ? export_zoo::Severity::error : export_zoo::Severity::warning, "TensorRT", message);
    if (!is_error) return;
    const std::lock_guard lock(mutex_);
    last_ = message;
  }
  [[nodiscard]] std::string last() const {
    const std::lock_guard lock(mutex_);
    return last_.empty() ? "no reason given" : last_;
  }

 private:
  mutable std::mutex mutex_;
  std::string last_;
};

// Version text, such as "11.1.0", of getInferLibVersion's number.
std::string version_text(int version) {
  return std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." +
         std::to_string(version % 100);
}

// Memory on the device or, pinned, on the host.
class Buffer {
 public:
  Buffer(const Cuda& cuda, std::size_t bytes, bool pinned) : cuda_(cuda), pinned_(pinned) {
    if (pinned) {
      cuda.check(cuda.cudaHostAlloc(&data_, bytes, cudaHostAllocDefault), "pinned memory");
    } else {
      cuda.check(cuda.cudaMalloc(&data_, bytes), "device memory");
    }
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { static_cast<void>(pinned_ ? cuda_.cudaFreeHost(data_) : cuda_.cudaFree(data_)); }

  [[nodiscard]] void* data() const { return data_; }

 private:
  const Cuda& cuda_;
  void* data_ = nullptr;
  bool pinned_;
};

class Stream {
 public:
  explicit Stream(const Cuda& cuda) : cuda_(cuda) {
    cuda.check(cuda.cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "stream");
  }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() { static_cast<void>(cuda_.cudaStreamDestroy(stream_)); }

  [[nodiscard]] cudaStream_t get() const { return stream_; }

 private:
  const Cuda& cuda_;
  cudaStream_t stream_ = nullptr;
};

class TensorRTRunner final : public Runner {
 public:
  TensorRTRunner(const Cuda& cuda, const Logger& logger, nvinfer1::ICudaEngine& engine, const Metadata& metadata,
                 int device)
      : cuda_(cuda),
        logger_(logger),
        metadata_(metadata),
        device_(device),
        in_host_(cuda, bytes_of(metadata.input), true),
        in_(cuda, bytes_of(metadata.input), false),
        ports_(outputs_of(metadata)),
        stream_(cuda),
        context_(engine.createExecutionContext()) {
    if (!context_) {
      throw Error(ErrorCode::runtime, "TensorRT: no execution context: " + logger.last() +
                                          ": check free memory with nvidia-smi, or create fewer contexts");
    }
    address(metadata.input, in_);
    for (const auto& port : ports_) {  // TensorRT writes all of them, also those that nobody reads
      device_out_.push_back(std::make_unique<Buffer>(cuda, bytes_of(port), false));
      address(port, *device_out_.back());
    }
  }
  TensorRTRunner(const TensorRTRunner&) = delete;
  TensorRTRunner& operator=(const TensorRTRunner&) = delete;
  ~TensorRTRunner() override { forget(); }

  void run(std::span<const float> input, std::int64_t batch, InputSize size, Outputs outputs) override {
    cuda_.check(cuda_.cudaSetDevice(device_), "device", ErrorCode::device);
    std::copy(input.begin(), input.end(), static_cast<float*>(in_host_.data()));
    const Shape shape{batch, size.height, size.width};
    if (shape != shape_ || outputs.size() != wanted_) set(shape);
    wanted_ = outputs.size();
    while (host_out_.size() < outputs.size()) {
      host_out_.push_back(std::make_unique<Buffer>(cuda_, bytes_of(ports_[host_out_.size()]), true));
    }
    // The first run of a shape lets the library set up. The second run in a row is recorded, and replayed from then on.
    if (runs_ == 1 && graph_ == nullptr) graph_ = capture(input.size_bytes(), outputs);
    if (graph_ != nullptr) {
      cuda_.check(cuda_.cudaGraphLaunch(graph_, stream_.get()), "graph");
    } else {
      enqueue(input.size_bytes(), outputs);
    }
    cuda_.check(cuda_.cudaStreamSynchronize(stream_.get()), "run");
    ++runs_;
    for (std::size_t i = 0; i < outputs.size(); ++i) {
      std::copy_n(static_cast<const float*>(host_out_[i]->data()), outputs[i].size(), outputs[i].begin());
    }
  }

 private:
  using Shape = std::array<std::int64_t, 3>;  // batch, height, width

  [[nodiscard]] std::size_t bytes_of(const Port& port) const {
    return static_cast<std::size_t>(metadata_.batch_max) * values_of_image(port, metadata_.size_max) * sizeof(float);
  }

  void address(const Port& port, Buffer& buffer) {
    if (context_->setTensorAddress(port.name.c_str(), buffer.data())) return;
    throw Error(ErrorCode::runtime, "TensorRT: the plan has no tensor " + port.name + ": " + logger_.last() +
                                        ": export the bundle again");
  }

  // A CUDA graph is valid for one shape, and copies the outputs that were wanted. If it were replayed after the context was
  // set to another shape, it might use that shape's state.
  void forget() {
    if (graph_ != nullptr) static_cast<void>(cuda_.cudaGraphExecDestroy(graph_));
    graph_ = nullptr;
    shape_ = {};
    runs_ = 0;
  }

  void set(const Shape& shape) {
    forget();
    const auto [batch, height, width] = shape;
    nvinfer1::Dims dims{};
    dims.nbDims = static_cast<int>(metadata_.input.shape.size());
    dims.d[0] = batch;
    dims.d[1] = metadata_.input.shape[1];
    dims.d[2] = height;
    dims.d[3] = width;
    if (!context_->setInputShape(metadata_.input.name.c_str(), dims)) {
      throw Error(ErrorCode::runtime, "TensorRT refuses batch " + std::to_string(batch) + " of " +
                                          std::to_string(height) + "x" + std::to_string(width) + ": " + logger_.last() +
                                          ": export the bundle again");
    }
    // Dimensions that the plan left open until now must fit the buffers, too.
    for (const auto& port : ports_) check_room(port, shape);
    shape_ = shape;
  }

  void check_room(const Port& port, const Shape& shape) const {
    const auto found = context_->getTensorShape(port.name.c_str());
    std::array<std::int64_t, 4> wanted{shape[0], 0, 0, 0};
    for (std::size_t i = 1; i < port.shape.size(); ++i) {  // only height and width can be -1
      wanted.at(i) = port.shape[i] != -1 ? port.shape[i] : shape.at(i - 1);
    }
    if (found.nbDims != static_cast<int>(port.shape.size()) ||
        !std::equal(found.d, found.d + found.nbDims, wanted.begin())) {
      throw Error(ErrorCode::bundle, "TensorRT: output " + port.name +
                                         " does not have the shape in the manifest: export the bundle again");
    }
  }

  void enqueue(std::size_t in, Outputs outputs) {
    const auto stream = stream_.get();
    cuda_.check(cuda_.cudaMemcpyAsync(in_.data(), in_host_.data(), in, cudaMemcpyHostToDevice, stream), "copy");
    if (!context_->enqueueV3(stream)) {
      throw Error(ErrorCode::runtime, "TensorRT could not run the engine: " + logger_.last() +
                                          ": check nvidia-smi, or run an engine of onnxruntime");
    }
    for (std::size_t i = 0; i < outputs.size(); ++i) {
      cuda_.check(cuda_.cudaMemcpyAsync(host_out_[i]->data(), device_out_[i]->data(), outputs[i].size_bytes(),
                                        cudaMemcpyDeviceToHost, stream),
                  "copy");
    }
  }

  // Records one run as a CUDA graph. Returns null if it cannot be recorded; then each run is enqueued.
  cudaGraphExec_t capture(std::size_t in, Outputs outputs) {
    const auto stream = stream_.get();
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    if (cuda_.cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal) != cudaSuccess) return nullptr;
    bool good = true;
    try {
      enqueue(in, outputs);
    } catch (const Error&) {
      good = false;
    }
    if (cuda_.cudaStreamEndCapture(stream, &graph) != cudaSuccess || graph == nullptr) return nullptr;
    if (!good || cuda_.cudaGraphInstantiate(&executable, graph, 0) != cudaSuccess) executable = nullptr;
    static_cast<void>(cuda_.cudaGraphDestroy(graph));
    return executable;
  }

  const Cuda& cuda_;
  const Logger& logger_;
  const Metadata& metadata_;
  int device_;
  Buffer in_host_;
  Buffer in_;
  std::vector<Port> ports_;  // outputs
  std::vector<std::unique_ptr<Buffer>> device_out_;  // by output
  std::vector<std::unique_ptr<Buffer>> host_out_;    // those that were wanted
  Stream stream_;
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
  Shape shape_{};  // shape that the context is set to; zeros: none
  std::size_t wanted_ = 0;  // number of outputs that are copied
  std::uint64_t runs_ = 0;  // number of runs of that shape in a row
  cudaGraphExec_t graph_ = nullptr;  // CUDA graph of that shape; null if it cannot be recorded
};

class TensorRTBackend final : public Backend {
 public:
  TensorRTBackend(const EngineSource& source, const EngineInfo& info, const Metadata& metadata,
                  const Options& options)
      : metadata_(metadata),
        device_(options.device),
        library_(options.tensorrt, "EXPORT_ZOO_TENSORRT",
                 info.target == "tensorrt-rtx" ? std::span<const char* const>(kTensorRTRTX) : kTensorRT,
                 info.target == "tensorrt-rtx" ? "TensorRT-RTX" : "TensorRT") {
    check_version(info);
    check_device(info);
    const auto create =
        reinterpret_cast<void* (*)(void*, int)>(library_.symbol("createInferRuntime_INTERNAL"));
    runtime_.reset(static_cast<nvinfer1::IRuntime*>(create(&logger_, NV_TENSORRT_VERSION)));
    if (!runtime_) {
      throw Error(ErrorCode::runtime, description_ + " does not start: " + logger_.last() +
                                          ": check nvidia-smi, or load an engine of onnxruntime");
    }
    std::vector<char> read;
    auto plan = source.file.bytes.value_or(std::span<const std::byte>());
    if (!source.file.bytes) {
      const auto file = source.file.open();
      read.assign(std::istreambuf_iterator<char>(*file), std::istreambuf_iterator<char>());
      if (!*file) throw Error(ErrorCode::runtime, source.file.path.string() + ": cannot be read: check its permissions");
      plan = std::as_bytes(std::span(read));
    }
    // Such a plan contains host code, which TensorRT loads only if allowed. The plan's hash was checked.
    if (info.version_compatible) runtime_->setEngineHostCodeAllowed(true);
    engine_.reset(runtime_->deserializeCudaEngine(plan.data(), plan.size()));
    if (!engine_) {
      throw Error(ErrorCode::runtime, description_ + " cannot load " + info.name + ": " + logger_.last() +
                                          ": export again on this machine, or load an engine of onnxruntime");
    }
    check_ports(source.file.path);
  }

  std::unique_ptr<Runner> runner() const override {
    cuda_.check(cuda_.cudaSetDevice(device_), "device", ErrorCode::device);
    return std::make_unique<TensorRTRunner>(cuda_, logger_, *engine_, metadata_, device_);
  }

  const std::string& description() const noexcept override { return description_; }

 private:
  // Must run before any virtual call: the table of virtual functions differs between versions.
  void check_version(const EngineInfo& info) {
    const auto version = reinterpret_cast<int (*)()>(library_.symbol("getInferLibVersion"))();
    const auto here = version_text(version);
    description_ = (info.target == "tensorrt-rtx" ? "TensorRT-RTX " : "TensorRT ") + here;
    if (info.target == "tensorrt" && version / 10000 != NV_TENSORRT_MAJOR) {
      throw Error(ErrorCode::backend_version, library_.path() + " is " + description_ + ", this library was built for " +
                                                  std::to_string(NV_TENSORRT_MAJOR) +
                                                  ": install that, or build this library for yours");
    }
    if (!info.version_compatible && !(info.built_by + ".").starts_with(here + ".")) {
      throw Error(ErrorCode::backend_version, library_.path() + " is " + description_ + ", " + info.name +
                                                  " was built by " + info.built_by +
                                                  ": install that version, or export again");
    }
  }

  void check_device(const EngineInfo& info) const {
    int count = 0;
    cuda_.check(cuda_.cudaGetDeviceCount(&count), "no device", ErrorCode::device);
    if (device_ < 0 || device_ >= count) {
      throw Error(ErrorCode::device, "CUDA device " + std::to_string(device_) +
                                         " does not exist, number of devices: " + std::to_string(count) +
                                         ": set Options::device; the first device is 0");
    }
    const auto here = capability_of(cuda_, device_);
    const auto& built = info.compute_capabilities;
    if (!info.hardware_compatible && std::find(built.begin(), built.end(), here) == built.end()) {
      std::string listed;
      for (const auto& capability : built) listed += (listed.empty() ? "" : ", ") + capability;
      throw Error(ErrorCode::device, info.name + " was built for compute capability " + listed + ", this GPU has " +
                                         here + ": export again for it");
    }
    cuda_.check(cuda_.cudaSetDevice(device_), "device", ErrorCode::device);
  }

  // Buffers have the manifest's sizes, so the plan must match it. Dimensions that a plan leaves open (-1) are compared
  // when a shape is set.
  void check_ports(const std::filesystem::path& path) const {
    const auto same = [&](const Port& port, nvinfer1::TensorIOMode mode) {
      const auto* name = port.name.c_str();
      if (engine_->getTensorIOMode(name) != mode || engine_->getTensorDataType(name) != nvinfer1::DataType::kFLOAT) {
        return false;
      }
      const auto shape = engine_->getTensorShape(name);
      if (shape.nbDims != static_cast<int>(port.shape.size())) return false;
      const bool open = mode == nvinfer1::TensorIOMode::kOUTPUT;
      return std::equal(shape.d + 1, shape.d + shape.nbDims, port.shape.begin() + 1,
                        [&](std::int64_t here, std::int64_t wanted) { return here == wanted || (open && here == -1); });
    };
    const auto& further = metadata_.further_outputs;
    const auto output = [&](const Port& port) { return same(port, nvinfer1::TensorIOMode::kOUTPUT); };
    if (static_cast<std::size_t>(engine_->getNbIOTensors()) != 2 + further.size() ||
        !same(metadata_.input, nvinfer1::TensorIOMode::kINPUT) || !output(metadata_.output) ||
        !std::all_of(further.begin(), further.end(), output)) {
      throw Error(ErrorCode::bundle, path.string() +
                                         ": its input and output are not those of the manifest: export the bundle again");
    }
  }

  Metadata metadata_;
  int device_;
  Library library_;
  Cuda cuda_;
  Logger logger_;
  std::string description_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;  // after the runtime, so that it is destroyed first
};

}  // namespace

std::optional<std::string> compute_capability(const Options& options) {
  try {
    return capability_of(Cuda(), options.device);
  } catch (const Error&) {  // no CUDA here, or no such device
    return std::nullopt;
  }
}

std::unique_ptr<Backend> open_tensorrt(const EngineSource& plan, const EngineInfo& info,
                                       const Metadata& metadata, const Options& options) {
  return std::make_unique<TensorRTBackend>(plan, info, metadata, options);
}

}  // namespace export_zoo::detail
