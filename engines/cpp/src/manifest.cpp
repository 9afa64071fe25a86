#include "manifest.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <map>
#include <set>
#include <sstream>
#include <string>

#include <nlohmann/json.hpp>

#include <export_zoo/error.hpp>

#include "files.hpp"
#include "targets.hpp"

namespace export_zoo {

namespace {

using nlohmann::json;
namespace fs = std::filesystem;

constexpr int kSchemaVersion = 1;
constexpr std::size_t kMostChannels = 512;
constexpr std::int64_t kMostValues = std::int64_t{1} << 31;  // values of one image
constexpr std::int64_t kMostBatch = 1 << 20;
constexpr std::int64_t kMostSide = 65500;

// Accepts whole numbers only: 255.9 and true would be truncated, and 2^32 + 1 would wrap.
std::int64_t integer(const json& document, const char* key, std::int64_t least,
                     std::int64_t most = std::numeric_limits<std::int64_t>::max()) {
  const auto& value = document.at(key);
  if (!value.is_number_integer() || (value.is_number_unsigned() && value.get<std::uint64_t>() > std::uint64_t(INT64_MAX)) ||
      value.get<std::int64_t>() < least || value.get<std::int64_t>() > most) {
    throw std::invalid_argument(std::string(key) + " is " + value.dump() + ", not a whole number from " +
                                std::to_string(least) + " on");
  }
  return value.get<std::int64_t>();
}

[[noreturn]] void refuse(const fs::path& path, const std::string& why) {
  throw Error(ErrorCode::bundle, path.string() + ": " + why + ": export the bundle again");
}

State parse_state(const std::string& text) {
  if (text == "built") return State::built;
  if (text == "graph verified") return State::graph_verified;
  if (text == "verified") return State::verified;
  throw std::invalid_argument("unknown state '" + text + "'");
}

// The strongest state that an engine's gate supports.
State state_after(const json& gate) {
  const std::string ran = gate.at("ran");
  if (ran != "engine" && ran != "precision graph") throw std::invalid_argument("unknown gate.ran '" + ran + "'");
  const auto& failures = gate.at("failures");
  if (!failures.is_array()) throw std::invalid_argument("the gate's failures are not a list");
  if (!failures.empty()) return State::built;
  return ran == "engine" ? State::verified : State::graph_verified;
}

detail::File parse_file(const json& document) {
  detail::File file{document.at("path"), document.at("sha256"),
                    static_cast<std::uint64_t>(integer(document, "size_bytes", 0))};
  const fs::path path(file.path);
  if (file.path.empty() || path.is_absolute()) throw std::invalid_argument("'" + file.path + "' is outside the bundle");
  for (const auto& part : path) {
    if (part == "..") throw std::invalid_argument("'" + file.path + "' is outside the bundle");
  }
  return file;
}

// [height, width]
InputSize parse_size(const json& document) {
  if (!document.is_array() || document.size() != 2) throw std::invalid_argument("not a valid size: " + document.dump());
  const auto side = [](const json& value) { return integer(json{{"size", value}}, "size", 1, kMostSide); };
  return {side(document[0]), side(document[1])};
}

// Sets the range of input sizes. If the recipe has none, it is the size of preprocess alone.
void parse_sizes(const json& recipe, Metadata& metadata) {
  metadata.size_opt = {metadata.preprocess.crop_height, metadata.preprocess.crop_width};
  metadata.size_min = metadata.size_max = metadata.size_opt;
  const auto& shape = metadata.input.shape;
  const auto found = recipe.find("input_size");
  const bool dynamic = found != recipe.end() && !found->is_null();
  if (dynamic) {
    metadata.size_min = parse_size(found->at("min"));
    metadata.size_max = parse_size(found->at("max"));
  }
  const auto& low = metadata.size_min;
  const auto& opt = metadata.size_opt;
  const auto& high = metadata.size_max;
  const auto wanted = dynamic ? InputSize{-1, -1} : opt;
  const auto logits = [&](const Port& port) {
    const auto& sides = port.shape;
    const bool open = sides.size() == 4 && sides[2] == -1 && sides[3] == -1;
    if (open) return dynamic && sides[1] <= kMostValues / high.height / high.width;
    const auto rank = sides.size();
    const bool fixed = std::all_of(sides.begin() + (rank > 0), sides.end(), [](auto side) { return side > 0; });
    return fixed && (rank == 1 || rank == 2 || (!dynamic && (rank == 3 || rank == 4)));
  };
  if (!logits(metadata.output) ||
      !std::all_of(metadata.further_outputs.begin(), metadata.further_outputs.end(), logits)) {
    throw std::invalid_argument("an output is not [N], [N, classes], [N, tokens, classes] or [N, classes, height, width]");
  }
  if (shape.size() != 4 || shape[1] != static_cast<std::int64_t>(metadata.preprocess.mean.size()) || InputSize{shape[2], shape[3]} != wanted ||
      (dynamic && parse_size(found->at("opt")) != opt) || low.height > opt.height || low.width > opt.width ||
      opt.height > high.height || opt.width > high.width || high.height > kMostValues / shape[1] / high.width) {
    throw std::invalid_argument("shapes of input, input_size and preprocess contradict each other");
  }
}

// `open`: height and width may be -1, too.
Port parse_port(const json& document, bool open) {
  Port port{document.at("name"), document.at("dtype"), document.at("layout"), {}, {}, {}};
  if (port.dtype != "float32") throw std::invalid_argument("dtype " + port.dtype + " instead of float32: " + port.name);
  for (const auto& size : document.at("shape")) {
    if (!size.is_string() && !size.is_number_integer()) throw std::invalid_argument("invalid shape of " + port.name);
    port.shape.push_back(size.is_string() ? -1 : size.get<std::int64_t>());
  }
  std::int64_t values = 1;
  for (std::size_t i = 0; i < port.shape.size(); ++i) {
    if (i == 0 ? port.shape[i] == -1 : open && i > 1 && port.shape[i] == -1) continue;
    if (i == 0 || port.shape[i] < 1 || port.shape[i] > kMostValues / values) {
      throw std::invalid_argument("invalid shape of " + port.name);
    }
    values *= port.shape[i];
  }
  return port;
}

Port parse_output(const json& document) {
  auto port = parse_port(document, true);
  port.task = document.value("task", "");
  // Bundles of earlier versions do not say it.
  if (port.task.empty()) port.task = port.shape.size() == 4 ? "segmentation" : "classification";
  port.scores = document.value("scores", "logits");
  return port;
}

PreprocessOptions parse_preprocess(const json& document, const json& versions) {
  // Elsewhere, keys that a later version adds are ignored. Here they would change logits.
  static const std::set<std::string> known{"resize_size", "crop_height", "crop_width", "interpolation",
                                           "antialias",   "mean",        "std",
                                           "source",      "mode",        "crop_mode",
                                           "scale"};
  for (const auto& [key, value] : document.items()) {
    if (!known.contains(key)) throw std::invalid_argument("preprocess has '" + key + "', which this version does not know");
  }
  PreprocessOptions found;
  found.resize_size = static_cast<int>(integer(document, "resize_size", 1, kMostSide));
  found.crop_height = static_cast<int>(integer(document, "crop_height", 1, kMostSide));
  found.crop_width = static_cast<int>(integer(document, "crop_width", 1, kMostSide));
  const std::string interpolation = document.at("interpolation");
  if (interpolation == "bicubic") {
    found.interpolation = PreprocessOptions::Interpolation::bicubic;
  } else if (interpolation != "bilinear") {
    throw std::invalid_argument("unknown interpolation " + interpolation);
  }
  const std::string mode = document.value("mode", "RGB");
  const double scale = document.value("scale", 255.0);
  const auto channels = document.at("mean").size();
  static const std::map<std::string, std::size_t> wanted{{"RGB", 3}, {"L", 1}, {"RGBA", 4}};
  if (document.at("std").size() != channels || channels < 1 || channels > kMostChannels ||
      (wanted.contains(mode) && wanted.at(mode) != channels)) {
    throw std::invalid_argument("mean and std must have as many values each as there are channels");
  }
  if (scale != 255 || !wanted.contains(mode) || mode == "RGBA") {
    std::ostringstream text;
    text << "mode " << mode << " with scale " << scale << " is not decoded in C++, only RGB and L with scale 255: "
         << "preprocess with Python, or give the input itself to Context::infer";
    found.unsupported = text.str();
  }
  const std::string crop_mode = document.value("crop_mode", "center");
  found.squash = crop_mode == "squash";
  if (!found.squash && crop_mode != "center") throw std::invalid_argument("unknown crop_mode " + crop_mode);
  found.mean.resize(channels);
  found.std_dev.resize(channels);
  for (std::size_t channel = 0; channel < channels; ++channel) {
    // As in NumPy: the decimal is converted to double, then to float.
    found.mean.at(channel) = static_cast<float>(document.at("mean").at(channel).get<double>());
    found.std_dev.at(channel) = static_cast<float>(document.at("std").at(channel).get<double>());
    if (!std::isfinite(found.mean.at(channel)) || !std::isfinite(found.std_dev.at(channel)) ||
        found.std_dev.at(channel) <= 0) {
      throw std::invalid_argument("mean and std of preprocess must be finite, and std above 0");
    }
  }
  const std::string pillow = versions.at("pillow");
  if (std::from_chars(pillow.data(), pillow.data() + pillow.size(), found.pillow).ec != std::errc()) {
    throw std::invalid_argument("version of pillow is not a number: '" + pillow + "'");
  }
  return found;
}

// Entries of an ONNX Runtime session. Keys outside `session.` are refused: they may load a library. Keys that name a
// file are refused, too: ONNX Runtime writes to it.
std::map<std::string, std::string> parse_session(const json& document) {
  if (!document.is_object()) {
    throw std::invalid_argument("saturating_cpu_session is " + document.dump() + ", not an object");
  }
  std::map<std::string, std::string> entries;
  for (const auto& [key, value] : document.items()) {
    const auto holds = [&, &name = key](const char* part) { return name.find(part) != std::string::npos; };
    if (!key.starts_with("session.") || holds("file") || holds("path")) {
      throw std::invalid_argument("saturating_cpu_session has the entry '" + key + "', which is not allowed");
    }
    if (!value.is_string()) {
      throw std::invalid_argument("saturating_cpu_session: " + key + " is " + value.dump() + ", not a string");
    }
    entries.emplace(key, value);
  }
  return entries;
}

// Whether an engine is of a target or precision that a later version added.
bool is_unknown(const json& document) {
  return detail::find_target(document.at("target").get<std::string>()) == nullptr ||
         detail::find_precision(document.at("precision").get<std::string>()) == nullptr;
}

EngineInfo parse_engine(const json& document, detail::EngineFiles& files) {
  EngineInfo engine;
  engine.name = document.at("name");
  engine.target = document.at("target");
  engine.precision = document.at("precision");
  if (engine.name != engine.target + "-" + engine.precision) {
    throw std::invalid_argument("engine " + engine.name + " is not " + engine.target + "-" + engine.precision);
  }
  engine.state = parse_state(document.at("state"));
  if (const auto reached = state_after(document.at("gate")); engine.state > reached) {
    throw std::invalid_argument(engine.name + " is called " + name(engine.state) + ", its gate makes it " + name(reached));
  }
  files.engine = parse_file(document.at("file"));
  engine.size_bytes = files.engine.size_bytes;
  for (const auto& file : document.at("external_data")) {
    files.beside.push_back(parse_file(file));
    engine.size_bytes += files.beside.back().size_bytes;
  }
  const bool compiled = detail::target_of(engine).on_gpu;
  if (!compiled) engine.built_by = document.at("built_by").at(engine.target);
  const auto& plan = document.at("plan");
  if (plan.is_null() == compiled) {
    throw std::invalid_argument(engine.name + ": TensorRT engines must have a plan, and others must not");
  }
  if (!plan.is_null()) {
    engine.built_by = plan.at("version");
    engine.compute_capabilities = plan.at("compute_capabilities").get<std::vector<std::string>>();
    engine.hardware_compatible = plan.at("hardware_compatible");
    engine.version_compatible = plan.at("version_compatible");
    engine.has_weights = !plan.at("strip_weights").get<bool>();
  }
  if (const auto& latency = document.at("latency"); !latency.is_null()) engine.speedup = latency.at("speedup");
  engine.instruction_set = document.at("instruction_set");
  if (const auto found = document.find("saturating_cpu_session"); found != document.end() && !found->is_null()) {
    engine.saturating_cpu_session = parse_session(*found);
  }
  return engine;
}

detail::Manifest parse(const json& document) {
  detail::Manifest found;
  auto& metadata = found.metadata;
  const auto& recipe = document.at("recipe");
  metadata.model = recipe.at("source").at("name");
  metadata.ok = document.at("status").get<std::string>() == "ok";
  metadata.input = parse_port(recipe.at("input"), true);
  metadata.output = parse_output(recipe.at("output"));
  for (const auto& port : recipe.value("further_outputs", json::array())) {
    metadata.further_outputs.push_back(parse_output(port));
  }
  metadata.batch_min = integer(recipe.at("batch"), "min", 1, kMostBatch);
  metadata.batch_opt = integer(recipe.at("batch"), "opt", 1, kMostBatch);
  metadata.batch_max = integer(recipe.at("batch"), "max", 1, kMostBatch);
  metadata.labels = recipe.at("labels").get<std::vector<std::string>>();
  metadata.preprocess = parse_preprocess(recipe.at("preprocess"), recipe.at("versions"));
  parse_sizes(recipe, metadata);
  if (metadata.batch_min > metadata.batch_opt ||
      metadata.batch_opt > metadata.batch_max) {
    throw std::invalid_argument("invalid batch range: min, opt and max are not in ascending order");
  }
  const auto& engines = document.at("artifacts").at("engines");
  if (!engines.is_array() || engines.empty()) throw std::invalid_argument("it has no engines");
  for (const auto& engine : engines) {
    if (is_unknown(engine)) {
      found.unknown.push_back(engine.at("name"));
      continue;
    }
    detail::EngineFiles files;
    auto info = parse_engine(engine, files);
    const auto same = [&](const EngineInfo& other) { return other.name == info.name; };
    if (std::any_of(metadata.engines.begin(), metadata.engines.end(), same)) {
      throw std::invalid_argument("engine " + info.name + " is there twice");
    }
    metadata.engines.push_back(std::move(info));
    found.files.push_back(std::move(files));
  }
  if (metadata.engines.empty()) throw std::invalid_argument("it has no engine that this version knows");
  return found;
}

}  // namespace

const char* name(State state) noexcept {
  switch (state) {
    case State::built:
      return "built";
    case State::graph_verified:
      return "graph verified";
    case State::verified:
      return "verified";
  }
  return "unknown";
}

detail::Manifest detail::read_manifest(const BundleFiles& bundle) {
  const auto source = bundle.find("manifest.json");
  if (!source) throw Error(ErrorCode::bundle, bundle.name() + ": not a bundle (" + bundle.why_no_bundle());
  const auto& path = source->path;
  json document;
  try {
    document = detail::read_json(*source);
  } catch (const std::runtime_error& damage) {
    refuse(path, damage.what());
  }
  try {
    const auto version = integer(document, "schema_version", 0);
    if (version != kSchemaVersion) {
      refuse(path, "schema version " + std::to_string(version) + ", this library reads " +
                       std::to_string(kSchemaVersion));
    }
    return parse(document);
  } catch (const json::exception& error) {
    refuse(path, std::string("damaged manifest: ") + error.what());
  } catch (const std::invalid_argument& error) {
    refuse(path, std::string("damaged manifest: ") + error.what());
  }
}

Metadata read_metadata(const fs::path& bundle) { return detail::read_manifest(detail::DirectoryFiles(bundle)).metadata; }

Metadata read_metadata(const Files& bundle) { return detail::read_manifest(detail::MemoryFiles(bundle)).metadata; }

}  // namespace export_zoo
