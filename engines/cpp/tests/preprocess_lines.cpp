// For tests in Python: lines of "PATH RESIZE HEIGHT WIDTH INTERPOLATION PILLOW CHANNELS CROP_MODE" from standard input;
// the input tensor of each, mean 0 and deviation 1, as raw float32 to standard output, or a line to standard error and NaN.

#include <cmath>
#include <cstddef>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <iterator>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include <export_zoo/error.hpp>
#include <export_zoo/preprocess.hpp>

int main() {
  namespace ez = export_zoo;
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::string path;
    std::string interpolation;
    ez::PreprocessOptions options;
    words >> path >> options.resize_size >> options.crop_height >> options.crop_width >> interpolation >> options.pillow;
    std::size_t channels = 3;
    std::string crop_mode;
    words >> channels >> crop_mode;
    options.squash = crop_mode == "squash";
    options.interpolation = interpolation == "bicubic" ? ez::PreprocessOptions::Interpolation::bicubic
                                                       : ez::PreprocessOptions::Interpolation::bilinear;
    options.mean.assign(channels, 0);
    options.std_dev.assign(channels, 1);
    std::ifstream file(path, std::ios::binary);
    const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    const ez::Preprocessor preprocess(options);
    std::vector<float> out(preprocess.size());
    try {
      preprocess(std::as_bytes(std::span(bytes)), out);
    } catch (const ez::Error& error) {
      std::cerr << path << ": " << error.what() << '\n';
      out[0] = std::numeric_limits<float>::quiet_NaN();
    }
    std::fwrite(out.data(), sizeof(float), out.size(), stdout);
  }
  return 0;
}
