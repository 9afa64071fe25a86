// A CUDA runtime for machines without a GPU: it has one device, of compute capability 8.9, and does nothing.

#define EXPORT_ZOO_NOTHING(name) \
  extern "C" int name() { return 0; }

extern "C" const char* cudaGetErrorString(int) { return "none"; }
extern "C" int cudaGetDeviceCount(int* count) {
  *count = 1;
  return 0;
}
extern "C" int cudaDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == 75 ? 8 : 9;  // cudaDevAttrComputeCapabilityMajor
  return 0;
}
EXPORT_ZOO_NOTHING(cudaSetDevice)
EXPORT_ZOO_NOTHING(cudaMalloc)
EXPORT_ZOO_NOTHING(cudaFree)
EXPORT_ZOO_NOTHING(cudaFreeHost)
EXPORT_ZOO_NOTHING(cudaHostAlloc)
EXPORT_ZOO_NOTHING(cudaMemcpyAsync)
EXPORT_ZOO_NOTHING(cudaStreamCreateWithFlags)
EXPORT_ZOO_NOTHING(cudaStreamDestroy)
EXPORT_ZOO_NOTHING(cudaStreamSynchronize)
EXPORT_ZOO_NOTHING(cudaStreamBeginCapture)
EXPORT_ZOO_NOTHING(cudaStreamEndCapture)
EXPORT_ZOO_NOTHING(cudaGraphDestroy)
EXPORT_ZOO_NOTHING(cudaGraphExecDestroy)
EXPORT_ZOO_NOTHING(cudaGraphInstantiate)
EXPORT_ZOO_NOTHING(cudaGraphLaunch)
