#include <export_zoo/engine.hpp>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include <export_zoo/error.hpp>

#include "attestation.hpp"
#include "backend.hpp"
#include "manifest.hpp"
#include "targets.hpp"

namespace export_zoo {

namespace detail {

class EngineState {
 public:
  Metadata metadata;
  EngineInfo info;
  std::string why;
  std::unique_ptr<Backend> backend;
};

class ContextState {
 public:
  std::shared_ptr<const EngineState> engine;
  std::unique_ptr<Runner> runner;
  std::vector<float> logits;
};

}  // namespace detail

namespace {

// Why an engine cannot be loaded, judged by its description alone; empty if it can. `source` is the attestation that
// its state comes from; empty if the state is the manifest's. `capability` is the compute capability of the GPU here.
std::string why_not(const EngineInfo& info, const std::string& source, const std::optional<std::string>& capability,
                    const Options& options) {
  const auto& target = detail::target_of(info);
  if (target.open == nullptr) return "this library was built without " + std::string(target.library);
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

std::string text(InputSize size) { return std::to_string(size.height) + "x" + std::to_string(size.width); }

// Sort key. The state comes before the speed. GPU engines that were never timed come before CPU engines, the lower
// precision first: as in Python.
std::tuple<State, bool, double, std::size_t> rank(const EngineInfo& info) {
  const bool untimed = detail::target_of(info).on_gpu && !info.speedup;
  return {info.state, untimed, info.speedup.value_or(0), detail::order_of(detail::precision_of(info))};
}

// An engine that cannot be loaded here.
struct LeftOut {
  std::string name;
  std::string reason;
};

// Indices of the engines that can be loaded, the best first, or of the one that is asked for. Engines that cannot be
// loaded are added to `left_out`. Throws Error.
std::vector<std::size_t> choose(const std::filesystem::path& bundle, const Metadata& metadata,
                                const detail::Attested& attested, const std::optional<std::string>& capability, const Options& options,
                                std::vector<LeftOut>& left_out) {
  std::string reasons;
  bool lower = false;  // whether a lower Options::least would help
  std::vector<std::size_t> found;
  for (std::size_t i = 0; i < metadata.engines.size(); ++i) {
    const auto& info = metadata.engines[i];
    if (!options.engine.empty() && info.name != options.engine) continue;
    const auto reason = why_not(info, attested.sources[i], capability, options);
    if (reason.empty()) {
      found.push_back(i);
    } else {
      lower = lower || info.state < options.least;
      reasons += (reasons.empty() ? "" : "; ") + info.name + ": " + reason;
      left_out.push_back({info.name, reason});
    }
  }
  std::stable_sort(found.begin(), found.end(),
                   [&](auto a, auto b) { return rank(metadata.engines[a]) > rank(metadata.engines[b]); });
  if (!found.empty()) return found;
  if (reasons.empty()) {
    std::string names;
    for (const auto& info : metadata.engines) names += (names.empty() ? "" : ", ") + info.name;
    throw Error(ErrorCode::bundle, bundle.string() + ": no engine '" + options.engine + "': it has " + names);
  }
  throw Error(ErrorCode::state, bundle.string() + ": no engine that may be loaded here: " + reasons +
                                    (lower ? ": run `export-zoo verify` here, or lower Options::least (--state)"
                                           : ": choose another engine"));
}

std::unique_ptr<detail::Backend> open(const std::filesystem::path& bundle, const detail::EngineFiles& files,
                                      const EngineInfo& info, const Metadata& metadata, const Options& options) {
  for (const auto& file : files.beside) detail::checked(bundle, file);
  const auto path = detail::checked(bundle, files.engine);
  return detail::target_of(info).open(path, info, metadata, options);
}

// Whether the error is due to this machine, so that another engine may run.
bool is_of_the_machine(ErrorCode code) {
  return code == ErrorCode::backend_missing || code == ErrorCode::backend_version || code == ErrorCode::device ||
         code == ErrorCode::cpu;
}

std::string why_chosen(const EngineInfo& info, const std::vector<LeftOut>& left_out, const detail::Attested& attested,
                       const Options& options) {
  std::string why = "asked for";
  if (options.engine.empty()) {
    why = std::string("fastest ") + name(info.state) + " engine that may be loaded here";
    for (const auto& other : left_out) why += "; " + other.name + " was left out: " + other.reason;
  }
  for (const auto& file : attested.unreadable) why += "; " + file + " cannot be read, and is not used";
  return why;
}

}  // namespace

Engine::Engine(std::shared_ptr<const detail::EngineState> state) : state_(std::move(state)) {}

Engine Engine::load(const std::filesystem::path& bundle, const Options& options) {
  auto manifest = detail::read_manifest(bundle);
  if (!manifest.metadata.ok && !options.allow_failed) {
    throw Error(ErrorCode::state, bundle.string() +
                                      ": this bundle failed its parity gate, or an engine did not reach the state asked "
                                      "for: export again, or set Options::allow_failed to inspect it");
  }
  std::optional<std::string> capability;
#ifdef EXPORT_ZOO_WITH_TENSORRT
  const auto on_gpu = [&](const EngineInfo& info) {
    return detail::target_of(info).on_gpu && (options.engine.empty() || info.name == options.engine);
  };
  if (std::any_of(manifest.metadata.engines.begin(), manifest.metadata.engines.end(), on_gpu)) {
    capability = detail::compute_capability(options);
  }
#endif
  const auto attested = detail::apply_attestations(bundle, capability, manifest.metadata.engines);
  auto state = std::make_shared<detail::EngineState>();
  state->metadata = std::move(manifest.metadata);
  std::optional<ErrorCode> code;  // of the best engine
  std::string reasons;
  std::vector<LeftOut> left_out;
  for (const auto& unknown : manifest.unknown) {
    if (unknown == options.engine) {
      throw Error(ErrorCode::bundle, bundle.string() + ": engine '" + unknown +
                                         "' is of a target or precision that this version does not know: update the library");
    }
    left_out.push_back({unknown, "this version does not know it"});
  }
  for (const auto i : choose(bundle, state->metadata, attested, capability, options, left_out)) {
    try {
      state->info = state->metadata.engines[i];
      state->backend = open(bundle, manifest.files[i], state->info, state->metadata, options);
      state->why = why_chosen(state->info, left_out, attested, options);
      return Engine(std::move(state));
    } catch (const Error& error) {
      if (!is_of_the_machine(error.code())) throw;
      code = code.value_or(error.code());
      const std::string reason = error.what();
      left_out.push_back({state->info.name, reason});
      if (reasons.find(reason) == std::string::npos) reasons += (reasons.empty() ? "" : "; ") + reason;
    }
  }
  throw Error(*code, reasons);
}

Context Engine::context() const {
  auto context = std::make_unique<detail::ContextState>();
  context->engine = state_;
  context->runner = state_->backend->runner();
  return Context(std::move(context));
}

const Metadata& Engine::metadata() const noexcept { return state_->metadata; }
const EngineInfo& Engine::info() const noexcept { return state_->info; }
const std::string& Engine::backend() const noexcept { return state_->backend->description(); }
const std::string& Engine::why() const noexcept { return state_->why; }

Context::Context(std::unique_ptr<detail::ContextState> state) : state_(std::move(state)) {}
Context::Context(Context&&) noexcept = default;
Context& Context::operator=(Context&&) noexcept = default;
Context::~Context() = default;

std::span<const float> Context::infer(std::span<const float> input, std::int64_t batch) {
  return infer(input, batch, state_->engine->metadata.size_opt);
}

std::span<const float> Context::infer(std::span<const float> input, std::int64_t batch, InputSize size) {
  const auto& engine = *state_->engine;
  const auto& metadata = engine.metadata;
  if (batch < metadata.batch_min || batch > metadata.batch_max) {
    throw Error(ErrorCode::shape, "batch " + std::to_string(batch) + " is outside this bundle's range " +
                                      std::to_string(metadata.batch_min) + " to " +
                                      std::to_string(metadata.batch_max) +
                                      ": split it, or export with a wider --batch MIN:OPT:MAX");
  }
  const auto& low = metadata.size_min;
  const auto& high = metadata.size_max;
  if (size.height < low.height || size.height > high.height || size.width < low.width || size.width > high.width) {
    throw Error(ErrorCode::shape, "size " + text(size) + " is outside this bundle's range " + text(low) + " to " +
                                      text(high) + ": resize, or export with a wider --dynamic-size MIN:OPT:MAX");
  }
  const auto count = static_cast<std::size_t>(batch);
  const auto wanted = count * detail::values_of_image(metadata.input, size);
  if (input.size() != wanted) {
    throw Error(ErrorCode::shape, "input has " + std::to_string(input.size()) + " values, batch " +
                                      std::to_string(batch) + " of " + text(size) + " needs " + std::to_string(wanted));
  }
  state_->logits.resize(count * detail::values_of_image(metadata.output, size));
  state_->runner->run(input, batch, size, state_->logits);
  return state_->logits;
}

}  // namespace export_zoo
