#include "setup.hpp"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <exception>
#include <iomanip>
#include <optional>
#include <random>
#include <sstream>
#include <thread>
#include <utility>
#include <vector>

#include <export_zoo/preprocess.hpp>

namespace zoo_serve {

namespace {

namespace ez = export_zoo;

constexpr auto kTime = std::chrono::milliseconds(500);  // that each set-up runs
constexpr double kBetter = 1.05;                        // by which another set-up must be faster

std::string counted(int count, const char* what) {
  return std::to_string(count) + ' ' + what + (count == 1 ? "" : "s");
}

std::string rounded(double value) {
  std::ostringstream out;
  out << std::setprecision(3) << value;
  return out.str();
}

std::vector<ez::Context> contexts_of(const ez::Engine& engine, int streams) {
  std::vector<ez::Context> contexts;
  for (int i = 0; i < streams; ++i) contexts.push_back(engine.context());
  return contexts;
}

// Images per second of all contexts together, each in a thread of its own. The first run of each is not timed.
double rate(std::vector<ez::Context>& contexts, const std::vector<float>& images, std::size_t batch) {
  const auto one = [&](ez::Context& context) {
    static_cast<void>(context.infer(images, static_cast<std::int64_t>(batch)));
    const auto start = Clock::now();
    double runs = 0;
    do {
      static_cast<void>(context.infer(images, static_cast<std::int64_t>(batch)));
      ++runs;
    } while (Clock::now() - start < kTime);
    return runs / std::chrono::duration<double>(Clock::now() - start).count();
  };
  std::vector<double> rates(contexts.size());
  std::vector<std::exception_ptr> errors(contexts.size());
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < contexts.size(); ++i) {
    threads.emplace_back([&, i] {
      try {
        rates[i] = one(contexts[i]);
      } catch (...) {
        errors[i] = std::current_exception();
      }
    });
  }
  for (auto& thread : threads) thread.join();
  double sum = 0;
  for (std::size_t i = 0; i < contexts.size(); ++i) {
    if (errors[i]) std::rethrow_exception(errors[i]);
    sum += rates[i] * static_cast<double>(batch);
  }
  return sum;
}

std::vector<float> noise(const ez::Engine& engine, std::size_t batch) {
  std::vector<float> values(batch * ez::Preprocessor(engine.metadata().preprocess).size());
  std::mt19937 random(0);
  std::normal_distribution<float> normal;  // as normalized images have
  for (auto& value : values) value = normal(random);
  return values;
}

}  // namespace

Setup set_up(const std::string& bundle, ez::Options options, int streams, std::size_t batch) {
  const int cores = ez::usable_cores();
  const bool given = streams > 0 || options.threads > 0;
  options.streams = std::max(1, streams);
  auto whole = ez::Engine::load(bundle, options);
  const auto& info = whole.info();
  const auto why = whole.why();
  const bool on_cpu = info.target == "onnxruntime" || info.target == "openvino";
  if (given || !on_cpu || cores == 1 || !options.measure) {
    auto contexts = contexts_of(whole, options.streams);
    const int threads = options.threads > 0 ? options.threads : std::max(1, cores / options.streams);
    auto told = on_cpu ? counted(options.streams, "stream") + " of " + counted(threads, "thread") : std::string("1 stream");
    return {std::move(whole), {std::move(contexts), std::nullopt}, why, std::move(told)};
  }
  options.engine = info.name;
  const auto images = noise(whole, batch);
  auto alone = contexts_of(whole, 1);
  const double all = rate(alone, images, batch);
  std::optional<ez::Engine> best;
  std::vector<ez::Context> contexts;
  double most = kBetter * all;
  int threads_each = cores;
  for (int threads = 1; threads <= cores / 2; threads *= 2) {
    options.threads = threads;
    options.streams = cores / threads;
    const auto engine = ez::Engine::load(bundle, options);
    auto found = contexts_of(engine, options.streams);
    const double images_per_second = rate(found, images, batch);
    if (images_per_second <= most) continue;
    most = images_per_second;
    best = engine;
    contexts = std::move(found);
    threads_each = threads;
  }
  const auto per_second = " images per second at batch " + std::to_string(batch);
  if (!best) {
    return {std::move(whole), {std::move(alone), std::nullopt}, why,
            "1 stream of " + counted(cores, "thread") + ", which is fastest here: " + rounded(all) + per_second};
  }
  auto told = counted(static_cast<int>(contexts.size()), "stream") + " of " + counted(threads_each, "thread") + ": " +
              rounded(most) + per_second + ", 1 of " + std::to_string(cores) + ": " + rounded(all);
  // One image at a time, which clients wait for.
  const auto image = noise(whole, 1);
  std::vector<ez::Context> single;
  single.push_back(std::move(contexts.front()));
  const double on_one = rate(single, image, 1);
  contexts.front() = std::move(single.front());
  const double on_all = rate(alone, image, 1);
  std::optional<ez::Context> one;
  if (on_all > kBetter * on_one) {
    one = std::move(alone.front());
    told += "; a single request takes " + counted(cores, "thread") + ": " + rounded(1e3 / on_all) + " ms, " +
            rounded(1e3 / on_one) + " ms on " + std::to_string(threads_each);
  }
  return {std::move(*best), {std::move(contexts), std::move(one)}, why, std::move(told)};
}

}  // namespace zoo_serve
