// A program with an ONNX Runtime of its own, of another version than the library's. Neither may use the other's table of
// functions, which ONNX Runtime's C++ API keeps in a global: beside BUNDLE.

#include <cstddef>
#include <iostream>
#include <vector>

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

#include <export_zoo/engine.hpp>

int main(int, char** argv) {
  static const OrtApi own{};  // to call one of its functions is to crash
  Ort::InitApi(&own);
  const auto engine = export_zoo::Engine::load(argv[1]);
  auto context = engine.context();
  const auto& metadata = engine.metadata();
  const std::vector<float> input(
      static_cast<std::size_t>(metadata.input.shape[1] * metadata.size_opt.height * metadata.size_opt.width));
  const auto logits = context.infer(input, 1);
  if (&Ort::GetApi() != &own) {
    std::cerr << "the library replaced the program's own ONNX Runtime\n";
    return 1;
  }
  std::cout << logits.size() << " logits beside another ONNX Runtime\n";
}
