// Manifests are read in full, and damaged ones refused with what is wrong.

#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <gmock/gmock.h>
#include <nlohmann/json.hpp>

#include <export_zoo/metadata.hpp>
#include <export_zoo/preprocess.hpp>

#include "support.hpp"

namespace {

namespace ez = export_zoo;
using nlohmann::json;
using support::error_of;
using testing::HasSubstr;

class Metadata : public support::WithBundles {
 protected:
  static json manifest() { return json::parse(support::read(support::bundles() / "resnet18.bundle/manifest.json")); }

  // The error of reading a bundle with this manifest.
  std::pair<ez::ErrorCode, std::string> error_with(const std::string& text) const {
    support::write(directory_.path() / "manifest.json", text);
    return error_of([&] { static_cast<void>(ez::read_metadata(directory_.path())); });
  }

  support::Temporary directory_;
};

TEST_F(Metadata, IsWhatTheManifestSays) {
  const auto found = ez::read_metadata(support::bundles() / "resnet18.bundle");
  EXPECT_EQ(found.model, "resnet18");
  EXPECT_TRUE(found.ok);
  EXPECT_EQ(found.input.shape, (std::vector<std::int64_t>{-1, 3, 64, 64}));
  EXPECT_EQ(found.size_min, (ez::InputSize{64, 64})) << "one size";
  EXPECT_EQ(found.size_max, (ez::InputSize{64, 64}));
  EXPECT_EQ(found.output.shape, (std::vector<std::int64_t>{-1, 1000}));
  EXPECT_EQ(found.input.dtype, "float32");
  EXPECT_EQ(found.batch_min, 1);
  EXPECT_EQ(found.batch_opt, 4);
  EXPECT_EQ(found.batch_max, 8);
  EXPECT_TRUE(found.labels.empty()) << "random weights have none";
  EXPECT_EQ(found.preprocess.crop_height, 64);
  EXPECT_EQ(found.preprocess.interpolation, ez::PreprocessOptions::Interpolation::bilinear);
  EXPECT_FLOAT_EQ(found.preprocess.mean[0], 0.485F);
  EXPECT_GE(found.preprocess.pillow, 10);
  ASSERT_EQ(found.engines.size(), 2U);
  EXPECT_EQ(found.engines[1].name, "onnxruntime-int8");
  EXPECT_EQ(found.engines[1].precision, "int8");
  EXPECT_EQ(found.engines[1].state, ez::State::verified);
  EXPECT_GT(found.engines[1].speedup.value_or(0), 0);
  EXPECT_GT(found.engines[1].size_bytes, 1000000U);
}

TEST_F(Metadata, WithoutSizesIsThatOfABundleFromBefore) {
  auto document = manifest();
  document["recipe"].erase("input_size");
  support::write(directory_.path() / "manifest.json", document.dump());
  EXPECT_EQ(ez::read_metadata(directory_.path()).size_max, (ez::InputSize{64, 64}));
}

TEST_F(Metadata, WithSizesThatDoNotBelongTogetherIsRefused) {
  const auto dynamic = json::parse(support::read(support::bundles() / "dynamic.bundle/manifest.json"));
  support::write(directory_.path() / "manifest.json", dynamic.dump());
  EXPECT_EQ(ez::read_metadata(directory_.path()).input.shape, (std::vector<std::int64_t>{-1, 3, -1, -1}));
  for (const auto& [pointer, value] : std::vector<std::pair<const char*, json>>{
           {"/recipe/input_size", nullptr},
           {"/recipe/input_size", "48 to 96"},
           {"/recipe/input_size/min", {48}},
           {"/recipe/input_size/min", {65, 48}},
           {"/recipe/input_size/max", {96, 63}},
           {"/recipe/input_size/max", {96, 65501}},
           {"/recipe/input_size/max", {60000, 60000}},
           {"/recipe/input_size/opt", {64, 65}},
           {"/recipe/input_size/min", {0, 48}},
           {"/recipe/input_size/min", {48.5, 48}},
           {"/recipe/input/shape", {"batch", 3, 64, 64}},
           {"/recipe/input/shape", {"batch", 3, "height", 64}},
           {"/recipe/input/shape", {"batch", "channels", "height", "width"}},
           {"/recipe/output/shape", {"batch", "classes"}},
           {"/recipe/output/shape", {"batch", 10, "height"}},
           {"/recipe/output/shape", {"batch", 10, 5, 5}},
           {"/recipe/output/shape", {"batch", 1000000, "height", "width"}},
           {"/recipe/further_outputs", {{{"name", "aux"}, {"dtype", "float32"}, {"layout", "NC"}, {"shape", {"batch", 5, 5}}}}}}) {
    auto document = dynamic;
    document[json::json_pointer(pointer)] = value;
    EXPECT_EQ(error_with(document.dump()).first, ez::ErrorCode::bundle) << pointer << " " << value;
  }
}

TEST_F(Metadata, SaysWhatTheOutputMeans) {
  const std::map<std::string, std::tuple<std::string, std::string, std::vector<std::int64_t>>> wanted{
      {"head-logit", {"binary", "logits", {-1, 1}}},       {"head-labels", {"multilabel", "probabilities", {-1, 4}}},
      {"head-number", {"regression", "values", {-1}}},     {"head-shares", {"classification", "probabilities", {-1, 4}}},
      {"head-tokens", {"embedding", "values", {-1, 1024, 4}}}, {"Pixels", {"segmentation", "logits", {-1, 5, 64, 64}}}};
  for (const auto& [name, output] : wanted) {
    const auto found = ez::read_metadata(support::bundles() / (name + ".bundle")).output;
    EXPECT_EQ(std::tie(found.task, found.scores, found.shape), output) << name;
  }
  for (const auto& [name, task] : std::map<std::string, std::string>{{"resnet18", "classification"},
                                                                     {"Pixels", "segmentation"}}) {
    auto document = json::parse(support::read(support::bundles() / (name + ".bundle") / "manifest.json"));
    document["recipe"]["output"].erase("task");  // as in bundles of earlier versions
    document["recipe"]["output"].erase("scores");
    support::write(directory_.path() / "manifest.json", document.dump());
    const auto found = ez::read_metadata(directory_.path()).output;
    EXPECT_EQ(found.task, task);
    EXPECT_EQ(found.scores, "logits");
  }
}

TEST_F(Metadata, OfInputsThatAreNotMadeHereSaysSo) {
  const auto gray = ez::read_metadata(support::bundles() / "head-quantities.bundle");
  EXPECT_EQ(gray.preprocess.mean.size(), 1U);
  EXPECT_TRUE(gray.preprocess.squash);
  EXPECT_EQ(ez::Preprocessor(gray.preprocess).size(), std::size_t{64} * 48);
  auto document = manifest();
  for (const auto& [key, value] : std::vector<std::pair<const char*, json>>{{"scale", 65535}, {"mode", "bands"}}) {
    auto changed = document;
    changed["recipe"]["preprocess"][key] = value;
    support::write(directory_.path() / "manifest.json", changed.dump());
    const auto found = ez::read_metadata(directory_.path());
    const auto [code, message] = error_of([&] { ez::Preprocessor{found.preprocess}; });
    EXPECT_EQ(code, ez::ErrorCode::shape);
    EXPECT_THAT(message, HasSubstr("is not decoded in C++, only RGB and L with scale 255"));
  }
  for (const auto& [key, value] : std::vector<std::pair<const char*, json>>{
           {"mode", "L"}, {"mode", "RGBA"}, {"crop_mode", "border"}, {"mode", 3}, {"mean", json::array()}}) {
    auto changed = document;
    changed["recipe"]["preprocess"][key] = value;
    EXPECT_EQ(error_with(changed.dump()).first, ez::ErrorCode::bundle) << key << " " << value;
  }
}

TEST_F(Metadata, OfNoBundleIsRefused) {
  const auto [code, message] = error_of([&] { static_cast<void>(ez::read_metadata(directory_.path())); });
  EXPECT_EQ(code, ez::ErrorCode::bundle);
  EXPECT_THAT(message, HasSubstr(directory_.path().string()));
  EXPECT_THAT(message, HasSubstr("not a bundle ("));
}

TEST_F(Metadata, ThatIsNoJsonIsRefused) {
  for (const std::string text : {"", "{", "[]", "null", "\xff\xfe"}) {
    EXPECT_EQ(error_with(text).first, ez::ErrorCode::bundle) << text;
  }
}

TEST_F(Metadata, OfAnotherVersionIsRefused) {
  auto document = manifest();
  document["schema_version"] = 2;
  const auto [code, message] = error_with(document.dump());
  EXPECT_EQ(code, ez::ErrorCode::bundle);
  EXPECT_THAT(message, HasSubstr("schema version 2"));
}

TEST_F(Metadata, WithoutOrWithAWrongEntryIsRefused) {
  for (const auto* pointer :
       {"/recipe", "/recipe/input/shape", "/recipe/preprocess/mean", "/recipe/batch/max", "/artifacts/engines",
        "/artifacts/engines/0/file/sha256", "/artifacts/engines/0/state", "/status"}) {
    auto document = manifest();
    document[json::json_pointer(pointer)] = json::object({{"surprise", true}});
    EXPECT_EQ(error_with(document.dump()).first, ez::ErrorCode::bundle) << pointer;
    document = manifest();
    const json::json_pointer at(pointer);
    document[at.parent_pointer()].erase(at.back());
    EXPECT_EQ(error_with(document.dump()).first, ez::ErrorCode::bundle) << pointer;
  }
}

TEST_F(Metadata, ThatPointsOutsideTheBundleIsRefused) {
  for (const auto* path : {"/etc/passwd", "../other.onnx", "files/../../other.onnx", ""}) {
    auto document = manifest();
    document["artifacts"]["engines"][0]["file"]["path"] = path;
    const auto [code, message] = error_with(document.dump());
    EXPECT_EQ(code, ez::ErrorCode::bundle);
    EXPECT_THAT(message, HasSubstr("is outside the bundle"));
  }
}

TEST_F(Metadata, ThatIsADirectoryIsRefused) {
  std::filesystem::create_directory(directory_.path() / "manifest.json");
  const auto [code, message] = error_of([&] { static_cast<void>(ez::read_metadata(directory_.path())); });
  EXPECT_EQ(code, ez::ErrorCode::bundle);
  EXPECT_THAT(message, HasSubstr("manifest.json: not a file"));
}

TEST_F(Metadata, ThatIsNestedAMillionDeepIsRefused) {
  const std::string open(1000000, '[');
  EXPECT_THAT(error_with("{\"schema_version\":" + open + std::string(1000000, ']') + "}").second, HasSubstr("too deep"));
}

TEST_F(Metadata, ThatCallsAnEngineMoreThanItsGateDoesIsRefused) {
  const auto found = [&](const char* state, const char* ran, const json& failures) {
    auto document = manifest();
    auto& engine = document["artifacts"]["engines"][1];
    engine["state"] = state;
    engine["gate"]["ran"] = ran;
    engine["gate"]["failures"] = failures;
    return document.dump();
  };
  const json none = json::array();
  const json failed{"top1 3 %"};
  for (const auto& [state, ran, failures, wrong] : std::vector<std::tuple<const char*, const char*, json, const char*>>{
           {"verified", "precision graph", none, "called verified, its gate makes it graph verified"},
           {"verified", "engine", failed, "called verified, its gate makes it built"},
           {"graph verified", "precision graph", failed, "called graph verified, its gate makes it built"},
           {"verified", "nothing", none, "'nothing'"},
           {"built", "engine", nullptr, "failures"}}) {
    const auto [code, message] = error_with(found(state, ran, failures));
    EXPECT_EQ(code, ez::ErrorCode::bundle);
    EXPECT_THAT(message, HasSubstr(wrong));
  }
  for (const auto& [state, ran, failures] : std::vector<std::tuple<const char*, const char*, json>>{
           {"verified", "engine", none}, {"graph verified", "engine", none}, {"built", "precision graph", failed}}) {
    support::write(directory_.path() / "manifest.json", found(state, ran, failures));
    EXPECT_STREQ(name(ez::read_metadata(directory_.path()).engines[1].state), state);
  }
}

TEST_F(Metadata, OfAnEngineThatIsNotWhatItIsCalledIsRefused) {
  for (const auto& [pointer, value, wrong] : std::vector<std::tuple<const char*, json, const char*>>{
           {"/artifacts/engines/1/target", 1, "type must be string"},
           {"/recipe/preprocess/pad", 4, "preprocess has 'pad', which this version does not know"},
           {"/artifacts/engines/1/precision", "fp16", "onnxruntime-int8 is not onnxruntime-fp16"},
           {"/artifacts/engines/1", manifest()["artifacts"]["engines"][0], "onnxruntime-fp32 is there twice"},
           {"/artifacts/engines/1/plan", {{"version", "11.1.0"}}, "TensorRT engines must have a plan"}}) {
    auto document = manifest();
    document[json::json_pointer(pointer)] = value;
    const auto [code, message] = error_with(document.dump());
    EXPECT_EQ(code, ez::ErrorCode::bundle);
    EXPECT_THAT(message, HasSubstr(wrong));
  }
}

TEST_F(Metadata, OfALaterVersionIsReadWithoutWhatIsUnknown) {
  for (const auto* pointer : {"/artifacts/engines/1/target", "/artifacts/engines/1/precision"}) {
    auto document = manifest();
    document[json::json_pointer(pointer)] = "later";
    document["recipe"]["further"] = document["artifacts"]["engines"][0]["further"] = {1, 2};
    support::write(directory_.path() / "manifest.json", document.dump());
    const auto found = ez::read_metadata(directory_.path());
    ASSERT_EQ(found.engines.size(), 1U) << pointer;
    EXPECT_EQ(found.engines[0].name, "onnxruntime-fp32");
    document["artifacts"]["engines"].erase(0);
    const auto [code, message] = error_with(document.dump());
    EXPECT_EQ(code, ez::ErrorCode::bundle);
    EXPECT_THAT(message, HasSubstr("it has no engine that this version knows"));
  }
}

TEST_F(Metadata, SaysTheSessionOfASaturatingCpu) {
  using Entries = std::map<std::string, std::string>;
  for (const auto& [value, want] : std::vector<std::pair<json, std::optional<Entries>>>{
           {{{"session.x64quantprecision", "1"}}, Entries{{"session.x64quantprecision", "1"}}},
           {{{"session.x64quantprecision", "1"}, {"session.other", ""}},
            Entries{{"session.x64quantprecision", "1"}, {"session.other", ""}}},
           {json::object(), Entries{}},
           {nullptr, std::nullopt}}) {
    auto document = manifest();
    document["artifacts"]["engines"][1]["saturating_cpu_session"] = value;
    support::write(directory_.path() / "manifest.json", document.dump());
    EXPECT_EQ(ez::read_metadata(directory_.path()).engines[1].saturating_cpu_session, want) << value;
  }
  auto document = manifest();
  document["artifacts"]["engines"][1].erase("saturating_cpu_session");
  support::write(directory_.path() / "manifest.json", document.dump());
  EXPECT_EQ(ez::read_metadata(directory_.path()).engines[1].saturating_cpu_session, std::nullopt) << "an older bundle";
}

TEST_F(Metadata, WithAWrongSessionOfASaturatingCpuIsRefused) {
  for (const auto& [value, wrong] : std::vector<std::pair<json, const char*>>{
           {"session.x64quantprecision", "not an object"},
           {json::array(), "not an object"},
           {json::array({"session.x64quantprecision", "1"}), "not an object"},
           {true, "not an object"},
           {1, "not an object"},
           {{{"session.x64quantprecision", 1}}, "not a string"},
           {{{"session.x64quantprecision", true}}, "not a string"},
           {{{"session.x64quantprecision", nullptr}}, "not a string"},
           {{{"session.x64quantprecision", {{"value", "1"}}}}, "not a string"},
           {{{"", "1"}}, "the entry ''"},
           {{{"x64quantprecision", "1"}}, "the entry 'x64quantprecision'"},
           {{{"ep.context_enable", "1"}}, "the entry 'ep.context_enable'"},
           {{{"Session.x64quantprecision", "1"}}, "the entry 'Session."},
           {{{"session.x64quantprecision", "1"}, {"optimization.disable_specified_optimizers", "x"}}, "the entry 'opt"},
           {{{"session.collect_node_memory_stats_to_file", "/tmp/x"}}, "the entry 'session.collect"},
           {{{"session.optimized_model_filepath", "/tmp/x"}}, "the entry 'session.opt"}}) {
    for (const int engine : {0, 1}) {
      auto document = manifest();
      document["artifacts"]["engines"][static_cast<std::size_t>(engine)]["saturating_cpu_session"] = value;
      const auto [code, message] = error_with(document.dump());
      EXPECT_EQ(code, ez::ErrorCode::bundle) << value;
      EXPECT_THAT(message, HasSubstr("damaged manifest: "));
      EXPECT_THAT(message, HasSubstr(wrong)) << value;
    }
  }
}

TEST_F(Metadata, WithValuesThatCannotBeIsRefused) {
  const std::vector<std::pair<const char*, json>> changes{
      {"/schema_version", 4294967297},               {"/schema_version", true},
      {"/schema_version", 1.5},                      {"/recipe/preprocess/resize_size", 255.9},
      {"/recipe/preprocess/crop_width", 64 + 4294967296}, {"/recipe/batch/min", true},
      {"/recipe/preprocess/std", {0.2, 0, 0.2}},     {"/recipe/preprocess/mean", {0.1, 0.1, 0.1, 0.1}},
      {"/recipe/versions/pillow", "new"},            {"/recipe/output/shape", {"batch", 4611686018427387904}},
      {"/artifacts/engines", json::array()},         {"/artifacts/engines", json::object()},
      {"/artifacts/engines", nullptr},               {"/artifacts/engines/0/file/size_bytes", -1},
      {"/recipe/input/shape", {"batch", 3, 64, 63}}, {"/recipe/input/shape", {4, 3, 64, 64}},
      {"/recipe/output/shape", {"batch", -5}},       {"/recipe/batch/min", 9},
      {"/recipe/preprocess/crop_height", 0},         {"/recipe/preprocess/interpolation", "lanczos"},
      {"/recipe/input/dtype", "float16"},            {"/artifacts/engines/0/state", "excellent"},
  };
  for (const auto& [pointer, value] : changes) {
    auto document = manifest();
    document[json::json_pointer(pointer)] = value;
    EXPECT_EQ(error_with(document.dump()).first, ez::ErrorCode::bundle) << pointer << " " << value;
  }
}

}  // namespace
