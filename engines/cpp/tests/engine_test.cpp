// Engines give Python's logits to the bit, from many threads, and refuse what they cannot do before they try.

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <optional>
#include <thread>

#include <dlfcn.h>

#include <gmock/gmock.h>
#include <nlohmann/json.hpp>

#include <export_zoo/engine.hpp>
#include <export_zoo/log.hpp>
#include <export_zoo/preprocess.hpp>

#include "support.hpp"

namespace {

namespace ez = export_zoo;
namespace fs = std::filesystem;
using support::bundles;
using support::error_of;
using support::kTargets;
using testing::HasSubstr;

class Engine : public support::WithBundles {
 protected:
  // A copy of a bundle that may be damaged.
  fs::path copy(const std::string& model = "resnet18") const {
    const auto to = directory_.path() / (model + ".bundle");
    fs::copy(bundles() / (model + ".bundle"), to, fs::copy_options::recursive);
    return to;
  }

  static void change(const fs::path& bundle, const char* pointer, const nlohmann::json& value) {
    auto document = nlohmann::json::parse(support::read(bundle / "manifest.json"));
    document[nlohmann::json::json_pointer(pointer)] = value;
    support::write(bundle / "manifest.json", document.dump());
  }

  // The second engine, INT8, as one of TensorRT that was verified and never timed: the best of the bundle.
  static void compile(const fs::path& bundle) {
    change(bundle, "/artifacts/engines/1/name", "tensorrt-int8");
    change(bundle, "/artifacts/engines/1/target", "tensorrt");
    change(bundle, "/artifacts/engines/1/latency", nullptr);
    change(bundle, "/artifacts/engines/1/plan",
           {{"version", "11.1.0"}, {"compute_capabilities", {"8.9"}}, {"hardware_compatible", false},
            {"version_compatible", false}, {"refittable", false}, {"strip_weights", false}, {"workspace_mb", nullptr}});
  }

  // A bundle with one engine, FP32, of a target, whose graph is another one.
  fs::path with_graph(const std::string& name, const std::string& target) const {
    fs::remove_all(directory_.path() / "head-logit.bundle");
    const auto bundle = copy("head-logit");
    const auto graph = bundles() / name;
    fs::copy(graph, bundle / "files" / name);
    const nlohmann::json file{
        {"path", "files/" + name}, {"sha256", support::sha256(graph)}, {"size_bytes", fs::file_size(graph)}};
    change(bundle, "/artifacts/engines/0/file", file);
    change(bundle, "/artifacts/engines/0/target", target);
    change(bundle, "/artifacts/engines/0/name", target + "-fp32");
    change(bundle, "/artifacts/engines/0/built_by", {{target, "1"}});
    return bundle;
  }

  // The file of the CPU's latencies that the library keeps, whose directory is made.
  static fs::path latencies_file(const fs::path& bundle) {
    const auto attestation = nlohmann::json::parse(support::read(bundles() / "attestation.json"));
    const auto directory = fs::path(std::getenv("EXPORT_ZOO_CACHE")) / "latencies";
    fs::create_directories(directory);
    return directory / (support::sha256(bundle / "manifest.json").substr(0, 32) + "-" +
                        attestation["instruction_set"].get<std::string>() + "-0.json");
  }

  static std::vector<fs::path> images() {
    std::vector<fs::path> found;
    for (const auto& entry : fs::directory_iterator(bundles() / "images")) found.push_back(entry.path());
    std::sort(found.begin(), found.end());
    return found;
  }

  support::Temporary directory_;
};

class EveryEngine : public Engine, public testing::WithParamInterface<std::tuple<const char*, const char*, const char*>> {};

TEST_P(EveryEngine, GivesTheLogitsOfPythonToTheBit) {
  const auto [model, name, backend] = GetParam();
  ez::Options options;
  options.engine = name;
  const auto engine = ez::Engine::load(bundles() / (std::string(model) + ".bundle"), options);
  EXPECT_EQ(engine.info().name, name);
  EXPECT_THAT(engine.backend(), testing::StartsWith(backend));
  const ez::Preprocessor preprocess(engine.metadata().preprocess);
  const auto files = images();
  std::vector<float> inputs(files.size() * preprocess.size());
  for (std::size_t i = 0; i < files.size(); ++i) {
    const auto bytes = support::read(files[i]);
    preprocess(std::as_bytes(std::span(bytes)), std::span(inputs).subspan(i * preprocess.size(), preprocess.size()));
  }
  EXPECT_EQ(inputs, support::read_npy(bundles() / (std::string(model) + "-inputs.npy")));
  const auto want = support::read_npy(bundles() / (std::string(model) + "-" + name + ".npy"));
  auto context = engine.context();
  for (const std::size_t batch : {4, 1, 8, 3}) {
    std::vector<float> logits;
    for (std::size_t start = 0; start < files.size(); start += batch) {
      const auto count = std::min(batch, files.size() - start);
      const auto part = std::span(inputs).subspan(start * preprocess.size(), count * preprocess.size());
      const auto found = context.infer(part, static_cast<std::int64_t>(count));
      logits.insert(logits.end(), found.begin(), found.end());
    }
    EXPECT_EQ(logits, want) << "batch " << batch;
  }
}

INSTANTIATE_TEST_SUITE_P(OfOnnxRuntime, EveryEngine,
                         testing::Combine(testing::Values("resnet18", "mobilenet_v2", "squeezenet1_1", "Pixels"),
                                          testing::Values("onnxruntime-fp32", "onnxruntime-int8"),
                                          testing::Values("ONNX Runtime 1.")));

#ifdef EXPORT_ZOO_TEST_OPENVINO
INSTANTIATE_TEST_SUITE_P(OfOpenVino, EveryEngine,
                         testing::Combine(testing::Values("mobilenet_v2", "Pixels"),
                                          testing::Values("openvino-fp32", "openvino-int8"),
                                          testing::Values("OpenVINO 20")));
#endif

TEST_F(Engine, TakesTheFastestVerifiedOneUnlessOneIsAskedFor) {
  const auto bundle = copy();
  change(bundle, "/artifacts/engines/1/latency/speedup", 2.5);
  EXPECT_EQ(ez::Engine::load(bundle).info().name, "onnxruntime-int8");
  EXPECT_THAT(ez::Engine::load(bundle).why(),
              testing::MatchesRegex("fastest verified engine that may be loaded here, measured at export, .*x the speed of FP32"));
  ez::Options options;
  options.engine = "onnxruntime-fp32";
  EXPECT_EQ(ez::Engine::load(bundle, options).info().name, "onnxruntime-fp32");
  EXPECT_EQ(ez::Engine::load(bundle, options).why(), "asked for");
  change(bundle, "/artifacts/engines/1/latency/speedup", 0.5);
  EXPECT_EQ(ez::Engine::load(bundle).info().name, "onnxruntime-fp32");
  change(bundle, "/artifacts/engines/0/state", "graph verified");
  EXPECT_EQ(ez::Engine::load(bundle).info().name, "onnxruntime-int8") << "run before fast";
  change(bundle, "/artifacts/engines/1/state", "built");
  EXPECT_EQ(ez::Engine::load(bundle).info().name, "onnxruntime-fp32");
  EXPECT_THAT(ez::Engine::load(bundle).why(), testing::StartsWith("fastest graph verified engine that may be loaded here, "));
  EXPECT_THAT(ez::Engine::load(bundle).why(),
              HasSubstr("; onnxruntime-int8 was left out: built, not graph verified"));
}

// The table that pytest runs, too (tests/engines/test_selection.py). C++ loads what is graph verified unless it is told not to.
TEST_F(Engine, IsChosenAsInPython) {
  using nlohmann::json;
  const std::map<std::string, double> speedups{{"onnxruntime-fp32", 1.0}, {"onnxruntime-int8", 2.0}};
  ::setenv("EXPORT_ZOO_CACHE", (directory_.path() / "cache").c_str(), 1);
  ez::Options options;
  options.least = ez::State::verified;
  for (const auto& given : json::parse(support::read(fs::path(EXPORT_ZOO_TEST_CASES) / "selection.json"))) {
    const auto name = given["case"].get<std::string>();
    const auto bundle = copy();
    auto document = json::parse(support::read(bundle / "manifest.json"));
    for (auto& engine : document["artifacts"]["engines"]) {
      const auto own = engine["name"].get<std::string>();
      engine["latency"]["speedup"] = speedups.at(own);
      const auto changes = given.value("engines", json::object()).value(own, json::object());
      for (const auto& [key, value] : changes.items()) {
        (key == "speedup" ? engine["latency"] : engine)[key] = value;
      }
    }
    support::write(bundle / "manifest.json", document.dump());
    fs::create_directory(bundle / "attestations");
    const auto attestations = given.value("attestations", json::object());
    for (const auto& [number, wanted] : attestations.items()) {
      auto attestation = json::parse(support::read(bundles() / "attestation.json"));
      attestation["machine"] = "a machine";
      attestation["manifest_sha256"] = wanted.value("manifest_sha256", support::sha256(bundle / "manifest.json"));
      if (wanted.contains("instruction_set")) attestation["instruction_set"] = wanted["instruction_set"];
      attestation["emulation"] = wanted.contains("emulated") ? json{{"cpu", wanted["emulated"]}} : json(nullptr);
      for (auto& [engine, gate] : attestation["engines"].items()) {
        gate["ran"] = wanted.value("ran", "engine");
        const auto failed = wanted.value("failed", std::vector<std::string>());
        gate["failures"] = std::count(failed.begin(), failed.end(), engine) ? json::array({"wrong"}) : json::array();
      }
      attestation["latencies"] = json::object();
      const auto speedups_here = wanted.value("speedups", json::object());
      for (const auto& [engine, speedup] : speedups_here.items()) {
        attestation["latencies"][engine] = {{"speedup", speedup}};
      }
      support::write(bundle / "attestations" / (number + ".json"), wanted.value("text", attestation.dump()));
    }
    if (given.contains("kept_ms")) support::write(latencies_file(bundle), json{{"median_ms", given["kept_ms"]}}.dump());
    options.measure = given.value("measure", true);
    const auto engine = ez::Engine::load(bundle, options);
    EXPECT_EQ(engine.info().name, given["chosen"]) << name;
    EXPECT_THAT(engine.why(), HasSubstr(given.value("why", ""))) << name;
    fs::remove_all(bundle);
  }
}

TEST_F(Engine, IsTimedOnceIfNoMachineLikeThisOneTimedIt) {
  using nlohmann::json;
  ::setenv("EXPORT_ZOO_CACHE", (directory_.path() / "cache").c_str(), 1);
  const auto bundle = copy();
  for (const auto* engine : {"0", "1"}) {
    change(bundle, (std::string("/artifacts/engines/") + engine + "/instruction_set").c_str(), "z80");
  }
  const auto file = latencies_file(bundle);
  const auto read = [&] { return json::parse(support::read(file))["median_ms"].get<std::map<std::string, double>>(); };
  ez::Options options;
  options.measure = false;
  EXPECT_THAT(ez::Engine::load(bundle, options).why(), HasSubstr("measured on another instruction set (z80), at export"));
  EXPECT_FALSE(fs::exists(file));
  options.measure = true;
  auto engine = ez::Engine::load(bundle, options);
  auto medians = read();
  ASSERT_EQ(medians.size(), 2U);
  const auto slower = [](const auto& a, const auto& b) { return a.second < b.second; };
  const auto fastest = std::min_element(medians.begin(), medians.end(), slower)->first;
  const auto other = std::max_element(medians.begin(), medians.end(), slower)->first;
  EXPECT_EQ(engine.info().name, fastest);
  EXPECT_THAT(engine.why(), testing::MatchesRegex("fastest verified engine that may be loaded here, measured here, .* images per second"));
  const std::vector<float> input(ez::Preprocessor(engine.metadata().preprocess).size());
  EXPECT_FALSE(engine.context().infer(input, 1).empty());
  // The next load reads the file, and measures what is not in it.
  support::write(file, json{{"median_ms", {{fastest, 9.0}, {other, 3.0}}}}.dump());
  EXPECT_EQ(ez::Engine::load(bundle, options).info().name, other);
  support::write(file, json{{"median_ms", {{fastest, 9.0}}}}.dump());
  (void)ez::Engine::load(bundle, options);
  EXPECT_EQ(read().size(), 2U);
  EXPECT_NE(read()[fastest], 9.0);
  for (const auto* damaged : {"{", "[]", R"({"median_ms": 3})"}) {
    support::write(file, damaged);
    (void)ez::Engine::load(bundle, options);
    EXPECT_EQ(read().size(), 2U) << damaged;
  }
  ::setenv("EXPORT_ZOO_CACHE", (bundle / "manifest.json").c_str(), 1);  // a file: nothing can be kept there
  EXPECT_THAT(ez::Engine::load(bundle, options).why(), HasSubstr("measured here"));
}

// Bundles that earlier versions wrote: tests/cases/bundles, a folder for each version (tests/engines/test_old_bundles.py).
TEST_F(Engine, OfEarlierVersionsGivesItsLogits) {
  for (const auto& entry : fs::directory_iterator(fs::path(EXPORT_ZOO_TEST_CASES) / "bundles")) {
    const auto& bundle = entry.path();
    const auto held = nlohmann::json::parse(support::read(bundle / "manifest.json"))["artifacts"]["held_out"];
    const auto expected = support::read_npy(bundle / held["logits"]["path"].get<std::string>());
    const auto pixels = support::read(bundle / held["inputs"]["path"].get<std::string>());  // uint8 [N, H, W, 3]
    ez::Options options;
    options.engine = "onnxruntime-fp32";
    const auto engine = ez::Engine::load(bundle, options);
    EXPECT_EQ(engine.info().state, ez::State::verified);
    const auto& p = engine.metadata().preprocess;
    const auto area = static_cast<std::size_t>(p.crop_height) * static_cast<std::size_t>(p.crop_width);
    const auto* first = pixels.data() + (pixels.size() - held["count"].get<std::size_t>() * area * 3);
    std::vector<float> input(3 * area);
    for (std::size_t i = 0; i < input.size(); ++i) {
      const auto channel = i / area;
      const auto value = static_cast<unsigned char>(first[i % area * 3 + channel]);
      input[i] = (static_cast<float>(value) / 255 - p.mean.at(channel)) / p.std_dev.at(channel);
    }
    auto context = engine.context();
    const auto logits = context.infer(input, 1);
    for (std::size_t i = 0; i < logits.size(); ++i) EXPECT_NEAR(logits[i], expected[i], 1e-4) << bundle;
    options.engine = "onnxruntime-int8";
    EXPECT_EQ(ez::Engine::load(bundle, options).info().state, ez::State::verified);
  }
}

TEST_F(Engine, OfALaterVersionIsLeftOutAndWhySaysSo) {
  const auto bundle = copy();
  change(bundle, "/artifacts/engines/1/target", "coreml");
  change(bundle, "/artifacts/engines/1/name", "coreml-int8");
  const auto engine = ez::Engine::load(bundle);
  EXPECT_EQ(engine.info().name, "onnxruntime-fp32");
  EXPECT_THAT(engine.why(), HasSubstr("; coreml-int8 was left out: this version does not know it"));
  ez::Options options;
  options.engine = "coreml-int8";
  const auto [code, message] = error_of([&] { static_cast<void>(ez::Engine::load(bundle, options)); });
  EXPECT_EQ(code, ez::ErrorCode::bundle);
  EXPECT_THAT(message, HasSubstr("'coreml-int8' is of a target or precision that this version does not know"));
}

TEST_F(Engine, ThatIsNotVerifiedIsLoadedOnlyWhenAskedFor) {
  const auto bundle = copy();
  for (const auto* pointer : {"/artifacts/engines/0/state", "/artifacts/engines/1/state"}) change(bundle, pointer, "built");
  const auto [code, message] = error_of([&] { static_cast<void>(ez::Engine::load(bundle)); });
  EXPECT_EQ(code, ez::ErrorCode::state);
  EXPECT_THAT(message, HasSubstr("onnxruntime-int8: built, not graph verified"));
  ez::Options options;
  options.least = ez::State::built;
  EXPECT_EQ(ez::Engine::load(bundle, options).info().state, ez::State::built);
}

TEST_F(Engine, OfABundleThatFailedIsLoadedOnlyWhenAskedFor) {
  const auto bundle = copy();
  change(bundle, "/status", "failed");
  EXPECT_EQ(error_of([&] { static_cast<void>(ez::Engine::load(bundle)); }).first, ez::ErrorCode::state);
  ez::Options options;
  options.allow_failed = true;
  EXPECT_NO_THROW(static_cast<void>(ez::Engine::load(bundle, options)));
}

TEST_F(Engine, HasTheStateThatTheNewestAttestationOfAMachineLikeThisOneSays) {
  using nlohmann::json;
  const auto bundle = copy();
  const auto attested = json::parse(support::read(bundles() / "attestation.json"));
  fs::create_directory(bundle / "attestations");
  const auto attest = [&](const char* name, const char* pointer, const json& value) {
    auto document = attested;
    document[json::json_pointer(pointer)] = value;
    support::write(bundle / "attestations" / name, document.dump());
  };
  ez::Options options;
  options.engine = "onnxruntime-int8";
  options.least = ez::State::built;
  const auto state = [&] { return ez::Engine::load(bundle, options).info().state; };
  const json failures{"SQNR 3 dB"};
  attest("1.json", "/engines/onnxruntime-int8/failures", failures);
  EXPECT_EQ(state(), ez::State::built) << "the instruction set is called what Python calls it";
  EXPECT_EQ(ez::Engine::load(bundle).info().name, "onnxruntime-fp32");
  EXPECT_THAT(ez::Engine::load(bundle).why(),
              HasSubstr("; onnxruntime-int8 was left out: built, not graph verified (attestations/1.json: " +
                        attested["machine"].get<std::string>() + ")"));
  attest("2.json", "/status", "ok");
  EXPECT_EQ(state(), ez::State::verified) << "the newest counts";
  for (const auto& [pointer, value] : std::vector<std::pair<const char*, json>>{
           {"/instruction_set", "z80"}, {"/manifest_sha256", "00"}, {"/engines/onnxruntime-int8/ran", "precision graph"},
           {"/engines", json::array()}, {"/schema_version", 2}}) {
    auto document = attested;
    document["engines"]["onnxruntime-int8"]["failures"] = failures;
    document[json::json_pointer(pointer)] = value;
    support::write(bundle / "attestations/3.json", document.dump());
    EXPECT_EQ(state(), ez::State::verified) << pointer << " is none of this bundle, machine or engine";
  }
  const auto deep = "{\"schema_version\":" + std::string(1000000, '[') + std::string(1000000, ']') + "}";
  for (const auto& text : {std::string(), std::string("{"), std::string("null"), std::string("[]"), deep}) {
    support::write(bundle / "attestations/4.json", text);
    EXPECT_EQ(state(), ez::State::verified);
    EXPECT_THAT(ez::Engine::load(bundle, options).why(),
                testing::StartsWith("asked for; attestations/4.json cannot be read, and is not used"));
  }
}

TEST_F(Engine, IsLoweredAndNeverRaisedByAnEmulatedCpu) {
  using nlohmann::json;
  const auto bundle = copy();
  auto document = json::parse(support::read(bundles() / "attestation.json"));
  fs::create_directory(bundle / "attestations");
  ez::Options options;
  options.engine = "onnxruntime-int8";
  options.least = ez::State::built;
  const auto state = [&] { return ez::Engine::load(bundle, options).info().state; };
  const auto attest = [&](const char* name, const json& emulation, const json& failures) {
    document["emulation"] = emulation;
    document["engines"]["onnxruntime-int8"]["failures"] = failures;
    support::write(bundle / "attestations" / name, document.dump());
  };
  const json emulated{{"cpu", "haswell"}};
  const auto failed = json::array({"SQNR 3 dB"});
  attest("2.json", emulated, failed);
  EXPECT_EQ(state(), ez::State::built);
  attest("3.json", json{{"cpu", "nehalem"}}, json::array());
  EXPECT_EQ(state(), ez::State::built) << "another emulated CPU does not hide it";
  attest("4.json", emulated, json::array());
  EXPECT_EQ(state(), ez::State::verified) << "the newest of one CPU counts";
  attest("4.json", json{{"cpu", "nehalem"}}, failed);
  EXPECT_EQ(state(), ez::State::built);
  attest("1.json", nullptr, json::array());
  EXPECT_EQ(state(), ez::State::verified) << "a real machine's goes before a newer one of an emulated CPU";
  attest("1.json", nullptr, failed);
  attest("2.json", emulated, json::array());
  EXPECT_EQ(state(), ez::State::built);
}

// An INT8 engine whose sums are as large as they can be: saturating_bundles.py.
class Int8 : public Engine {
 protected:
  static ez::Engine load(const fs::path& bundle, const char* name) {
    ez::Options options;
    options.engine = name;
    return ez::Engine::load(bundle, options);
  }

  static std::vector<float> logits(const ez::Engine& engine) {
    const auto inputs = support::read_npy(bundles() / "saturating-inputs.npy");
    auto context = engine.context();
    const auto found = context.infer(inputs, 4);
    return {found.begin(), found.end()};
  }

  // The answer of the probe, as shown for an engine that needs the session entry where sums saturate.
  static bool saturates() { return exact(load(bundles() / "saturating.bundle", "onnxruntime-int8")); }

  static bool exact(const ez::Engine& engine) {
    return engine.backend().find(", exact INT8 sums (session.x64quantprecision)") != std::string::npos;
  }

  std::vector<float> want_ = support::read_npy(bundles() / "saturating-exact.npy");
};

TEST_F(Int8, IsExactOnEveryCpu) {
  const auto bundle = copy("saturating");
  EXPECT_EQ(logits(load(bundle, "onnxruntime-int8")), want_) << "a manifest that does not say";
  for (const auto& session : {nlohmann::json(nullptr), nlohmann::json{{"session.x64quantprecision", "1"}}}) {
    change(bundle, "/artifacts/engines/1/saturating_cpu_session", session);
    const auto engine = load(bundle, "onnxruntime-int8");
    EXPECT_EQ(logits(engine), want_) << session;
    EXPECT_EQ(exact(engine), saturates()) << session;
  }
}

TEST_F(Int8, HasTheEntryOnlyWhereItIsWrongWithoutIt) {
  const auto bundle = copy("saturating");
  for (const auto& session : {nlohmann::json::object(), nlohmann::json{{"session.x64quantprecision", "0"}}}) {
    change(bundle, "/artifacts/engines/1/saturating_cpu_session", session);
    const auto engine = load(bundle, "onnxruntime-int8");
    EXPECT_FALSE(exact(engine));
    EXPECT_EQ(logits(engine) != want_, saturates()) << "the probe and a convolution agree";
  }
}

TEST_F(Int8, AloneGetsTheEntry) {
  const auto bundle = copy("saturating");
  change(bundle, "/artifacts/engines/0/saturating_cpu_session", {{"session.x64quantprecision", "1"}});
  EXPECT_FALSE(exact(load(bundle, "onnxruntime-fp32")));
}

TEST_F(Int8, ThatCannotBeExactIsLeftOut) {
  const auto bundle = copy("shared");
  if (!saturates()) {
    EXPECT_EQ(ez::Engine::load(bundle).info().name, "onnxruntime-int8");
    EXPECT_EQ(logits(ez::Engine::load(bundle)), support::read_npy(bundles() / "shared-exact.npy"));
    return;
  }
  const auto engine = ez::Engine::load(bundle);
  EXPECT_EQ(engine.info().name, "onnxruntime-fp32");
  EXPECT_THAT(engine.why(),
              testing::MatchesRegex("fastest verified engine that may be loaded here, measured .*; onnxruntime-int8 was left out: .*"
                                    "share an INT8 tensor: export the bundle again"));
  auto [code, message] = error_of([&] { static_cast<void>(load(bundle, "onnxruntime-int8")); });
  EXPECT_EQ(code, ez::ErrorCode::cpu);
  EXPECT_STREQ(name(code), "cpu");
  EXPECT_THAT(message, HasSubstr((bundle / "files/onnxruntime-int8.onnx").string()));
  EXPECT_THAT(message, HasSubstr("export the bundle again, or load onnxruntime-fp32"));
  change(bundle, "/artifacts/engines/0/state", "built");
  std::tie(code, message) = error_of([&] { static_cast<void>(ez::Engine::load(bundle)); });
  EXPECT_EQ(code, ez::ErrorCode::cpu) << "there is no other";
  EXPECT_THAT(message, HasSubstr("export the bundle again"));
}

TEST_F(Int8, IsLoadedByManyThreadsAtOnce) {
  std::vector<int> wrong(8);
  std::vector<std::thread> threads;
  for (auto& count : wrong) {
    threads.emplace_back([&] { count += logits(load(bundles() / "saturating.bundle", "onnxruntime-int8")) != want_; });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_THAT(wrong, testing::Each(0));
}

TEST_F(Engine, ThatIsNotThereIsRefusedWithThoseThatAre) {
  ez::Options options;
  options.engine = "onnxruntime-fp64";
  const auto [code, message] =
      error_of([&] { static_cast<void>(ez::Engine::load(bundles() / "resnet18.bundle", options)); });
  EXPECT_EQ(code, ez::ErrorCode::bundle);
  EXPECT_THAT(message, HasSubstr("onnxruntime-fp32, onnxruntime-int8"));
}

TEST_F(Engine, OfTensorRTIsNotReplacedByTheCpuInSilence) {
  const auto bundle = copy();
  compile(bundle);
  ez::Options options;
  options.engine = "tensorrt-int8";
  // Built without TensorRT, or without a library or a device here.
  EXPECT_THAT(error_of([&] { static_cast<void>(ez::Engine::load(bundle, options)); }).first,
              testing::AnyOf(ez::ErrorCode::state, ez::ErrorCode::backend_missing, ez::ErrorCode::device));
}

// An environment variable for as long as this lives.
class Variable {
 public:
  Variable(const char* name, const char* value) : name_(name) {
    if (const char* was = std::getenv(name)) was_ = was;
    setenv(name, value, 1);
  }
  Variable(const Variable&) = delete;
  Variable& operator=(const Variable&) = delete;
  ~Variable() { was_ ? setenv(name_, was_->c_str(), 1) : unsetenv(name_); }

 private:
  const char* name_;
  std::optional<std::string> was_;
};

TEST_F(Engine, OfTensorRTIsLeftOutWithoutADevice) {
  const auto bundle = copy();
  compile(bundle);
  const Variable cudart("EXPORT_ZOO_CUDART", "/nowhere/libcudart.so");
  EXPECT_EQ(ez::Engine::load(bundle).info().name, "onnxruntime-fp32");
  EXPECT_THAT(ez::Engine::load(bundle).why(), HasSubstr("; tensorrt-int8 was left out: "));
  change(bundle, "/artifacts/engines/0/state", "built");
  const auto [code, message] = error_of([&] { static_cast<void>(ez::Engine::load(bundle)); });
  EXPECT_EQ(code, ez::ErrorCode::state);
  EXPECT_THAT(message, HasSubstr("tensorrt-int8: "));
}

#ifdef EXPORT_ZOO_TEST_OPENVINO
TEST_F(Engine, OfOpenVinoWithoutItsLibraryIsLeftOut) {
  const auto bundle = copy("mobilenet_v2");
  change(bundle, "/artifacts/engines/3/latency/speedup", 99);
  const auto load = [&](const std::string& engine, const std::string& library) {
    ez::Options options;
    options.engine = engine;
    options.openvino = library;
    return ez::Engine::load(bundle, options);
  };
  const auto error = [&](const std::string& library) {
    return error_of([&] { static_cast<void>(load("openvino-int8", library)); });
  };
  const Variable variable("EXPORT_ZOO_OPENVINO", "/nowhere/libopenvino_c.so");
  auto [code, message] = error("");
  EXPECT_EQ(code, ez::ErrorCode::backend_missing);
  EXPECT_THAT(message, testing::AllOf(HasSubstr("/nowhere/libopenvino_c.so"), HasSubstr("EXPORT_ZOO_OPENVINO")));
  const auto fallback = load("", "");
  EXPECT_THAT(fallback.info().name, testing::StartsWith("onnxruntime-"));
  EXPECT_THAT(fallback.why(), testing::MatchesRegex(".*; openvino-int8( was| and openvino-fp32 were) left out: OpenVINO cannot be loaded.*"));

  std::tie(code, message) = error("libm.so.6");  // a library, but another one
  EXPECT_EQ(code, ez::ErrorCode::backend_version);
  EXPECT_THAT(message, HasSubstr("no symbol ov_get_openvino_version"));
  std::tie(code, message) = error(EXPORT_ZOO_TEST_OLD_OPENVINO);
  EXPECT_EQ(code, ez::ErrorCode::backend_version);
  EXPECT_THAT(message, HasSubstr("OpenVINO 2025.3.0 is too old, 2025.4 or newer is needed"));

  EXPECT_THAT(load("openvino-int8", EXPORT_ZOO_TEST_OPENVINO).backend(), testing::StartsWith("OpenVINO 20")) << "a directory";
  std::tie(code, message) = error("/elsewhere/libopenvino_c.so");
  EXPECT_EQ(code, ez::ErrorCode::backend_version) << "two in one process";
}
#endif

#ifdef EXPORT_ZOO_TEST_TENSORRT  // built with TensorRT: fake_tensorrt.cpp, which is CUDA with one device, too
TEST_F(Engine, OfTensorRTIsTriedFirstAndLeftOutWithoutItsLibrary) {
  const auto bundle = copy();
  compile(bundle);
  const Variable cudart("EXPORT_ZOO_CUDART", EXPORT_ZOO_TEST_TENSORRT);
  const Variable tensorrt("EXPORT_ZOO_TENSORRT", "/nowhere/libnvinfer.so");
  EXPECT_EQ(ez::Engine::load(bundle).info().name, "onnxruntime-fp32");
  EXPECT_THAT(ez::Engine::load(bundle).why(), HasSubstr("; tensorrt-int8 was left out: "));
  ez::Options options;
  options.onnxruntime = "/nowhere/libonnxruntime.so";
  const auto [code, message] = error_of([&] { static_cast<void>(ez::Engine::load(bundle, options)); });
  EXPECT_EQ(code, ez::ErrorCode::backend_missing) << "of the one that was never timed, which comes first";
  EXPECT_THAT(message, testing::MatchesRegex(".*/nowhere/libnvinfer.so.*/nowhere/libonnxruntime.so.*"));
}

TEST_F(Engine, OfTensorRTIsLeftOutOnAnotherGpu) {
  const auto bundle = copy();
  compile(bundle);
  const Variable cudart("EXPORT_ZOO_CUDART", EXPORT_ZOO_TEST_TENSORRT);
  change(bundle, "/artifacts/engines/1/plan/compute_capabilities", {"8.6", "9.0"});
  EXPECT_EQ(ez::Engine::load(bundle).info().name, "onnxruntime-fp32");
  change(bundle, "/artifacts/engines/0/state", "built");
  const auto message = [&] { return error_of([&] { static_cast<void>(ez::Engine::load(bundle)); }).second; };
  EXPECT_THAT(message(), HasSubstr("tensorrt-int8: it was not built for this GPU, of compute capability 8.9"));
  change(bundle, "/artifacts/engines/1/plan/hardware_compatible", true);
  const Variable tensorrt("EXPORT_ZOO_TENSORRT", "/nowhere/libnvinfer.so");
  EXPECT_THAT(message(), HasSubstr("/nowhere/libnvinfer.so")) << "tried";
}

// A bundle whose best engine is that of a TensorRT that is not one.
class FakeTensorRT : public Engine {
 protected:
  FakeTensorRT() {
    compile(bundle_);
    // Uses the faked version, not that of the headers.
    const auto of = reinterpret_cast<int (*)()>(dlsym(library_, "getInferLibVersion"));
    const int version = of();
    change(bundle_, "/artifacts/engines/1/plan/version",
           std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + ".0");
  }

  [[nodiscard]] int launches() const { return *static_cast<int*>(dlsym(library_, "fake_launches")); }

  fs::path bundle_ = copy();
  void* library_ = dlopen(EXPORT_ZOO_TEST_TENSORRT, RTLD_NOW);
  Variable cudart_{"EXPORT_ZOO_CUDART", EXPORT_ZOO_TEST_TENSORRT};
  Variable tensorrt_{"EXPORT_ZOO_TENSORRT", EXPORT_ZOO_TEST_TENSORRT};
  Variable input_{"FAKE_INPUT", "3x64x64"};
  Variable output_{"FAKE_OUTPUT", "1000"};
  Variable room_{"FAKE_ROOM", "1000"};  // what the output is once the batch is known
};

TEST_F(FakeTensorRT, ReplaysAGraphUntilTheShapeChanges) {
  const auto engine = ez::Engine::load(bundle_);
  EXPECT_EQ(engine.info().name, "tensorrt-int8");
  auto context = engine.context();
  const std::vector<float> input(std::size_t{3} * 3 * 64 * 64);
  const auto before = launches();
  for (const std::size_t batch : {1, 1, 1, 2, 1, 1, 3, 3, 3, 1}) {
    const auto values = batch * 3 * 64 * 64;
    const auto found = context.infer(std::span(input).first(values), static_cast<std::int64_t>(batch));
    EXPECT_EQ(found.size(), batch * 1000);
    EXPECT_THAT(found, testing::Each(static_cast<float>(batch * 1000 + 64)));
  }
  EXPECT_EQ(launches() - before, 5) << "from the second run in a row on";
}

TEST_F(FakeTensorRT, IsLoadedFromMemory) {
  const auto manifest = support::read(bundle_ / "manifest.json");
  const std::string path = nlohmann::json::parse(manifest)["artifacts"]["engines"][1]["file"]["path"];
  const auto plan = support::read(bundle_ / path);
  const ez::Files files{{"manifest.json", std::as_bytes(std::span(manifest))}, {path, std::as_bytes(std::span(plan))}};
  EXPECT_EQ(ez::Engine::load(files).info().name, "tensorrt-int8");
}

TEST_F(FakeTensorRT, GivesAllOutputsOrTheFirstOne) {
  const Variable further("FAKE_FURTHER", "3");
  change(bundle_, "/recipe/further_outputs",
         nlohmann::json::array({{{"name", "further"}, {"dtype", "float32"}, {"shape", {"batch", 3}}, {"layout", "NC"},
                                 {"task", "classification"}, {"scores", "logits"}}}));
  ez::Options options;
  options.engine = "tensorrt-int8";
  auto context = ez::Engine::load(bundle_, options).context();
  const std::vector<float> input(std::size_t{2} * 3 * 64 * 64);
  const auto before = launches();
  for (const bool all : {false, true, true, true, false, false, true}) {
    const auto found = all ? context.infer_all(input, 2) : std::vector{context.infer(input, 2)};
    ASSERT_EQ(found.size(), all ? 2U : 1U);
    EXPECT_EQ(found[0].size(), 2000U);
    EXPECT_THAT(found[0], testing::Each(2064.0F));
    if (!all) continue;
    EXPECT_EQ(found[1].size(), 6U);
    EXPECT_THAT(found[1], testing::Each(2064.5F));
  }
  EXPECT_EQ(launches() - before, 3) << "a graph copies what was wanted when it was recorded";
}

TEST_F(FakeTensorRT, WhosePortsAreNotThoseOfTheManifestIsRefused) {
  for (const auto& [variable, value] : std::vector<std::pair<const char*, const char*>>{
           {"FAKE_OUTPUT", "1001"}, {"FAKE_OUTPUT", "1000x1"}, {"FAKE_INPUT", "3x64x65"}, {"FAKE_INPUT", "3x64x-1"}}) {
    const Variable input("FAKE_INPUT", "3x64x64");
    const Variable output("FAKE_OUTPUT", "1000");
    const Variable changed(variable, value);
    const auto [code, message] = error_of([&] { static_cast<void>(ez::Engine::load(bundle_)); });
    EXPECT_EQ(code, ez::ErrorCode::bundle) << variable << ' ' << value;
    EXPECT_THAT(message, HasSubstr("not those of the manifest"));
  }
}

TEST_F(FakeTensorRT, WhoseOutputIsOpenIsComparedWhenAShapeIsSet) {
  const Variable output("FAKE_OUTPUT", "-1");
  auto context = ez::Engine::load(bundle_).context();
  const std::vector<float> input(std::size_t{3} * 64 * 64);
  EXPECT_EQ(context.infer(input, 1).size(), 1000U);
  const Variable room("FAKE_ROOM", "1001");
  auto other = ez::Engine::load(bundle_).context();
  const auto [code, message] = error_of([&] { static_cast<void>(other.infer(input, 1)); });
  EXPECT_EQ(code, ez::ErrorCode::bundle);
  EXPECT_THAT(message, HasSubstr("output logits"));
}

TEST_F(FakeTensorRT, MayRunHostCodeOnlyOfAVersionCompatiblePlan) {
  change(bundle_, "/artifacts/engines/1/plan/version_compatible", true);
  EXPECT_THAT(error_of([&] { static_cast<void>(ez::Engine::load(bundle_)); }).second, HasSubstr("cannot load"));
  const Variable allowed("FAKE_HOST_CODE", "1");
  EXPECT_EQ(ez::Engine::load(bundle_).info().name, "tensorrt-int8");
}
#endif

TEST_F(Engine, WhosePortsAreNotThoseOfTheManifestIsRefused) {
  for (const auto& [pointer, value] : std::vector<std::pair<const char*, nlohmann::json>>{
           {"/recipe/output/shape", {"batch", 999}}, {"/recipe/input/name", "image"}, {"/recipe/output/name", "scores"}}) {
    const auto bundle = copy("mobilenet_v2");
    change(bundle, pointer, value);
    for (const auto& target : kTargets) {
      ez::Options options;
      options.engine = target + "-fp32";
      const auto [code, message] = error_of([&] { static_cast<void>(ez::Engine::load(bundle, options)); });
      EXPECT_EQ(code, ez::ErrorCode::bundle) << target << pointer;
      EXPECT_THAT(message, HasSubstr("not those of the manifest"));
    }
    fs::remove_all(bundle);
  }
}

TEST_F(Engine, WhoseGraphHasAFixedBatchIsRefused) {
  for (const auto& target : kTargets) {
    const auto [code, message] = error_of([&] { static_cast<void>(ez::Engine::load(with_graph("fixed-batch.onnx", target))); });
    EXPECT_EQ(code, ez::ErrorCode::bundle) << target;
    EXPECT_THAT(message, HasSubstr("not those of the manifest"));
  }
}

TEST_F(Engine, WhoseGraphItsRuntimeDoesNotTakeIsRefusedWithTheReason) {
  for (const auto& target : kTargets) {
    const auto [code, message] = error_of([&] { static_cast<void>(ez::Engine::load(with_graph("unknown.onnx", target))); });
    EXPECT_EQ(code, ez::ErrorCode::runtime) << target;
    EXPECT_THAT(message, testing::AllOf(HasSubstr(" cannot load it: "), HasSubstr("NoSuchOperator")));
  }
}

TEST_F(Engine, TakesWeightsOnlyFromFilesOfTheManifest) {
  const auto bundle = copy();
  const auto file = [&](const std::string& name) {
    fs::copy(bundles() / name, bundle / "files" / name);
    return nlohmann::json{{"path", "files/" + name},
                          {"sha256", support::sha256(bundles() / name)},
                          {"size_bytes", fs::file_size(bundles() / name)}};
  };
  const auto weights = file("external.bin");
  change(bundle, "/artifacts/engines/0/file", file("external.onnx"));
  ez::Options options;
  options.engine = "onnxruntime-fp32";
  const auto [code, message] = error_of([&] { static_cast<void>(ez::Engine::load(bundle, options)); });
  EXPECT_EQ(code, ez::ErrorCode::bundle);
  EXPECT_THAT(message, HasSubstr("'external.bin', which the manifest does not list"));
  change(bundle, "/artifacts/engines/0/external_data", nlohmann::json::array({weights}));
  EXPECT_NO_THROW(static_cast<void>(ez::Engine::load(bundle, options)));
}

TEST_F(Engine, RefusesThreadsThatCannotBe) {
  ez::Options options;
  for (const int threads : {-1, 100000}) {
    options.threads = threads;
    EXPECT_THAT(error_of([&] { static_cast<void>(ez::Engine::load(bundles() / "resnet18.bundle", options)); }).second,
                HasSubstr("Options::threads"));
  }
  options.threads = 2;
  for (const int streams : {-1, 0, 513, 2147483647}) {
    options.streams = streams;
    EXPECT_THAT(error_of([&] { static_cast<void>(ez::Engine::load(bundles() / "resnet18.bundle", options)); }).second,
                HasSubstr("Options::streams"));
  }
}

TEST_F(Engine, WhoseFileWasChangedIsRefused) {
  const auto bundle = copy();
  const auto info = nlohmann::json::parse(support::read(bundle / "manifest.json"))["artifacts"]["engines"][1];
  const auto path = bundle / info["file"]["path"].get<std::string>();
  auto bytes = support::read(path);
  bytes[bytes.size() / 2] = static_cast<char>(bytes[bytes.size() / 2] ^ 1);
  support::write(path, {bytes.begin(), bytes.end()});
  ez::Options options;
  options.engine = "onnxruntime-int8";
  auto [code, message] = error_of([&] { static_cast<void>(ez::Engine::load(bundle, options)); });
  EXPECT_EQ(code, ez::ErrorCode::checksum);
  EXPECT_THAT(message, HasSubstr(path.string()));
  fs::remove(path);
  std::tie(code, message) = error_of([&] { static_cast<void>(ez::Engine::load(bundle, options)); });
  EXPECT_EQ(code, ez::ErrorCode::checksum);
  EXPECT_THAT(message, HasSubstr("missing"));
}

TEST_F(Engine, RefusesWrongSizesAndBatchesBeforeItRuns) {
  const auto engine = ez::Engine::load(bundles() / "resnet18.bundle");
  auto context = engine.context();
  const std::vector<float> nine(std::size_t{9} * 3 * 64 * 64);
  const auto infer = [&](std::size_t values, std::int64_t batch) {
    return error_of([&] { static_cast<void>(context.infer(std::span(nine).first(values), batch)); });
  };
  EXPECT_THAT(infer(nine.size(), 9).second, HasSubstr("range 1 to 8"));
  EXPECT_EQ(infer(0, 0).first, ez::ErrorCode::shape);
  EXPECT_EQ(infer(0, -1).first, ez::ErrorCode::shape);
  EXPECT_EQ(infer(0, INT64_MIN).first, ez::ErrorCode::shape);
  EXPECT_EQ(infer(nine.size() / 9, 2).first, ez::ErrorCode::shape);
  EXPECT_EQ(infer(nine.size() / 9 * 2 - 1, 2).first, ez::ErrorCode::shape);
  EXPECT_EQ(context.infer(std::span(nine).first(nine.size() / 9), 1).size(), 1000U) << "usable afterwards";
}

TEST_F(Engine, WithDynamicSizesGivesTheLogitsOfPythonToTheBitAtAnySizeInTheRange) {
  std::vector<std::string> names;
  for (const auto& target : kTargets) names.insert(names.end(), {target + "-fp32", target + "-int8"});
  for (const auto& name : names) {
    ez::Options options;
    options.engine = name;
    const auto engine = ez::Engine::load(bundles() / "dynamic.bundle", options);
    auto context = engine.context();
    for (const auto& [height, width] :
         std::vector<std::pair<std::int64_t, std::int64_t>>{{48, 48}, {61, 79}, {96, 96}, {96, 50}, {64, 64}}) {
      const auto size = std::to_string(height) + "x" + std::to_string(width);
      const auto inputs = support::read_npy(bundles() / ("dynamic-inputs-" + size + ".npy"));
      const auto want = support::read_npy(bundles() / ("dynamic-" + name + "-" + size + ".npy"));
      const auto found = context.infer(inputs, 8, {height, width});
      EXPECT_EQ(std::vector<float>(found.begin(), found.end()), want) << name << ' ' << size;
      const auto one = context.infer(std::span(inputs).first(inputs.size() / 8), 1, {height, width});
      EXPECT_EQ(std::vector<float>(one.begin(), one.end()), std::vector<float>(want.begin(), want.begin() + 1000));
      const ez::Preprocessor preprocess(ez::at_size(engine.metadata().preprocess, {height, width}));
      std::vector<float> image(preprocess.size());
      const auto bytes = support::read(images().front());
      preprocess(std::as_bytes(std::span(bytes)), image);
      EXPECT_EQ(image, std::vector<float>(inputs.begin(), inputs.begin() + static_cast<std::ptrdiff_t>(image.size())));
    }
    const auto at_opt = support::read_npy(bundles() / "dynamic-inputs-64x64.npy");
    const auto logits = context.infer(at_opt, 8);
    EXPECT_EQ(std::vector<float>(logits.begin(), logits.end()),
              support::read_npy(bundles() / ("dynamic-" + name + "-64x64.npy")))
        << "without a size, that of preprocessing";
  }
}

TEST_F(Engine, RefusesSizesOutsideTheRangeBeforeItRuns) {
  const auto engine = ez::Engine::load(bundles() / "dynamic.bundle");
  EXPECT_EQ(engine.metadata().size_min, (ez::InputSize{48, 48}));
  EXPECT_EQ(engine.metadata().size_opt, (ez::InputSize{64, 64}));
  EXPECT_EQ(engine.metadata().size_max, (ez::InputSize{96, 96}));
  auto context = engine.context();
  const std::vector<float> values(std::size_t{3} * 100 * 100);
  for (const auto& [height, width] : std::vector<std::pair<std::int64_t, std::int64_t>>{
           {47, 64}, {64, 97}, {0, 64}, {64, -64}, {INT64_MAX, INT64_MAX}}) {
    const auto count = height > 0 && height <= 100 && width > 0 ? static_cast<std::size_t>(3 * height * width) : 0;
    const auto [code, message] =
        error_of([&] { static_cast<void>(context.infer(std::span(values).first(count), 1, {height, width})); });
    EXPECT_EQ(code, ez::ErrorCode::shape);
    EXPECT_THAT(message, HasSubstr("outside this bundle's range 48x48 to 96x96"));
  }
  EXPECT_THAT(error_of([&] { static_cast<void>(context.infer(std::span(values).first(3 * 64 * 64), 1, {64, 65})); }).second,
              HasSubstr("batch 1 of 64x65 needs 12480"));
  auto fixed = ez::Engine::load(bundles() / "resnet18.bundle").context();
  EXPECT_THAT(error_of([&] { static_cast<void>(fixed.infer(std::span(values).first(3 * 48 * 48), 1, {48, 48})); }).second,
              HasSubstr("range 64x64 to 64x64"));
}

TEST_F(Engine, WhoseGraphIsOfOneSizeIsNoEngineOfADynamicManifest) {
  const auto bundle = copy();
  change(bundle, "/recipe/input/shape", {"batch", 3, "height", "width"});
  change(bundle, "/recipe/input_size", {{"min", {48, 48}}, {"opt", {64, 64}}, {"max", {96, 96}}});
  const auto [code, message] = error_of([&] { static_cast<void>(ez::Engine::load(bundle)); });
  EXPECT_EQ(code, ez::ErrorCode::bundle);
  EXPECT_THAT(message, HasSubstr("not those of the manifest"));
}

TEST_F(Engine, LogsToTheProgram) {
  std::mutex mutex;
  std::vector<std::string> lines;
  ez::set_log([&](ez::Severity severity, std::string_view runtime, std::string_view message) {
    const std::lock_guard lock(mutex);
    lines.push_back((severity == ez::Severity::error ? "error: " : "warning: ") + std::string(runtime) + ": " +
                    std::string(message));
    throw std::runtime_error("dropped");
  });
  const auto bundle = with_graph("unused.onnx", "onnxruntime");
  testing::internal::CaptureStderr();
  static_cast<void>(ez::Engine::load(bundle));
  ez::set_log({});
  EXPECT_THAT(lines, testing::Contains(testing::AllOf(testing::StartsWith("warning: ONNX Runtime: "),
                                                      HasSubstr("unused_weight"))));
  lines.clear();
  static_cast<void>(ez::Engine::load(bundle));
  EXPECT_EQ(testing::internal::GetCapturedStderr(), "") << "warnings are dropped by default";
  EXPECT_THAT(lines, testing::IsEmpty());
}

// Streams, and threads of each.
class Streams : public Engine, public testing::WithParamInterface<std::pair<int, int>> {};

TEST_P(Streams, AreSharedByManyThreadsAndOutlivedByTheirContexts) {
  const auto [streams, threads_of_stream] = GetParam();
  for (const auto& target : kTargets) {
    const std::string model = target == "onnxruntime" ? "resnet18" : "mobilenet_v2";
    ez::Options options;
    options.engine = target + "-int8";
    options.streams = streams;
    options.threads = threads_of_stream;
    const auto inputs = support::read_npy(bundles() / (model + "-inputs.npy"));
    const auto want = support::read_npy(bundles() / (model + "-" + options.engine + ".npy"));
    std::vector<std::thread> threads;
    std::vector<int> wrong(8);
    std::optional engine = ez::Engine::load(bundles() / (model + ".bundle"), options);
    for (std::size_t t = 0; t < wrong.size(); ++t) {
      threads.emplace_back([&, t, context = engine->context()]() mutable {
        const std::size_t size = std::size_t{3} * 64 * 64;
        for (std::size_t i = 0; i < 20; ++i) {
          const auto start = (t + i) % 12;
          const auto count = 1 + i % 4;
          const auto found =
              context.infer(std::span(inputs).subspan(start * size, count * size), static_cast<std::int64_t>(count));
          wrong[t] += !std::equal(found.begin(), found.end(), want.begin() + static_cast<std::ptrdiff_t>(start * 1000));
        }
      });
    }
    engine.reset();
    for (auto& thread : threads) thread.join();
    EXPECT_THAT(wrong, testing::Each(0)) << target;
  }
}

INSTANTIATE_TEST_SUITE_P(OfAllKinds, Streams,
                         testing::Values(std::pair(1, 0), std::pair(2, 1), std::pair(2, 2), std::pair(3, 0)));

}  // namespace
