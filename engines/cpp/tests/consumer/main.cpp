#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>

#include <export_zoo/engine.hpp>
#include <export_zoo/postprocess.hpp>
#include <export_zoo/preprocess.hpp>

int main(int argc, char** argv) try {
  if (argc != 3) {
    std::cerr << "usage: classify BUNDLE IMAGE\n";
    return 2;
  }
  const auto engine = export_zoo::Engine::load(argv[1]);  // shared by all threads
  const export_zoo::Preprocessor preprocess(engine.metadata().preprocess);
  auto context = engine.context();  // one per thread

  std::ifstream file(argv[2], std::ios::binary);
  if (!file) {
    std::cerr << argv[2] << ": cannot be read: give a JPEG or PNG file\n";
    return 1;
  }
  const std::vector<char> jpeg((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  std::vector<float> input(preprocess.size());
  preprocess(std::as_bytes(std::span(jpeg)), input);
  const auto logits = context.infer(input, 1);  // valid until the next call

  const auto best = export_zoo::top_k(export_zoo::softmax(logits), 1).front();
  std::cout << "class " << best.index << ", " << 100 * best.score << " %\n";
} catch (const std::exception& error) {  // export_zoo::Error says what is wrong, and what to do
  std::cerr << error.what() << '\n';
  return 1;
}
