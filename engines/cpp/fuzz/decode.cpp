// libFuzzer: any bytes are decoded and preprocessed, or refused with an Error.

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include <export_zoo/error.hpp>
#include <export_zoo/preprocess.hpp>

namespace ez = export_zoo;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const std::vector<ez::Preprocessor> preprocessors = [] {
    ez::PreprocessOptions color;
    color.resize_size = 36;
    color.crop_height = 32;
    color.crop_width = 40;
    color.pillow = 13;
    color.std_dev = {1, 1, 1};
    auto gray = color;
    gray.mean = {0};
    gray.std_dev = {1};
    gray.squash = true;
    gray.interpolation = ez::PreprocessOptions::Interpolation::bicubic;
    return std::vector{ez::Preprocessor(color), ez::Preprocessor(gray)};
  }();
  try {
    const auto image = ez::decode(std::as_bytes(std::span(data, size)), 1 << 18);
    for (const auto& preprocess : preprocessors) {
      std::vector<float> out(preprocess.size());
      preprocess(image, out);
    }
  } catch (const ez::Error&) {
  }
  return 0;
}
