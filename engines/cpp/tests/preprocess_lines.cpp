// For tests in Python: lines of "PATH RESIZE HEIGHT WIDTH INTERPOLATION PILLOW" from standard input; the input tensor of
// each, mean 0 and deviation 1, as raw float32 to standard output, or a line to standard error and NaN.

#include <array>
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
    options.interpolation = interpolation == "bicubic" ? ez::PreprocessOptions::Interpolation::bicubic
                                                       : ez::PreprocessOptions::Interpolation::bilinear;
    options.std_dev = {1, 1, 1};
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
