// JPEG bytes to the input tensor, one thread: bench-preprocess BUNDLE ROUNDS JPEG... prints the milliseconds of each
// round over all files.

#include <chrono>
#include <cstddef>
#include <fstream>
#include <iostream>
#include <iterator>
#include <span>
#include <string>
#include <vector>

#include <export_zoo/metadata.hpp>
#include <export_zoo/preprocess.hpp>

int main(int argc, char** argv) {
  if (argc < 4) {
    std::cerr << "usage: bench-preprocess BUNDLE ROUNDS JPEG...\n";
    return 2;
  }
  const export_zoo::Preprocessor preprocess(export_zoo::read_metadata(argv[1]).preprocess);
  const int rounds = std::stoi(argv[2]);
  std::vector<std::vector<char>> files;
  for (int i = 3; i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    files.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  std::vector<float> out(preprocess.size());
  for (int round = 0; round < rounds; ++round) {
    const auto start = std::chrono::steady_clock::now();
    for (const auto& file : files) preprocess(std::as_bytes(std::span(file)), out);
    const std::chrono::duration<double, std::milli> time = std::chrono::steady_clock::now() - start;
    std::cout << time.count() << '\n';
  }
  return 0;
}
