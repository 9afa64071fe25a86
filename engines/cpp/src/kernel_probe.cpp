#include "kernel_probe.hpp"

#include <array>
#include <cstdint>
#include <string>

#include <export_zoo/error.hpp>

namespace export_zoo::detail {

namespace {

constexpr std::int64_t kTerms = 64;
constexpr std::int32_t kExact = kTerms * 255 * 127;

// One MatMulInteger node: y int32 [1, 1] = a uint8 [1, 64] x b int8 [64, 1], all 127. The same bytes as in
// engines/precision/int8/saturation/probe.py. Made with onnx 1.23.2:
//
//   b = helper.make_tensor("b", TensorProto.INT8, [64, 1], bytes([127] * 64), raw=True)
//   node = helper.make_node("MatMulInteger", ["a", "b"], ["y"])
//   inputs = [helper.make_tensor_value_info("a", TensorProto.UINT8, [1, 64])]
//   outputs = [helper.make_tensor_value_info("y", TensorProto.INT32, [1, 1])]
//   graph = helper.make_graph([node], "probe", inputs, outputs, [b])
//   opset = helper.make_opsetid("", 13)
//   helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString()
constexpr std::array<std::uint8_t, 163> kModel{
    0x08, 0x08, 0x3a, 0x98, 0x01, 0x0a, 0x18, 0x0a, 0x01, 0x61, 0x0a, 0x01, 0x62, 0x12, 0x01, 0x79, 0x22, 0x0d, 0x4d,
    0x61, 0x74, 0x4d, 0x75, 0x6c, 0x49, 0x6e, 0x74, 0x65, 0x67, 0x65, 0x72, 0x12, 0x05, 0x70, 0x72, 0x6f, 0x62, 0x65,
    0x2a, 0x4b, 0x08, 0x40, 0x08, 0x01, 0x10, 0x03, 0x42, 0x01, 0x62, 0x4a, 0x40, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f,
    0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f,
    0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f,
    0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f,
    0x7f, 0x5a, 0x13, 0x0a, 0x01, 0x61, 0x12, 0x0e, 0x0a, 0x0c, 0x08, 0x02, 0x12, 0x08, 0x0a, 0x02, 0x08, 0x01, 0x0a,
    0x02, 0x08, 0x40, 0x62, 0x13, 0x0a, 0x01, 0x79, 0x12, 0x0e, 0x0a, 0x0c, 0x08, 0x06, 0x12, 0x08, 0x0a, 0x02, 0x08,
    0x01, 0x0a, 0x02, 0x08, 0x01, 0x42, 0x04, 0x0a, 0x00, 0x10, 0x0d};

// The sum of 64 products of 255 and 127, as computed by ONNX Runtime.
std::int32_t sum(const Ort::Env& env) {
  Ort::SessionOptions options;
  options.SetIntraOpNumThreads(1);  // no threads of its own
  Ort::Session session(env, kModel.data(), kModel.size(), options);
  std::array<std::uint8_t, kTerms> values{};
  values.fill(255);
  const std::array<std::int64_t, 2> shape{1, kTerms};
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const auto input =
      Ort::Value::CreateTensor<std::uint8_t>(memory, values.data(), values.size(), shape.data(), shape.size());
  const char* input_name = "a";
  const char* output_name = "y";
  const auto outputs = session.Run(Ort::RunOptions{nullptr}, &input_name, &input, 1, &output_name, 1);
  return *outputs.front().GetTensorData<std::int32_t>();
}

bool probe(const Ort::Env& env) {
  try {
    return sum(env) != kExact;
  } catch (const Ort::Exception& error) {
    throw Error(ErrorCode::runtime, std::string("ONNX Runtime cannot run one small INT8 product: ") + error.what() +
                                        ": install it again, or load an engine that is not INT8");
  }
}

}  // namespace

bool int8_sums_saturate(const Ort::Env& env) {
  static const bool saturate = probe(env);
  return saturate;
}

}  // namespace export_zoo::detail
