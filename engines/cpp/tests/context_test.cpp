// Contexts: where outputs go, calls that do not wait, cancellation, warm-up, options of sessions, and another bundle while
// threads serve.

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <future>
#include <memory>
#include <thread>
#include <tuple>

#include <gmock/gmock.h>

#include <export_zoo/engine.hpp>
#include <hot_reload.hpp>

#include "support.hpp"

namespace {

namespace ez = export_zoo;
using support::bundles;
using support::error_of;
using support::kTargets;
using testing::HasSubstr;

constexpr std::size_t kImage = std::size_t{3} * 64 * 64;

ez::Engine load(const std::string& model, const std::string& engine, ez::Options options = {}) {
  options.engine = engine;
  return ez::Engine::load(bundles() / (model + ".bundle"), options);
}

std::vector<float> inputs_of(const std::string& model) { return support::read_npy(bundles() / (model + "-inputs.npy")); }

// What Python makes of the first images in an output.
std::vector<float> wanted(const std::string& model, const std::string& engine, std::size_t images, std::size_t output = 0) {
  auto values = support::read_npy(bundles() / (model + "-" + engine + (output > 0 ? "-output1.npy" : ".npy")));
  values.resize(values.size() / 16 * images);
  return values;
}

std::vector<float> copied(std::span<const float> values) { return {values.begin(), values.end()}; }

class Contexts : public support::WithBundles {
 protected:
  // FP32 and INT8 of all targets.
  static std::vector<std::string> engines() {
    std::vector<std::string> names;
    for (const auto& target : kTargets) names.insert(names.end(), {target + "-fp32", target + "-int8"});
    return names;
  }
};

TEST_F(Contexts, GiveAllOutputsOfANetwork) {
  for (const auto& name : engines()) {
    auto context = load("Pixels", name).context();
    const auto inputs = inputs_of("Pixels");
    const auto three = std::span(inputs).first(3 * kImage);
    const auto first = wanted("Pixels", name, 3);
    const auto second = wanted("Pixels", name, 3, 1);
    const auto found = context.infer_all(three, 3);
    ASSERT_EQ(found.size(), 2U);
    EXPECT_EQ(copied(found[0]), first) << name;
    EXPECT_EQ(copied(found[1]), second) << name;

    std::vector<float> pixels(first.size());
    std::vector<float> scores(second.size());
    context.infer_into(std::array{std::span(pixels), std::span(scores)}, three, 3);
    EXPECT_EQ(pixels, first) << name;
    EXPECT_EQ(scores, second) << name;

    // Afterwards, only the first one: the memory that was given before is the caller's again.
    std::fill(pixels.begin(), pixels.end(), -7.0F);
    std::fill(scores.begin(), scores.end(), -7.0F);
    EXPECT_EQ(copied(context.infer(three.first(kImage), 1)), wanted("Pixels", name, 1)) << name;
    EXPECT_THAT(pixels, testing::Each(-7)) << name;
    EXPECT_THAT(scores, testing::Each(-7)) << name;

    const std::array three_outputs{std::span(pixels), std::span(scores), std::span(scores)};
    auto [code, message] = error_of([&] { context.infer_into(three_outputs, three, 3); });
    EXPECT_EQ(code, ez::ErrorCode::shape);
    EXPECT_THAT(message, HasSubstr("memory of 3 outputs was given, the network has 2"));
    const std::array too_short{std::span(pixels), std::span(scores).first(8)};
    std::tie(code, message) = error_of([&] { context.infer_into(too_short, three, 3); });
    EXPECT_EQ(code, ez::ErrorCode::shape);
    EXPECT_THAT(message, HasSubstr("has space for 8 values, batch 3 gives 9"));
    EXPECT_THAT(pixels, testing::Each(-7)) << "nothing is written";
  }
}

TEST_F(Contexts, WriteToTheCallersMemory) {
  for (const auto& name : engines()) {
    auto context = load("mobilenet_v2", name).context();
    const auto inputs = inputs_of("mobilenet_v2");
    const auto want = wanted("mobilenet_v2", name, 3);
    const auto three = std::span(inputs).first(3 * kImage);
    std::vector<float> memory(1 + 3000 + 1, -7);
    // Not where a vector begins: a part of it, such as a row of shared memory.
    const auto logits = std::span(memory).subspan(1, 3000);
    const auto [code, message] = error_of([&] { context.infer_into(logits.first(2999), three, 3); });
    EXPECT_EQ(code, ez::ErrorCode::shape);
    EXPECT_THAT(message, HasSubstr("space for 2999 values, batch 3 gives 3000"));
    EXPECT_THAT(memory, testing::Each(-7));
    context.infer_into(logits, three, 3);
    EXPECT_EQ(copied(logits), want) << name;
    EXPECT_EQ(memory.front(), -7);
    EXPECT_EQ(memory.back(), -7);
  }
}

TEST_F(Contexts, ComputeWithoutTheCallerWaiting) {
  for (const auto& name : engines()) {
    const auto inputs = inputs_of("Pixels");
    const auto first = wanted("Pixels", name, 4);
    const auto second = wanted("Pixels", name, 4, 1);
    ez::Options options;
    options.streams = 2;
    options.threads = 1;
    const auto engine = load("Pixels", name, options);
    std::vector<ez::Context> contexts;
    std::vector<std::vector<float>> pixels(3, std::vector<float>(first.size()));
    std::vector<std::vector<float>> scores(3, std::vector<float>(second.size()));
    std::vector<std::future<void>> ends;
    for (std::size_t i = 0; i < 3; ++i) {
      contexts.push_back(engine.context());
      const std::array outputs{std::span(pixels[i]), std::span(scores[i])};
      ends.push_back(contexts.back().infer_async(outputs, std::span(inputs).first(4 * kImage), 4));
    }
    for (auto& end : ends) end.get();
    EXPECT_THAT(pixels, testing::Each(first)) << name;
    EXPECT_THAT(scores, testing::Each(second)) << name;
  }
}

TEST_F(Contexts, CallTheCallerWhoMayStartTheNextCall) {
  auto context = load("resnet18", "onnxruntime-fp32").context();
  const auto inputs = inputs_of("resnet18");
  std::vector<float> logits(16 * 1000);
  std::promise<void> all;
  std::size_t next = 0;
  ez::Context::Done done = [&](const std::exception_ptr& failure) {
    if (failure) return all.set_exception(failure);
    if (++next == 16) return all.set_value();
    context.infer_async(std::span(logits).subspan(next * 1000, 1000), std::span(inputs).subspan(next * kImage, kImage), 1,
                        done);
  };
  context.infer_async(std::span(logits).first(1000), std::span(inputs).first(kImage), 1, done);
  all.get_future().get();
  EXPECT_EQ(logits, wanted("resnet18", "onnxruntime-fp32", 16));
}

TEST_F(Contexts, TakeOneCallAtATimeAndSayWhatIsWrongAtOnce) {
  auto context = load("resnet18", "onnxruntime-fp32").context();
  const auto inputs = inputs_of("resnet18");
  const auto one = std::span(inputs).first(kImage);
  std::vector<float> logits(1000);
  EXPECT_EQ(error_of([&] { static_cast<void>(context.infer_async(logits, one, 2)); }).first, ez::ErrorCode::shape);
  std::promise<void> go;
  std::promise<void> ended;
  const ez::Context::Done done = [&](const std::exception_ptr&) {
    go.get_future().wait();
    ended.set_value();
  };
  context.infer_async(logits, one, 1, done);
  // Until it has ended, others are refused. It may have ended already.
  try {
    static_cast<void>(context.infer(one, 1));
  } catch (const ez::Error& error) {
    EXPECT_EQ(error.code(), ez::ErrorCode::runtime);
    EXPECT_THAT(error.what(), HasSubstr("has a call that has not ended"));
  }
  go.set_value();
  ended.get_future().wait();
  EXPECT_EQ(copied(context.infer(one, 1)), wanted("resnet18", "onnxruntime-fp32", 1));
}

TEST_F(Contexts, EndACallThatIsCancelledAndGoOn) {
  for (const auto& name : engines()) {
    auto context = load("mobilenet_v2", name).context();
    const auto inputs = inputs_of("mobilenet_v2");
    const auto eight = std::span(inputs).first(8 * kImage);
    const auto want = wanted("mobilenet_v2", name, 8);
    std::vector<float> logits(8000);
    int cancelled = 0;
    context.cancel();  // nothing runs: nothing happens
    EXPECT_EQ(copied(context.infer(eight, 8)), want) << name;
    for (int i = 0; i < 20; ++i) {
      auto end = context.infer_async(logits, eight, 8);
      std::this_thread::sleep_for(std::chrono::microseconds(200 * i));
      context.cancel();
      try {
        end.get();  // it had ended before
        EXPECT_EQ(logits, want) << name;
      } catch (const ez::Error& error) {
        EXPECT_EQ(error.code(), ez::ErrorCode::cancelled) << error.what();
        ++cancelled;
      }
      EXPECT_EQ(copied(context.infer(eight, 8)), want) << name << ": the next call is not cancelled";
    }
    EXPECT_GT(cancelled, 0) << name;
  }
}

TEST_F(Contexts, ThatAreDestroyedWaitForTheirCall) {
  for (const auto& name : engines()) {
    const auto inputs = inputs_of("mobilenet_v2");
    std::vector<float> logits(8000);
    std::atomic<int> calls{0};
    const auto engine = load("mobilenet_v2", name);
    for (int i = 0; i < 10; ++i) {
      auto context = engine.context();
      // Starts calls until one is cancelled.
      ez::Context::Done done = [&](const std::exception_ptr& failure) {
        ++calls;
        if (!failure) context.infer_async(logits, std::span(inputs).first(8 * kImage), 8, done);
      };
      context.infer_async(logits, std::span(inputs).first(8 * kImage), 8, done);
    }
    EXPECT_GE(calls, 10) << name;
  }
}

TEST_F(Contexts, AreWarmedUp) {
  for (const auto& name : engines()) {
    auto context = load("dynamic", name).context();
    context.warm_up(8, {61, 79});
    context.warm_up(1);
    EXPECT_EQ(copied(context.infer(support::read_npy(bundles() / "dynamic-inputs-61x79.npy"), 8, {61, 79})),
              support::read_npy(bundles() / ("dynamic-" + name + "-61x79.npy")));
    EXPECT_EQ(error_of([&] { context.warm_up(9); }).first, ez::ErrorCode::shape);
    EXPECT_EQ(error_of([&] { context.warm_up(0); }).first, ez::ErrorCode::shape);
    EXPECT_EQ(error_of([&] { context.warm_up(1, {47, 64}); }).first, ez::ErrorCode::shape);
    EXPECT_EQ(error_of([&] { context.warm_up(1, {1 << 30, 1 << 30}); }).first, ez::ErrorCode::shape) << "without memory";
  }
}

TEST_F(Contexts, OfSessionsThatNeitherSpinNorKeepMemoryGiveTheSameLogits) {
  ez::Options options;
  options.threads = 2;
  options.onnxruntime_session.spinning = false;
  options.onnxruntime_session.arena = false;
  options.onnxruntime_session.entries = {{"session.set_denormal_as_zero", "0"}};
  for (const std::string name : {"onnxruntime-fp32", "onnxruntime-int8"}) {
    const auto inputs = inputs_of("resnet18");
    auto context = load("resnet18", name, options).context();
    EXPECT_EQ(copied(context.infer(std::span(inputs).first(8 * kImage), 8)), wanted("resnet18", name, 8));
  }
}

TEST_F(Contexts, OfSessionsThatCannotBeAreRefused) {
  ez::Options options;
  options.onnxruntime_session.entries = {{"session.intra_op.allow_spinning", "0"}};
  auto [code, message] = error_of([&] { static_cast<void>(load("resnet18", "onnxruntime-fp32", options)); });
  EXPECT_EQ(code, ez::ErrorCode::runtime);
  EXPECT_THAT(message, HasSubstr("session.intra_op.allow_spinning is set by this library: leave it out, and set"));
  options.onnxruntime_session = {};
  options.onnxruntime_session.providers = {{"NoSuch", {}}};
  std::tie(code, message) = error_of([&] { static_cast<void>(load("resnet18", "onnxruntime-fp32", options)); });
  EXPECT_EQ(code, ez::ErrorCode::backend_missing);
  EXPECT_THAT(message, HasSubstr("NoSuch"));
  EXPECT_THAT(message, testing::MatchesRegex(".*: this ONNX Runtime has .*CPUExecutionProvider.*"));
}

TEST_F(Contexts, OfAnotherProviderAreNotVerified) {
  ez::Options options;
  options.onnxruntime_session.providers = {{"CPU", {}}};  // the one that computes anyway
  const auto engine = load("resnet18", "onnxruntime-fp32", options);
  EXPECT_EQ(engine.info().state, ez::State::graph_verified);
  EXPECT_THAT(engine.backend(), testing::EndsWith(", CPU"));
  const auto inputs = inputs_of("resnet18");
  EXPECT_EQ(copied(engine.context().infer(std::span(inputs).first(kImage), 1)), wanted("resnet18", "onnxruntime-fp32", 1));
  options.least = ez::State::verified;
  EXPECT_EQ(error_of([&] { static_cast<void>(load("resnet18", "onnxruntime-fp32", options)); }).first,
            ez::ErrorCode::state);
}

TEST_F(Contexts, GoToAnotherBundleBetweenTwoBatches) {
  const std::array names{std::string("resnet18"), std::string("mobilenet_v2")};
  std::array<std::vector<float>, 2> want;
  for (std::size_t i = 0; i < 2; ++i) want[i] = wanted(names[i], "onnxruntime-fp32", 1);
  const auto file = support::read(bundles() / "images" / "00-baseline.jpg");
  hot_reload::Served served(load(names[0], "onnxruntime-fp32"));
  std::atomic<bool> stop{false};
  std::array<std::atomic<int>, 3> counts{};  // batches of each bundle, and of none
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&] {
      hot_reload::Worker worker(served);
      while (!stop) {
        auto& [engine, preprocess, context] = worker.serving();
        std::vector<float> input(preprocess.size());
        preprocess(std::as_bytes(std::span(file)), input);
        const auto found = copied(context.infer(input, 1));
        ++counts.at(static_cast<std::size_t>(std::find(want.begin(), want.end(), found) - want.begin()));
      }
    });
  }
  ez::Options options;
  options.engine = "onnxruntime-fp32";
  for (const std::size_t i : {1, 0, 1}) {
    const int before = counts[i];
    served.reload(bundles() / (names[i] + ".bundle"), options);
    EXPECT_THROW(served.reload(bundles() / "no.bundle", options), ez::Error) << "the old one goes on";
    while (counts[i] < before + 6) std::this_thread::yield();  // hangs if threads do not take it
  }
  stop = true;
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(counts[2], 0) << "inputs or logits of the other bundle";
}

}  // namespace
