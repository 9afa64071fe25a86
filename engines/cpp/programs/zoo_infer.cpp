// zoo-infer: runs a bundle on images; gives what their outputs mean, or raw outputs, for shells and tests.

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iomanip>
#include <iostream>
#include <map>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <export_zoo/engine.hpp>
#include <export_zoo/error.hpp>
#include <export_zoo/postprocess.hpp>
#include <export_zoo/preprocess.hpp>
#include <export_zoo/version.h>

#include "prediction.hpp"

namespace {

namespace ez = export_zoo;

constexpr std::uintmax_t kMostBytes = 1 << 30;

struct Arguments {
  std::string bundle;
  std::vector<std::string> images;
  ez::Options options;
  std::size_t top = 5;
  std::int64_t batch = 0;
  std::string logits;
  std::string inputs;
  bool json = false;
};

std::vector<std::byte> read(const std::string& path) {
  std::error_code error;
  if (!std::filesystem::is_regular_file(path, error)) {
    throw ez::Error(ez::ErrorCode::image, "not a file: give a JPEG or PNG");
  }
  const auto size = std::filesystem::file_size(path, error);
  if (error) throw ez::Error(ez::ErrorCode::image, "cannot be read: " + error.message() + ": check its permissions");
  if (size > kMostBytes) throw ez::Error(ez::ErrorCode::image, "larger than 1 GiB: give a JPEG or PNG");
  std::vector<std::byte> bytes(size);
  std::ifstream file(path, std::ios::binary);
  file.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(size));
  if (!file) throw ez::Error(ez::ErrorCode::image, "cannot be read: check its permissions");
  return bytes;
}

// Writes NumPy's .npy format, version 1.0, float32, C order.
void write_npy(const std::string& path, const std::vector<float>& values, const std::vector<std::size_t>& shape) {
  std::string header = "{'descr': '<f4', 'fortran_order': False, 'shape': (";
  for (const auto size : shape) header += std::to_string(size) + ", ";
  header += "), }";
  header.resize((10 + header.size() + 1 + 63) / 64 * 64 - 10 - 1, ' ');
  header += '\n';
  std::ofstream file(path, std::ios::binary);
  file.write("\x93NUMPY\x01\x00", 8);
  file.put(static_cast<char>(header.size() & 0xFF)).put(static_cast<char>(header.size() >> 8));
  file << header;
  file.write(reinterpret_cast<const char*>(values.data()), static_cast<std::streamsize>(values.size() * sizeof(float)));
  file.close();  // writes what is buffered, which may fail
  if (!file) {
    throw ez::Error(ez::ErrorCode::runtime, path + ": cannot be written: check its directory and the free disk space");
  }
}

void print_text(const Arguments& arguments, const nlohmann::json& found) {
  const auto line = [](double probability, const std::string& label) {
    std::cout << "  " << std::fixed << std::setprecision(2) << std::setw(6) << 100 * probability << " %  " << label << '\n';
  };
  if (found.contains("positive")) {
    line(found["probability"], found.value("label", found["positive"] ? "yes" : "no"));
  } else if (found.contains("classes")) {
    for (const auto& entry : found["classes"]) line(entry["probability"], entry["label"]);
  } else {
    const auto values = found.items().begin().value();
    std::cout << " " << std::defaultfloat << std::setprecision(7);
    for (std::size_t i = 0; i < std::min(arguments.top, values.size()); ++i) std::cout << ' ' << values[i].get<float>();
    std::cout << (arguments.top < values.size() ? " ...\n" : "\n");
  }
}

// Prints what each image's output means. With values for each pixel or token, there is nothing to print.
void print(const Arguments& arguments, const ez::Engine& engine, const std::vector<float>& logits) {
  const auto& metadata = engine.metadata();
  const auto count = logits.size() / arguments.images.size();
  auto document = nlohmann::json::array();
  for (std::size_t i = 0; i < arguments.images.size(); ++i) {
    auto entry = nlohmann::json{{"image", arguments.images[i]}};
    if (prediction::is_of_image(metadata.output)) {
      const auto found = prediction::of_image(metadata, std::span(logits).subspan(i * count, count), arguments.top);
      if (!arguments.json) {
        std::cout << arguments.images[i] << '\n';
        print_text(arguments, found);
      }
      entry.update(found);
    }
    document.push_back(std::move(entry));
  }
  if (arguments.json) {
    const auto& info = engine.info();
    std::cout << nlohmann::json{{"engine", info.name}, {"state", name(info.state)}, {"backend", engine.backend()},
                                {"why", engine.why()}, {"images", document}}
                     .dump(1, ' ', false, nlohmann::json::error_handler_t::replace)
              << '\n';
  }
  std::cout.flush();
  if (!std::cout) throw ez::Error(ez::ErrorCode::runtime, "standard output: cannot be written: check what reads it");
}

int run(const Arguments& arguments) {
  const auto engine = ez::Engine::load(arguments.bundle, arguments.options);
  const auto& metadata = engine.metadata();
  if (!prediction::is_of_image(metadata.output) && arguments.logits.empty()) {
    throw ez::Error(ez::ErrorCode::shape, metadata.model + " gives values for each " +
                                              (metadata.output.shape.size() == 3 ? "token" : "pixel") +
                                              ": write them with --logits FILE");
  }
  const ez::Preprocessor preprocess(metadata.preprocess);
  const auto count = arguments.images.size();
  std::vector<float> inputs(count * preprocess.size());
  for (std::size_t i = 0; i < count; ++i) {
    try {
      preprocess(read(arguments.images[i]), std::span(inputs).subspan(i * preprocess.size(), preprocess.size()));
    } catch (const ez::Error& error) {
      throw ez::Error(error.code(), arguments.images[i] + ": " + error.what());
    }
  }
  auto context = engine.context();
  if (arguments.batch > metadata.batch_max) {
    throw ez::Error(ez::ErrorCode::shape, "--batch " + std::to_string(arguments.batch) + ": the bundle takes " +
                                              std::to_string(metadata.batch_min) + " to " +
                                              std::to_string(metadata.batch_max));
  }
  const auto at_once = static_cast<std::size_t>(arguments.batch > 0 ? arguments.batch : metadata.batch_opt);
  std::vector<float> logits;
  for (std::size_t start = 0; start < count; start += at_once) {
    const auto some = std::min(at_once, count - start);
    const auto part = std::span(inputs).subspan(start * preprocess.size(), some * preprocess.size());
    // A batch below the engine's minimum is padded with zeros, whose logits are dropped.
    const auto run = std::max(some, static_cast<std::size_t>(metadata.batch_min));
    std::vector<float> filled;
    if (run > some) {
      filled.assign(part.begin(), part.end());
      filled.resize(run * preprocess.size());
    }
    const auto found = context.infer(run > some ? std::span<const float>(filled) : part, static_cast<std::int64_t>(run));
    logits.insert(logits.end(), found.begin(), found.begin() + static_cast<std::ptrdiff_t>(found.size() / run * some));
  }
  if (!arguments.logits.empty()) {
    std::vector<std::size_t> shape{count};
    for (std::size_t i = 1; i < metadata.output.shape.size(); ++i) {
      // Only height and width can be dynamic.
      const auto side = i == 2 ? metadata.size_opt.height : metadata.size_opt.width;
      shape.push_back(static_cast<std::size_t>(metadata.output.shape[i] != -1 ? metadata.output.shape[i] : side));
    }
    write_npy(arguments.logits, logits, shape);
  }
  if (!arguments.inputs.empty()) {
    const auto& size = metadata.size_opt;
    write_npy(arguments.inputs, inputs,
              {count, preprocess.size() / static_cast<std::size_t>(size.height * size.width),
               static_cast<std::size_t>(size.height), static_cast<std::size_t>(size.width)});
  }
  if (!arguments.json) {  // not to standard output: programs read the classes there
    const auto& info = engine.info();
    std::cerr << "zoo-infer: " << info.name << " (" << name(info.state) << ", " << engine.backend()
              << "): " << engine.why() << '\n';
  }
  print(arguments, engine, logits);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  Arguments arguments;
  CLI::App app("Classify images with an engine of a bundle.", "zoo-infer");
  app.set_version_flag("--version", EXPORT_ZOO_VERSION);
  app.add_option("bundle", arguments.bundle, "Directory that `export-zoo export` wrote")->required();
  app.add_option("images", arguments.images, "JPEG or PNG files")->required();
  app.add_option("--engine", arguments.options.engine, "Name, such as onnxruntime-int8 (default: the fastest)");
  app.add_option("--threads", arguments.options.threads, "Threads of ONNX Runtime and OpenVINO (default: all cores)")
      ->check(CLI::Range(0, 1024));
  app.add_option("--batch", arguments.batch, "Images at once (default: the bundle's optimum)")
      ->check(CLI::Range(1, 1 << 20));
  app.add_option("--top", arguments.top, "Classes or values to print")->check(CLI::Range(1, 1 << 20))->capture_default_str();
  app.add_option("--logits", arguments.logits,
                 "Write raw outputs here, .npy, float32, such as [N, classes] or [N, classes, height, width]");
  app.add_option("--inputs", arguments.inputs, "Write preprocessed inputs here, .npy, float32 [N, 3, H, W]");
  const std::map<std::string, ez::State> states{
      {"built", ez::State::built}, {"graph", ez::State::graph_verified}, {"verified", ez::State::verified}};
  app.add_option("--state", arguments.options.least, "Weakest state to load: built, graph (default) or verified")
      ->transform(CLI::CheckedTransformer(states));
  app.add_option("--openvino", arguments.options.openvino, "libopenvino_c.so to load, or its directory");
  app.add_option("--tensorrt", arguments.options.tensorrt, "libnvinfer or libtensorrt_rtx to load");
  app.add_option("--onnxruntime", arguments.options.onnxruntime, "libonnxruntime.so.1 to load");
  app.add_flag("!--no-measure", arguments.options.measure, "Do not time engines that no machine like this one timed");
  app.add_flag("--json", arguments.json, "Print JSON");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  try {
    return run(arguments);
  } catch (const ez::Error& error) {
    std::cerr << "zoo-infer: " << error.what() << " (" << name(error.code()) << ")\n";
  } catch (const std::exception& error) {
    std::cerr << "zoo-infer: " << error.what() << '\n';
  }
  return 1;
}
