// A CUDA runtime and a TensorRT in one library, for machines without a GPU: one device, of compute capability 8.9, whose
// memory is the host's. Any plan gives batch * 1000 + height, over and over; its ports are those of FAKE_INPUT and
// FAKE_OUTPUT, "3x64x64". With FAKE_FURTHER it has a second output, "further", of half more. As NVIDIA's, a graph must not
// be launched after its context was given another shape.

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include <cuda_runtime_api.h>

#include "nothing.hpp"

namespace {

nvinfer1::Dims64 dims_of(const char* variable, std::int64_t batch) {
  nvinfer1::Dims64 dims{1, {batch}};
  const char* text = std::getenv(variable);
  for (std::string rest = text != nullptr ? text : ""; !rest.empty();) {
    std::size_t end = 0;
    dims.d[dims.nbDims++] = std::stoi(rest, &end);
    rest.erase(0, end + 1);
  }
  return dims;
}

bool has_further() { return std::getenv("FAKE_FURTHER") != nullptr; }

using Step = std::function<bool()>;
std::vector<Step> recorded;
bool recording = false;

bool execute(Step step) {
  if (!recording) return step();
  recorded.push_back(std::move(step));
  return true;
}

class Context : public nothing::ExecutionContext, public nvinfer1::IExecutionContext {
 public:
  Context() { nvinfer1::IExecutionContext::mImpl = this; }
  nvinfer1::IExecutionContext* getPImpl() noexcept override { return this; }
  bool setTensorAddress(char const* name, void* data) noexcept override {
    if (std::string(name) == "logits") out_ = static_cast<float*>(data);
    if (std::string(name) == "further") further_ = static_cast<float*>(data);
    return true;
  }
  bool setInputShape(char const*, nvinfer1::Dims const& dims) noexcept override {
    dims_ = dims;
    ++changes_;
    return true;
  }
  nvinfer1::Dims getTensorShape(char const* name) const noexcept override {
    return dims_of(std::string(name) == "further" ? "FAKE_FURTHER" : "FAKE_ROOM", dims_.d[0]);
  }
  bool enqueueV3(cudaStream_t) noexcept override {
    return execute([this, changes = changes_] {
      if (changes != changes_) return false;
      const auto value = static_cast<float>(dims_.d[0] * 1000 + dims_.d[2]);
      fill(out_, "logits", value);
      if (further_ != nullptr) fill(further_, "further", value + 0.5F);
      return true;
    });
  }

 private:
  void fill(float* to, const char* name, float value) const {
    const auto dims = getTensorShape(name);
    std::int64_t values = 1;
    for (int i = 0; i < dims.nbDims; ++i) values *= dims.d[i];
    std::fill_n(to, values, value);
  }

  nvinfer1::Dims dims_{};
  int changes_ = 0;
  float* out_ = nullptr;
  float* further_ = nullptr;
};

class Engine : public nothing::CudaEngine, public nvinfer1::ICudaEngine {
 public:
  Engine() { nvinfer1::ICudaEngine::mImpl = this; }
  nvinfer1::ICudaEngine* getPImpl() noexcept override { return this; }
  nvinfer1::IExecutionContext* createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy) noexcept override {
    return new Context;
  }
  int32_t getNbIOTensors() const noexcept override { return has_further() ? 3 : 2; }
  nvinfer1::TensorIOMode getTensorIOMode(char const* name) const noexcept override {
    const std::string text = name;
    return text == "input" ? nvinfer1::TensorIOMode::kINPUT
           : text == "logits" || (text == "further" && has_further()) ? nvinfer1::TensorIOMode::kOUTPUT
                                                                      : nvinfer1::TensorIOMode::kNONE;
  }
  nvinfer1::DataType getTensorDataType(char const*) const noexcept override { return nvinfer1::DataType::kFLOAT; }
  nvinfer1::Dims getTensorShape(char const* name) const noexcept override {
    const std::string text = name;
    return dims_of(text == "input" ? "FAKE_INPUT" : text == "further" ? "FAKE_FURTHER" : "FAKE_OUTPUT", -1);
  }
};

class Runtime : public nothing::Runtime, public nvinfer1::IRuntime {
 public:
  Runtime() { nvinfer1::IRuntime::mImpl = this; }
  nvinfer1::IRuntime* getPImpl() noexcept override { return this; }
  void setEngineHostCodeAllowed(bool allowed) noexcept override { allowed_ = allowed; }
  nvinfer1::ICudaEngine* deserializeCudaEngine(void const*, std::size_t) noexcept override {
    return allowed_ == (std::getenv("FAKE_HOST_CODE") != nullptr) ? new Engine : nullptr;
  }

 private:
  bool allowed_ = false;
};

}  // namespace

extern "C" {

int fake_launches = 0;

int getInferLibVersion() { return NV_TENSORRT_MAJOR * 10000 + NV_TENSORRT_MINOR * 100; }
void* createInferRuntime_INTERNAL(void*, int) { return static_cast<nvinfer1::IRuntime*>(new Runtime); }

const char* cudaGetErrorString(cudaError_t) { return "a graph of another shape"; }
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 8 : 9;
  return cudaSuccess;
}
cudaError_t cudaMalloc(void** data, std::size_t size) {
  *data = std::malloc(size);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** data, std::size_t size, unsigned int) { return cudaMalloc(data, size); }
cudaError_t cudaFree(void* data) {
  std::free(data);
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* data) { return cudaFree(data); }
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t size, cudaMemcpyKind, cudaStream_t) {
  return execute([=] { return std::memcpy(to, from, size) != nullptr; }) ? cudaSuccess : cudaErrorUnknown;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t*, unsigned int) { return cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  recorded.clear();
  recording = true;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  recording = false;
  *graph = reinterpret_cast<cudaGraph_t>(new std::vector<Step>(recorded));
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = reinterpret_cast<cudaGraphExec_t>(new std::vector<Step>(*reinterpret_cast<std::vector<Step>*>(graph)));
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<std::vector<Step>*>(graph);
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete reinterpret_cast<std::vector<Step>*>(executable);
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t) {
  ++fake_launches;
  for (const auto& step : *reinterpret_cast<std::vector<Step>*>(executable)) {
    if (!step()) return cudaErrorUnknown;
  }
  return cudaSuccess;
}

}  // extern "C"
