// A program with an ONNX Runtime of its own, of another version than the library's. Neither may use the other's table of
// functions, which ONNX Runtime's C++ API keeps in a global: beside BUNDLE GRAPH.

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <iostream>
#include <string>
#include <vector>

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

#include <export_zoo/engine.hpp>

namespace {

std::vector<float> run(Ort::Session& session, std::vector<float>& input, const std::vector<std::int64_t>& shape) {
  const Ort::AllocatorWithDefaultOptions allocator;
  const auto input_name = session.GetInputNameAllocated(0, allocator);
  const auto output_name = session.GetOutputNameAllocated(0, allocator);
  const std::array<const char*, 1> inputs{input_name.get()};
  const std::array<const char*, 1> outputs{output_name.get()};
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  auto tensor = Ort::Value::CreateTensor<float>(memory, input.data(), input.size(), shape.data(), shape.size());
  auto results = session.Run(Ort::RunOptions{nullptr}, inputs.data(), &tensor, 1, outputs.data(), 1);
  const auto count = results.front().GetTensorTypeAndShapeInfo().GetElementCount();
  const auto* values = results.front().GetTensorData<float>();
  return {values, values + count};
}

int check(const std::string& bundle, const std::string& graph) {
  const auto* base = OrtGetApiBase();
  const auto* own = base->GetApi(ORT_API_VERSION);
  Ort::InitApi(own);
  const Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "beside");
  Ort::Session before(env, graph.c_str(), Ort::SessionOptions{});

  const auto engine = export_zoo::Engine::load(bundle);
  auto context = engine.context();
  const auto& metadata = engine.metadata();
  const std::vector<std::int64_t> shape{1, metadata.input.shape[1], metadata.size_opt.height, metadata.size_opt.width};
  std::vector<float> input(static_cast<std::size_t>(shape[1] * shape[2] * shape[3]), 0.5F);
  const auto logits = context.infer(input, 1);

  // The program's own sessions run as before, and new ones are made, while the library's lives and runs.
  Ort::Session after(env, graph.c_str(), Ort::SessionOptions{});
  for (auto* session : {&before, &after}) {
    const auto theirs = run(*session, input, shape);
    const auto again = context.infer(input, 1);
    const bool same = std::equal(logits.begin(), logits.end(), again.begin(), again.end());
    if (&Ort::GetApi() != own || theirs.size() != logits.size() || !same) {
      std::cerr << "the library and the program disturb each other\n";
      return 1;
    }
  }
  std::cout << "ONNX Runtime " << base->GetVersionString() << " beside the library's\n";
  return 0;
}

}  // namespace

int main(int, char** argv) {
  try {
    return check(argv[1], argv[2]);
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
