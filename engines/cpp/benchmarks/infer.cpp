// Context::infer beside a bare call of ONNX Runtime's C++ API, in turn, on one engine of a bundle:
//   bench-infer BUNDLE ENGINE FILE BATCH THREADS ROUNDS
// ($EXPORT_ZOO_ONNXRUNTIME says where ONNX Runtime is.) A line per round: microseconds of ours and of the bare call.

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <string>
#include <utility>
#include <vector>

#include <dlfcn.h>

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

#include <export_zoo/engine.hpp>

namespace {

using Clock = std::chrono::steady_clock;

template <typename Call>
double microseconds(const Call& call) {
  const auto start = Clock::now();
  call();
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 7) {
    std::cerr << "usage: bench-infer BUNDLE ENGINE FILE BATCH THREADS ROUNDS\n";
    return 2;
  }
  const std::int64_t batch = std::stoll(argv[4]);
  const int threads = std::stoi(argv[5]);
  const int rounds = std::stoi(argv[6]);

  export_zoo::Options options;
  options.engine = argv[2];
  options.threads = threads;
  const auto engine = export_zoo::Engine::load(argv[1], options);
  auto context = engine.context();
  const auto& shape = engine.metadata().input.shape;
  const std::array<std::int64_t, 4> in_shape{batch, shape[1], shape[2], shape[3]};
  const std::array<std::int64_t, 2> out_shape{batch, engine.metadata().output.shape[1]};
  std::vector<float> input(static_cast<std::size_t>(batch * shape[1] * shape[2] * shape[3]));
  for (std::size_t i = 0; i < input.size(); ++i) input[i] = static_cast<float>(i % 255) / 127.0F - 1.0F;

  void* library = dlopen(std::getenv("EXPORT_ZOO_ONNXRUNTIME"), RTLD_NOW);
  if (library == nullptr) {
    std::cerr << dlerror() << '\n';
    return 1;
  }
  const auto base = reinterpret_cast<const OrtApiBase* (*)()>(dlsym(library, "OrtGetApiBase"))();
  Ort::InitApi(base->GetApi(ORT_API_VERSION));
  const Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "bare");
  Ort::SessionOptions settings;
  settings.SetIntraOpNumThreads(threads);
  // As the library does: two sessions of one process that spin would take each other's cores.
  settings.AddConfigEntry("session.force_spinning_stop", "1");
  constexpr const char* kExactEntry = "session.x64quantprecision";
  if (engine.backend().find(kExactEntry) != std::string::npos) settings.AddConfigEntry(kExactEntry, "1");
  Ort::Session session(env, argv[3], settings);
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  std::vector<float> output(static_cast<std::size_t>(batch * out_shape[1]));
  const auto in = Ort::Value::CreateTensor<float>(memory, input.data(), input.size(), in_shape.data(), in_shape.size());
  auto out = Ort::Value::CreateTensor<float>(memory, output.data(), output.size(), out_shape.data(), out_shape.size());
  const char* in_name = engine.metadata().input.name.c_str();
  const char* out_name = engine.metadata().output.name.c_str();

  const auto bare = [&] { session.Run(Ort::RunOptions{nullptr}, &in_name, &in, 1, &out_name, &out, 1); };
  std::span<const float> logits;
  const auto ours = [&] { logits = context.infer(input, batch); };
  bare();
  ours();
  if (!std::equal(logits.begin(), logits.end(), output.begin())) {
    std::cerr << "the two calls give other logits\n";
    return 1;
  }
  for (int round = 0; round < rounds; ++round) {
    // Whoever runs second finds other caches: each goes first in every other round, after an untimed run of its own.
    double mine = 0;
    double theirs = 0;
    const auto time_mine = [&] { ours(); mine = microseconds(ours); };
    const auto time_theirs = [&] { bare(); theirs = microseconds(bare); };
    if (round % 2 == 0) {
      time_mine();
      time_theirs();
    } else {
      time_theirs();
      time_mine();
    }
    std::cout << mine << ' ' << theirs << '\n';
  }
  return 0;
}
