#include <export_zoo/engine.hpp>

#include <algorithm>
#include <array>
#include <chrono>
#include <map>
#include <optional>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include <export_zoo/error.hpp>

#include "attestation.hpp"
#include "backend.hpp"
#include "context.hpp"
#include "cores.hpp"
#include "local_latencies.hpp"
#include "manifest.hpp"
#include "onnx_weights.hpp"
#include "selection.hpp"
#include "targets.hpp"

namespace export_zoo {

namespace {

constexpr int kMostThreads = 1024;

// Why an engine cannot be loaded, judged by its description alone; empty if it can. `source` is the attestation that
// its state comes from; empty if the state is the manifest's. `capability` is the compute capability of the GPU here.
// `weights_in_memory`: it has weight files, and they are in memory.
std::string why_not(const EngineInfo& info, const std::string& source, bool weights_in_memory,
                    const std::optional<std::string>& capability, const Options& options) {
  const auto& target = detail::target_of(info);
  if (target.open == nullptr) return "this library was built without " + std::string(target.library);
  if (weights_in_memory && !target.weights_in_memory) {
    return std::string(target.library) + " reads weights in other files from a directory only";
  }
#if !defined(__x86_64__)
  if (target.int8_on_x86_only && detail::precision_of(info).integer_sums) {
    return std::string(target.library) + "'s INT8 is wrong on this CPU: docs/cpu.md";
  }
#endif
  if (target.on_gpu) {
    if (!info.has_weights) return "its plan has no weights: refit it in Python";
    // An engine that was asked for by name is opened anyway: the error then says more.
    if (options.engine.empty()) {
      if (!capability) return "there is no CUDA device here";
      const auto& built = info.compute_capabilities;
      if (!info.hardware_compatible && std::find(built.begin(), built.end(), *capability) == built.end()) {
        return "it was not built for this GPU, of compute capability " + *capability;
      }
    }
  }
  if (info.state < options.least) {
    return std::string(name(info.state)) + ", not " + name(options.least) + (source.empty() ? "" : " (" + source + ")");
  }
  return {};
}

// An engine that cannot be loaded here.
struct LeftOut {
  std::string name;
  std::string reason;
};

// Indices of the engines whose description allows loading them here, or of the one that is asked for. Other engines are
// added to `left_out`. Throws Error.
std::vector<std::size_t> loadable(const detail::BundleFiles& bundle, const detail::Manifest& manifest,
                                  const detail::Attested& attested, const std::optional<std::string>& capability,
                                  const Options& options, std::vector<LeftOut>& left_out) {
  const auto& metadata = manifest.metadata;
  std::string reasons;
  bool lower = false;  // whether a lower Options::least would help
  std::vector<std::size_t> found;
  for (std::size_t i = 0; i < metadata.engines.size(); ++i) {
    const auto& info = metadata.engines[i];
    if (!options.engine.empty() && info.name != options.engine) continue;
    const bool weights_in_memory = bundle.in_memory() && !manifest.files[i].beside.empty();
    const auto reason = why_not(info, attested.sources[i], weights_in_memory, capability, options);
    if (reason.empty()) {
      found.push_back(i);
    } else {
      lower = lower || info.state < options.least;
      reasons += (reasons.empty() ? "" : "; ") + info.name + ": " + reason;
      left_out.push_back({info.name, reason});
    }
  }
  if (!found.empty()) return found;
  if (reasons.empty()) {
    std::string names;
    for (const auto& info : metadata.engines) names += (names.empty() ? "" : ", ") + info.name;
    throw Error(ErrorCode::bundle, bundle.name() + ": no engine '" + options.engine + "': it has " + names);
  }
  throw Error(ErrorCode::state, bundle.name() + ": no engine that may be loaded here: " + reasons +
                                    (lower ? ": run `export-zoo verify` here, or lower Options::least (--state)"
                                           : ": choose another engine"));
}

// The weight files that a graph refers to, by the names in it. `beside` are those that the manifest lists, checked.
// Others are refused: they have no checksum, so anything may be in them.
std::map<std::string, detail::Source> weights_of(const detail::Source& graph, const detail::EngineFiles& files,
                                                 const std::vector<detail::Source>& beside) {
  std::set<std::string> names;
  try {
    names = detail::weight_files(graph);
  } catch (const std::runtime_error& error) {
    throw Error(ErrorCode::bundle, graph.path.string() + ' ' + error.what() + ": export the bundle again");
  }
  std::map<std::string, detail::Source> found;
  for (const auto& name : names) {
    const auto wanted = (std::filesystem::path(files.engine.path).parent_path() / name).lexically_normal();
    const auto is_it = [&](const detail::File& file) {
      return std::filesystem::path(file.path).lexically_normal() == wanted;
    };
    const auto listed = std::find_if(files.beside.begin(), files.beside.end(), is_it);
    if (listed == files.beside.end()) {
      throw Error(ErrorCode::bundle, graph.path.string() + ": has weights in '" + name +
                                         "', which the manifest does not list: export the bundle again");
    }
    found.emplace(name, beside[static_cast<std::size_t>(listed - files.beside.begin())]);
  }
  return found;
}

std::unique_ptr<detail::Backend> open(const detail::BundleFiles& bundle, const detail::EngineFiles& files,
                                      const EngineInfo& info, const Metadata& metadata, const Options& options) {
  std::vector<detail::Source> beside;
  for (const auto& file : files.beside) beside.push_back(detail::checked(bundle, file));
  detail::EngineSource engine{detail::checked(bundle, files.engine), {}};
  if (!detail::target_of(info).on_gpu) engine.weights = weights_of(engine.file, files, beside);
  return detail::target_of(info).open(engine, info, metadata, options);
}

// Whether the error is due to this machine, so that another engine may run.
bool is_of_the_machine(ErrorCode code) {
  return code == ErrorCode::backend_missing || code == ErrorCode::backend_version || code == ErrorCode::device ||
         code == ErrorCode::cpu;
}

// Opens engines of a bundle, each at most once.
class Opener {
 public:
  Opener(const detail::BundleFiles& bundle, const detail::Manifest& manifest, const Options& options,
         std::vector<LeftOut>& left_out)
      : bundle_(bundle), manifest_(manifest), options_(options), left_out_(left_out) {}

  // nullptr if this machine cannot run the engine, which is then added to `left_out`. Throws Error.
  const detail::Backend* open(std::size_t index) {
    const auto [entry, is_new] = opened_.try_emplace(index);
    if (is_new) {
      const auto& info = manifest_.metadata.engines[index];
      try {
        entry->second = export_zoo::open(bundle_, manifest_.files[index], info, manifest_.metadata, options_);
      } catch (const Error& error) {
        if (!is_of_the_machine(error.code())) throw;
        const std::string reason = error.what();
        left_out_.push_back({info.name, reason});
        code_ = code_.value_or(error.code());
        if (reasons_.find(reason) == std::string::npos) reasons_ += (reasons_.empty() ? "" : "; ") + reason;
      }
    }
    return entry->second.get();
  }

  // An engine that was opened.
  std::unique_ptr<detail::Backend> take(std::size_t index) { return std::move(opened_.at(index)); }

  // The first failure's code, and all reasons. Throws Error.
  [[noreturn]] void fail() const { throw Error(code_.value_or(ErrorCode::runtime), reasons_); }

 private:
  const detail::BundleFiles& bundle_;
  const detail::Manifest& manifest_;
  const Options& options_;
  std::vector<LeftOut>& left_out_;
  std::map<std::size_t, std::unique_ptr<detail::Backend>> opened_;
  std::optional<ErrorCode> code_;
  std::string reasons_;
};

// Runs each engine once and then times it, in turn, on a batch of the optimal size: at least 3 and at most 20 rounds,
// about 0.3 s for each engine. As Python's engines/bundle/bench.py. Throws Error.
detail::Medians time_in_turn(const std::map<std::string, const detail::Backend*>& engines, const Metadata& metadata) {
  using Clock = std::chrono::steady_clock;
  const auto batch = metadata.batch_opt;
  const auto size = metadata.size_opt;
  std::vector<float> input(static_cast<std::size_t>(batch) * detail::values_of_image(metadata.input, size));
  std::mt19937 random(0);
  std::normal_distribution<float> normal;  // as normalized images have
  for (auto& value : input) value = normal(random);
  std::vector<float> output(static_cast<std::size_t>(batch) * detail::values_of_image(metadata.output, size));
  const std::array outputs{std::span(output)};
  std::map<std::string, std::unique_ptr<detail::Runner>> runners;
  for (const auto& [name, backend] : engines) runners.emplace(name, backend->runner());
  std::map<std::string, std::vector<double>> times;
  const auto begin = Clock::now();
  const auto limit = std::chrono::duration<double>(0.3 * static_cast<double>(engines.size()));
  for (int round = 1; round <= 20 && (round <= 3 || Clock::now() - begin <= limit); ++round) {
    for (const auto& [name, runner] : runners) {
      runner->run(input, batch, size, outputs);
      const auto start = Clock::now();
      runner->run(input, batch, size, outputs);
      times[name].push_back(std::chrono::duration<double, std::milli>(Clock::now() - start).count());
    }
  }
  detail::Medians medians;
  for (auto& [name, runs] : times) {
    const auto middle = runs.begin() + static_cast<std::ptrdiff_t>(runs.size() / 2);
    std::nth_element(runs.begin(), middle, runs.end());
    medians.emplace(name, *middle);
  }
  return medians;
}

// Speeds on this machine, from the file of an earlier load or, for engines that are not in it, from a few runs.
detail::Speeds measured_here(Opener& opener, const std::vector<std::size_t>& indices, const Metadata& metadata,
                             const std::optional<std::filesystem::path>& kept) {
  auto medians = detail::read_latencies(kept);
  // An engine that could not be opened before may have become usable, for example because a library was installed.
  const auto is_new = [&](std::size_t index) {
    return !medians.contains(metadata.engines[index].name) && opener.open(index) != nullptr;
  };
  if (std::any_of(indices.begin(), indices.end(), is_new)) {
    std::map<std::string, const detail::Backend*> opened;
    for (const auto index : indices) {
      if (const auto* backend = opener.open(index)) opened.emplace(metadata.engines[index].name, backend);
    }
    medians = time_in_turn(opened, metadata);
    detail::write_latencies(kept, medians);
  }
  detail::Speeds found{.by_engine = {}, .where = "here", .like_here = true, .unit = " images per second"};
  for (const auto& [name, median] : medians) {
    found.by_engine.emplace(name, 1e3 * static_cast<double>(metadata.batch_opt) / median);
  }
  return found;
}

std::string why_chosen(const EngineInfo& info, const std::string& measured, const std::vector<LeftOut>& left_out,
                       const detail::Attested& attested, const Options& options) {
  std::string why = "asked for";
  if (options.engine.empty()) {
    why = std::string("fastest ") + name(info.state) + " engine that may be loaded here";
    if (!measured.empty()) why += ", " + measured;
    for (std::size_t i = 0; i < left_out.size(); ++i) {  // each reason once
      const auto same = [&](const LeftOut& other) { return other.reason == left_out[i].reason; };
      const auto end = left_out.begin() + static_cast<std::ptrdiff_t>(i);
      if (std::any_of(left_out.begin(), end, same)) continue;
      std::string names;
      for (const auto& other : left_out) {
        if (same(other)) names += (names.empty() ? "" : " and ") + other.name;
      }
      why += "; " + names + (names == left_out[i].name ? " was" : " were") + " left out: " + left_out[i].reason;
    }
  }
  for (const auto& file : attested.unreadable) why += "; " + file + " cannot be read, and is not used";
  return why;
}

// Engine::load, from a directory or from memory.
std::shared_ptr<const detail::EngineState> load(const detail::BundleFiles& bundle, const Options& options) {
  if (options.threads < 0 || options.threads > kMostThreads) {
    throw Error(ErrorCode::runtime, "Options::threads is " + std::to_string(options.threads) + ": give 0 (all cores) to " +
                                        std::to_string(kMostThreads));
  }
  if (options.streams < 1 || options.streams > kMostThreads / std::max(1, options.threads)) {
    throw Error(ErrorCode::runtime, "Options::streams is " + std::to_string(options.streams) + ": give 1 or more, with at most " +
                                        std::to_string(kMostThreads) + " threads in all");
  }
  auto manifest = detail::read_manifest(bundle);
  if (!manifest.metadata.ok && !options.allow_failed) {
    throw Error(ErrorCode::state, bundle.name() +
                                      ": this bundle failed its parity gate, or an engine did not reach the state asked "
                                      "for: export again, or set Options::allow_failed to inspect it");
  }
  std::optional<std::string> capability;
#ifdef EXPORT_ZOO_WITH_TENSORRT
  const auto may_need_gpu = [&](const EngineInfo& info) {
    return detail::target_of(info).on_gpu && (options.engine.empty() || info.name == options.engine);
  };
  if (std::any_of(manifest.metadata.engines.begin(), manifest.metadata.engines.end(), may_need_gpu)) {
    capability = detail::compute_capability(options);
  }
#endif
  const auto attested = detail::apply_attestations(bundle, capability, manifest.metadata.engines);
  // No engine was verified with another provider than the CPU's.
  if (!options.onnxruntime_session.providers.empty()) {
    for (auto& engine : manifest.metadata.engines) {
      if (engine.target == "onnxruntime") engine.state = std::min(engine.state, State::graph_verified);
    }
  }
  std::vector<LeftOut> left_out;
  for (const auto& unknown : manifest.unknown) {
    if (unknown == options.engine) {
      throw Error(ErrorCode::bundle, bundle.name() + ": engine '" + unknown +
                                         "' is of a target or precision that this version does not know: update the library");
    }
    left_out.push_back({unknown, "this version does not know it"});
  }
  const auto& metadata = manifest.metadata;
  const auto candidates = loadable(bundle, manifest, attested, capability, options, left_out);
  Opener opener(bundle, manifest, options, left_out);
  // The state comes before the speed.
  for (const auto level : {State::verified, State::graph_verified, State::built}) {
    std::vector<std::size_t> indices;
    std::vector<EngineInfo> engines;
    for (const auto i : candidates) {
      if (metadata.engines[i].state != level) continue;
      indices.push_back(i);
      engines.push_back(metadata.engines[i]);
    }
    auto measured = detail::speeds(engines, attested, capability);
    if (options.measure && engines.size() > 1 && !measured.like_here) {
      const auto on_gpu = [](const EngineInfo& info) { return detail::target_of(info).on_gpu; };
      const auto gpu = std::any_of(engines.begin(), engines.end(), on_gpu) ? capability : std::nullopt;
      const int threads =
          options.streams == 1 ? options.threads : detail::threads_of_stream(options.threads, options.streams);
      measured = measured_here(opener, indices, metadata, detail::latencies_file(bundle, gpu, threads));
    }
    for (const auto i : detail::fastest_first(engines, measured)) {
      const auto index = indices[i];
      if (opener.open(index) == nullptr) continue;
      auto state = std::make_shared<detail::EngineState>();
      state->info = engines[i];
      state->why = why_chosen(state->info, measured.told(state->info.name), left_out, attested, options);
      state->backend = opener.take(index);
      state->metadata = std::move(manifest.metadata);
      return state;
    }
  }
  opener.fail();
}

}  // namespace

Engine::Engine(std::shared_ptr<const detail::EngineState> state) : state_(std::move(state)) {}

Engine Engine::load(const std::filesystem::path& bundle, const Options& options) {
  return Engine(export_zoo::load(detail::DirectoryFiles(bundle), options));
}

Engine Engine::load(const Files& bundle, const Options& options) {
  return Engine(export_zoo::load(detail::MemoryFiles(bundle), options));
}

Context Engine::context() const {
  return Context(std::make_unique<detail::ContextState>(state_));
}

const Metadata& Engine::metadata() const noexcept { return state_->metadata; }
const EngineInfo& Engine::info() const noexcept { return state_->info; }
const std::string& Engine::backend() const noexcept { return state_->backend->description(); }
const std::string& Engine::why() const noexcept { return state_->why; }

}  // namespace export_zoo
