#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <export_zoo/visibility.hpp>

namespace export_zoo {

/// How far an engine was compared with eager PyTorch, weakest first.
enum class State {
  built,           ///< never run, or outside its tolerance
  graph_verified,  ///< the graph that it was compiled from was run and compared
  verified,        ///< the engine itself was run and compared
};

[[nodiscard]] EXPORT_ZOO_API const char* name(State state) noexcept;

/// Height and width of an input, in pixels. In calls that run an engine, zeros are Metadata::size_opt.
struct InputSize {
  std::int64_t height = 0;
  std::int64_t width = 0;

  [[nodiscard]] bool operator==(const InputSize&) const = default;
};

/// An input or output. `shape[0]`, the batch, is -1. Dynamic height and width are -1 as well, in the input and in
/// outputs that have them.
struct Port {
  std::string name;
  std::string dtype;   ///< "float32"
  std::string layout;  ///< "NCHW", RGB
  std::vector<std::int64_t> shape;
  /// Outputs: "classification", "binary" (one value), "multilabel", "regression", "embedding" or "segmentation". A later
  /// version may add others. Empty for the input.
  std::string task{};
  /// Outputs: "logits", "probabilities" (the network ends with softmax or sigmoid), or "values". Empty for the input.
  std::string scores{};
};

/// Options of the preprocessing that turns an image into the input: decode, EXIF orientation, RGB or gray, resize of the
/// shorter side (antialiased), centre crop, x / 255, (x - mean) / std, NCHW.
struct PreprocessOptions {
  enum class Interpolation { bilinear, bicubic };

  int resize_size = 0;  ///< shorter side after the resize, in pixels
  int crop_height = 0;
  int crop_width = 0;
  Interpolation interpolation = Interpolation::bilinear;
  /// On the 0..1 scale, one for each channel: three for RGB, one for gray, the luma of RGB as Pillow computes it.
  std::vector<float> mean = std::vector<float>(3);
  std::vector<float> std_dev = std::vector<float>(3);
  bool squash = false;      ///< resize to the proportions of the crop, whatever the image's own
  std::string unsupported;  ///< the reason why Preprocessor cannot make this input; empty if it can
  int pillow = 0;                  ///< major version of the Pillow that preprocessed at export
};

struct EngineInfo {
  std::string name;       ///< "onnxruntime-int8"
  std::string target;     ///< "onnxruntime", "tensorrt", "tensorrt-rtx"
  std::string precision;  ///< "fp32", "fp16", "int8"
  State state = State::built;
  std::uint64_t size_bytes = 0;
  std::string built_by;           ///< version of the library that it was built for; with TensorRT it must be the same
  std::vector<std::string> compute_capabilities;  ///< TensorRT: GPUs that it was built for, such as "8.9"
  bool hardware_compatible = false;               ///< TensorRT: runs on other GPUs, too
  bool version_compatible = false;                ///< TensorRT: runs with later versions, too
  bool has_weights = true;                        ///< TensorRT: false for a plan that must be refitted, in Python
  std::optional<double> speedup;  ///< speedup over FP32, measured at export
  std::string instruction_set;    ///< of the machine that exported and timed it, such as "avx512-vnni"
  /// Session entries of ONNX Runtime that keep an INT8 engine exact on a CPU whose INT8 sums saturate. Empty: the graph
  /// cannot saturate. nullopt: an older bundle without this field; {"session.x64quantprecision": "1"} is used.
  std::optional<std::map<std::string, std::string>> saturating_cpu_session;
};

/// Contents of a bundle, read without loading an engine.
struct Metadata {
  std::string model;  ///< "resnet50"
  bool ok = false;    ///< false: the bundle failed its parity gate and must not be served
  Port input;
  /// The first output, which Context::infer returns: [N], [N, classes], [N, tokens, classes], or for each pixel
  /// [N, classes, height, width].
  Port output;
  std::vector<Port> further_outputs;  ///< of networks with several outputs, which Context::infer_all returns
  std::int64_t batch_min = 1;  ///< verified batch sizes
  std::int64_t batch_opt = 1;
  std::int64_t batch_max = 1;
  InputSize size_min;  ///< verified input sizes; all three are equal unless exported with --dynamic-size
  InputSize size_opt;  ///< size that `preprocess` produces
  InputSize size_max;
  std::vector<std::string> labels;  ///< class names by index; empty if unknown
  PreprocessOptions preprocess;
  std::vector<EngineInfo> engines;
};

/// Files of a bundle in memory, by their paths within it: "manifest.json", "files/resnet50.onnx",
/// "attestations/x.json". The functions that take them do not keep them: the bytes may be freed afterwards.
using Files = std::map<std::string, std::span<const std::byte>>;

/// Reads a bundle's manifest. The states are those at export. Throws Error (bundle).
[[nodiscard]] EXPORT_ZOO_API Metadata read_metadata(const std::filesystem::path& bundle);
[[nodiscard]] EXPORT_ZOO_API Metadata read_metadata(const Files& bundle);

}  // namespace export_zoo
