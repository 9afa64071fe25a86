// Bundles in memory give what those in directories give, and are checked as they are.

#include <algorithm>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <nlohmann/json.hpp>

#include <export_zoo/engine.hpp>

#include "support.hpp"

namespace {

namespace ez = export_zoo;
namespace fs = std::filesystem;
using nlohmann::json;
using support::bundles;
using support::error_of;
using testing::HasSubstr;
using testing::StartsWith;

std::string text(const std::vector<char>& bytes) { return {bytes.begin(), bytes.end()}; }

// A bundle's files, which may be damaged.
class Bundle {
 public:
  explicit Bundle(const std::string& model) {
    const auto directory = bundles() / (model + ".bundle");
    for (const auto& entry : fs::recursive_directory_iterator(directory)) {
      if (entry.is_regular_file()) add(entry.path().lexically_relative(directory).generic_string(), entry.path());
    }
  }

  void add(const std::string& name, const fs::path& file) { contents_[name] = support::read(file); }
  void write(const std::string& name, const std::string& content) { contents_[name] = {content.begin(), content.end()}; }
  void remove(const std::string& name) { contents_.erase(name); }
  [[nodiscard]] std::vector<char>& operator[](const std::string& name) { return contents_.at(name); }

  [[nodiscard]] json manifest() const { return json::parse(contents_.at("manifest.json")); }

  void change(const char* pointer, const json& value) {
    auto document = manifest();
    document[json::json_pointer(pointer)] = value;
    write("manifest.json", document.dump());
  }

  // The path of an engine's file.
  [[nodiscard]] std::string engine(std::size_t index) const {
    return manifest()["artifacts"]["engines"][index]["file"]["path"];
  }

  // Gives the first engine another graph, of another target, with weights in a file beside it.
  void replace_graph(const std::string& graph, const std::string& target, const json& external_data) {
    change("/artifacts/engines/0/file", entry(graph));
    change("/artifacts/engines/0/external_data", external_data);
    change("/artifacts/engines/0/target", target);
    change("/artifacts/engines/0/name", target + "-fp32");
    change("/artifacts/engines/0/built_by", {{target, "1"}});
  }

  // A file as the manifest lists it.
  [[nodiscard]] json entry(const std::string& name) const {
    const support::Temporary directory;
    support::write(directory.path() / "file", text(contents_.at(name)));
    return {{"path", name},
            {"sha256", support::sha256(directory.path() / "file")},
            {"size_bytes", contents_.at(name).size()}};
  }

  [[nodiscard]] ez::Files files() const {
    ez::Files found;
    for (const auto& [name, content] : contents_) found.emplace(name, std::as_bytes(std::span(content)));
    return found;
  }

  void save(const fs::path& directory) const {
    for (const auto& [name, content] : contents_) {
      fs::create_directories((directory / name).parent_path());
      support::write(directory / name, text(content));
    }
  }

  // Overwrites the bytes before they are freed: whoever still reads them does not find the old ones by chance.
  void clear() {
    for (auto& [name, content] : contents_) std::fill(content.begin(), content.end(), '\x7f');
    contents_.clear();
  }

 private:
  std::map<std::string, std::vector<char>> contents_;
};

class Memory : public support::WithBundles {
 protected:
  static ez::Options asked_for(const std::string& engine) {
    ez::Options options;
    options.engine = engine;
    return options;
  }

  static std::vector<float> logits(const ez::Engine& engine, const std::string& model) {
    const auto inputs = support::read_npy(bundles() / (model + "-inputs.npy"));
    auto context = engine.context();
    const auto found = context.infer(std::span(inputs).first(std::size_t{4} * 3 * 64 * 64), 4);
    return {found.begin(), found.end()};
  }

  static std::pair<ez::ErrorCode, std::string> error_with(const Bundle& bundle, const std::string& engine = "") {
    return error_of([&] { static_cast<void>(ez::Engine::load(bundle.files(), asked_for(engine))); });
  }

  support::Temporary directory_;
};

class EveryEngineInMemory : public Memory, public testing::WithParamInterface<std::tuple<const char*, const char*>> {};

TEST_P(EveryEngineInMemory, GivesTheLogitsOfTheDirectoryToTheBitAfterTheBytesAreFreed) {
  const auto [model, name] = GetParam();
  auto options = asked_for(name);
  options.threads = 1;
  for (const int streams : {1, 2}) {
    options.streams = streams;
    const auto directory = ez::Engine::load(bundles() / (std::string(model) + ".bundle"), options);
    Bundle bundle(model);
    const auto engine = ez::Engine::load(bundle.files(), options);
    bundle.clear();
    EXPECT_EQ(engine.info().name, name);
    EXPECT_EQ(engine.info().state, directory.info().state);
    EXPECT_EQ(engine.backend(), directory.backend());
    EXPECT_EQ(engine.why(), directory.why());
    EXPECT_EQ(logits(engine, model), logits(directory, model));
  }
}

INSTANTIATE_TEST_SUITE_P(OfOnnxRuntime, EveryEngineInMemory,
                         testing::Combine(testing::Values("resnet18", "mobilenet_v2", "squeezenet1_1", "Pixels"),
                                          testing::Values("onnxruntime-fp32", "onnxruntime-int8")));
#ifdef EXPORT_ZOO_TEST_OPENVINO
INSTANTIATE_TEST_SUITE_P(OfOpenVino, EveryEngineInMemory,
                         testing::Combine(testing::Values("mobilenet_v2", "Pixels"),
                                          testing::Values("openvino-fp32", "openvino-int8")));
#endif

TEST_F(Memory, HasTheMetadataOfTheDirectory) {
  for (const auto* model : {"resnet18", "dynamic", "head-quantities"}) {
    Bundle bundle(model);
    const auto want = ez::read_metadata(bundles() / (std::string(model) + ".bundle"));
    const auto found = ez::read_metadata(bundle.files());
    bundle.clear();
    EXPECT_EQ(found.model, want.model);
    EXPECT_EQ(found.labels, want.labels);
    EXPECT_EQ(found.size_max, want.size_max);
    ASSERT_EQ(found.engines.size(), want.engines.size());
    for (std::size_t i = 0; i < found.engines.size(); ++i) EXPECT_EQ(found.engines[i].name, want.engines[i].name);
  }
}

TEST_F(Memory, WithWeightsInAnotherFileGivesTheSameLogits) {
  Bundle bundle("resnet18");
  bundle.add("files/external.onnx", bundles() / "external.onnx");
  bundle.add("files/external.bin", bundles() / "external.bin");
  bundle.replace_graph("files/external.onnx", "onnxruntime", json::array());
  const auto [code, message] = error_with(bundle, "onnxruntime-fp32");
  EXPECT_EQ(code, ez::ErrorCode::bundle);
  EXPECT_THAT(message, StartsWith("files/external.onnx: has weights in 'external.bin', which the manifest does not list"));
  bundle.change("/artifacts/engines/0/external_data", json::array({bundle.entry("files/external.bin")}));
  auto options = asked_for("onnxruntime-fp32");
  for (const int streams : {1, 2}) {
    options.streams = streams;
    options.threads = 2;  // each stream has a session of its own
    auto copy = bundle;
    const auto engine = ez::Engine::load(copy.files(), options);
    copy.clear();
    const auto directory = ez::Engine::load(bundles() / "resnet18.bundle", options);
    EXPECT_EQ(logits(engine, "resnet18"), logits(directory, "resnet18"));
  }
  bundle["files/external.bin"].back() ^= 1;
  EXPECT_THAT(error_with(bundle, "onnxruntime-fp32").second, StartsWith("files/external.bin: checksum mismatch"));
  bundle.remove("files/external.bin");
  EXPECT_THAT(error_with(bundle, "onnxruntime-fp32").second, StartsWith("files/external.bin: missing"));
}

#ifdef EXPORT_ZOO_TEST_OPENVINO
TEST_F(Memory, LeavesOpenVinoOutIfWeightsAreInAnotherFile) {
  Bundle bundle("resnet18");
  bundle.add("files/external.onnx", bundles() / "external.onnx");
  bundle.add("files/external.bin", bundles() / "external.bin");
  bundle.replace_graph("files/external.onnx", "openvino", json::array({bundle.entry("files/external.bin")}));
  const auto engine = ez::Engine::load(bundle.files());
  EXPECT_EQ(engine.info().name, "onnxruntime-int8");
  const std::string reason = "OpenVINO reads weights in other files from a directory only";
  EXPECT_THAT(engine.why(), HasSubstr("; openvino-fp32 was left out: " + reason));
  const auto [code, message] = error_with(bundle, "openvino-fp32");
  EXPECT_EQ(code, ez::ErrorCode::state);
  EXPECT_THAT(message, StartsWith("the bundle in memory: no engine that may be loaded here: openvino-fp32: " + reason));
  bundle.save(directory_.path());
  EXPECT_NO_THROW(static_cast<void>(ez::Engine::load(directory_.path(), asked_for("openvino-fp32"))));
}
#endif

std::string varint(std::size_t value) {
  std::string bytes;
  for (; value > 0x7F; value >>= 7U) bytes += static_cast<char>((value & 0x7FU) | 0x80U);
  return bytes + static_cast<char>(value);
}

// Fields of protobuf: a message or text, and a number.
std::string field(std::size_t number, const std::string& content) {
  return varint(number << 3U | 2U) + varint(content.size()) + content;
}
std::string field(std::size_t number, std::size_t value) { return varint(number << 3U) + varint(value); }

// An ONNX file: y = yes ? w : w, where w, one float, is a weight of both branches, in external.bin.
std::string graph_with_weights_in_branches() {
  const auto name = [](const char* text) { return std::string(text); };
  const auto output = [&](const char* of) {  // one float
    const auto shape = field(1, field(1, 1));
    return field(12, field(1, name(of)) + field(2, field(1, field(1, 1) + field(2, shape))));
  };
  const auto location = field(13, field(1, name("location")) + field(2, name("external.bin"))) + field(14, 1);
  const auto weight = field(5, field(1, 1) + field(2, 1) + field(8, name("w")) + location);
  const auto branch = [&](const char* of) {
    const auto identity = field(1, field(1, name("w")) + field(2, name("out")) + field(4, name("Identity")));
    return field(5, field(1, name(of)) + field(6, identity + field(2, name(of)) + weight + output("out")) + field(20, 5));
  };
  const auto yes = field(5, field(2, 9) + field(5, 1) + field(8, name("yes")));
  const auto choice = field(1, field(1, name("yes")) + field(2, name("y")) + field(4, name("If")) +
                                   branch("then_branch") + branch("else_branch"));
  return field(1, 9) + field(7, choice + field(2, name("g")) + yes + output("y")) + field(8, field(2, 17));
}

// ONNX Runtime takes only weights of the main graph from memory, and would read these from the working directory.
TEST_F(Memory, ReadsNoWeightsFromTheDisk) {
  Bundle bundle("resnet18");
  bundle.write("files/branches.onnx", graph_with_weights_in_branches());
  bundle.write("files/external.bin", "1234");
  bundle.replace_graph("files/branches.onnx", "onnxruntime", json::array({bundle.entry("files/external.bin")}));
  bundle.save(directory_.path());
  const auto here = fs::current_path();
  fs::current_path(directory_.path() / "files");
  const auto [code, message] = error_with(bundle, "onnxruntime-fp32");
  fs::current_path(here);
  EXPECT_EQ(code, ez::ErrorCode::runtime);
  EXPECT_THAT(message, testing::AllOf(StartsWith("files/branches.onnx: "), HasSubstr(" cannot load it: ")));
  const auto load = [&] { static_cast<void>(ez::Engine::load(directory_.path(), asked_for("onnxruntime-fp32"))); };
  EXPECT_THAT(error_of(load).second, HasSubstr("not those of the manifest")) << "the graph itself can be loaded";
}

TEST_F(Memory, WithOneByteChangedIsRefused) {
  Bundle bundle("resnet18");
  const auto file = bundle.engine(1);
  auto& bytes = bundle[file];
  for (const auto at : {std::size_t{0}, bytes.size() / 2, bytes.size() - 1}) {
    bytes[at] ^= 1;
    const auto [code, message] = error_with(bundle, "onnxruntime-int8");
    EXPECT_EQ(code, ez::ErrorCode::checksum);
    EXPECT_THAT(message, StartsWith(file + ": checksum mismatch"));
    bytes[at] ^= 1;
  }
  bytes.push_back('\0');
  EXPECT_EQ(error_with(bundle, "onnxruntime-int8").first, ez::ErrorCode::checksum) << "a byte too many";
  bytes.clear();
  EXPECT_EQ(error_with(bundle, "onnxruntime-int8").first, ez::ErrorCode::checksum) << "empty";
}

TEST_F(Memory, WithoutAFileIsRefused) {
  Bundle bundle("resnet18");
  const auto file = bundle.engine(1);
  bundle.save(directory_.path());
  bundle.remove(file);
  const auto here = fs::current_path();
  fs::current_path(directory_.path());  // the disk has the file: it is not read
  auto [code, message] = error_with(bundle, "onnxruntime-int8");
  fs::current_path(here);
  EXPECT_EQ(code, ez::ErrorCode::checksum);
  EXPECT_THAT(message, StartsWith(file + ": missing from the bundle"));
  bundle.remove("manifest.json");
  std::tie(code, message) = error_with(bundle);
  EXPECT_EQ(code, ez::ErrorCode::bundle);
  EXPECT_THAT(message, StartsWith("the bundle in memory: not a bundle (no manifest.json among "));
  EXPECT_EQ(error_of([] { static_cast<void>(ez::read_metadata(ez::Files())); }).first, ez::ErrorCode::bundle);
}

TEST_F(Memory, WithADamagedManifestIsRefused) {
  Bundle bundle("resnet18");
  for (const auto& [content, wrong] : std::vector<std::pair<std::string, const char*>>{
           {"", "parse error"},
           {"{", "parse error"},
           {"null", "damaged manifest"},
           {std::string(100000, '['), "too deep"},
           {std::string((8 << 20) + 1, ' '), "too large"}}) {
    bundle.write("manifest.json", content);
    const auto [code, message] = error_of([&] { static_cast<void>(ez::read_metadata(bundle.files())); });
    EXPECT_EQ(code, ez::ErrorCode::bundle);
    EXPECT_THAT(message, testing::AllOf(StartsWith("manifest.json: "), HasSubstr(wrong), HasSubstr(": export ")));
  }
}

TEST_F(Memory, TakesOnlyPathsWithinABundle) {
  for (const std::string path : {"", "/etc/passwd", "../manifest.json", "files/../manifest.json", "./manifest.json",
                                 "files//a.onnx", "files\\a.onnx"}) {
    Bundle bundle("resnet18");
    bundle.write(path, "x");
    const auto [code, message] = error_with(bundle);
    EXPECT_EQ(code, ez::ErrorCode::bundle) << path;
    EXPECT_THAT(message, testing::AllOf(HasSubstr(path + "' is not a path within a bundle"),
                                        HasSubstr("give paths such as manifest.json")));
  }
  Bundle bundle("resnet18");
  bundle.write("files/", "");  // a folder, as in archives
  EXPECT_NO_THROW(static_cast<void>(ez::Engine::load(bundle.files())));
  bundle.change("/artifacts/engines/0/file/path", "../other.onnx");
  EXPECT_THAT(error_with(bundle).second, HasSubstr("is outside the bundle"));
}

TEST_F(Memory, HasTheStateThatItsAttestationsSay) {
  Bundle bundle("resnet18");
  auto attestation = json::parse(support::read(bundles() / "attestation.json"));
  attestation["engines"]["onnxruntime-int8"]["failures"] = {"SQNR 3 dB"};
  bundle.write("attestations/1.json", attestation.dump());
  auto options = asked_for("onnxruntime-int8");
  options.least = ez::State::built;
  const auto state = [&] { return ez::Engine::load(bundle.files(), options).info().state; };
  EXPECT_EQ(state(), ez::State::built);
  EXPECT_THAT(ez::Engine::load(bundle.files()).why(),
              HasSubstr("; onnxruntime-int8 was left out: built, not graph verified (attestations/1.json"));
  attestation["engines"]["onnxruntime-int8"]["failures"] = json::array();
  for (const auto* elsewhere : {"attestations/older/2.json", "attestations/2.txt", "attestations.json", "2.json"}) {
    bundle.write(elsewhere, attestation.dump());
    EXPECT_EQ(state(), ez::State::built) << elsewhere;
  }
  bundle.write("attestations/2.json", attestation.dump());
  EXPECT_EQ(state(), ez::State::verified) << "the newest counts";
  bundle.write("attestations/3.json", "{");
  EXPECT_THAT(ez::Engine::load(bundle.files(), options).why(), HasSubstr("; attestations/3.json cannot be read"));
}

TEST_F(Memory, SharesItsLatenciesWithTheDirectory) {
  const auto cache = directory_.path() / "cache";
  ::setenv("EXPORT_ZOO_CACHE", cache.c_str(), 1);
  Bundle bundle("resnet18");
  for (const auto* pointer : {"/artifacts/engines/0/instruction_set", "/artifacts/engines/1/instruction_set"}) {
    bundle.change(pointer, "z80");
  }
  EXPECT_THAT(ez::Engine::load(bundle.files()).why(), HasSubstr("measured here"));
  ASSERT_EQ(std::distance(fs::directory_iterator(cache / "latencies"), fs::directory_iterator()), 1);
  const auto file = fs::directory_iterator(cache / "latencies")->path();
  const auto kept = support::read(file);
  bundle.save(directory_.path() / "bundle");
  EXPECT_THAT(ez::Engine::load(directory_.path() / "bundle").why(), HasSubstr("measured here"));
  EXPECT_EQ(support::read(file), kept);
  EXPECT_EQ(std::distance(fs::directory_iterator(cache / "latencies"), fs::directory_iterator()), 1);
}

}  // namespace
