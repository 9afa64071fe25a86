// The C interface: wraps the C++ interface and translates exceptions to codes.
#include <export_zoo/export_zoo.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <exception>
#include <filesystem>
#include <memory>
#include <new>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <export_zoo/engine.hpp>
#include <export_zoo/error.hpp>
#include <export_zoo/log.hpp>
#include <export_zoo/postprocess.hpp>
#include <export_zoo/preprocess.hpp>

#include "backend.hpp"
#include "context.hpp"

namespace ez = export_zoo;

struct export_zoo_engine {
  ez::Engine engine;
  std::string json;
};

struct export_zoo_context {
  ez::Context context;
};

struct export_zoo_preprocessor {
  ez::Preprocessor preprocessor;
};

namespace {

using nlohmann::json;

// Later versions append fields. Bytes of padding would be values of theirs that older programs never set.
static_assert(std::is_standard_layout_v<export_zoo_options>);
static_assert(sizeof(export_zoo_options) == offsetof(export_zoo_options, no_arena) + sizeof(export_zoo_options::no_arena));

constexpr std::size_t kMostBytesOfOptions = 4096;

// What is wrong with an argument of a function of C.
class ArgumentError : public std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

std::string& last_error() {
  thread_local std::string message;
  return message;
}

// The numbers of C follow from the order of ErrorCode, which may only be appended to.
constexpr int code_of(ez::ErrorCode code) { return static_cast<int>(code) + 1; }
static_assert(code_of(ez::ErrorCode::bundle) == EXPORT_ZOO_ERROR_BUNDLE);
static_assert(code_of(ez::ErrorCode::checksum) == EXPORT_ZOO_ERROR_CHECKSUM);
static_assert(code_of(ez::ErrorCode::state) == EXPORT_ZOO_ERROR_STATE);
static_assert(code_of(ez::ErrorCode::backend_missing) == EXPORT_ZOO_ERROR_BACKEND_MISSING);
static_assert(code_of(ez::ErrorCode::backend_version) == EXPORT_ZOO_ERROR_BACKEND_VERSION);
static_assert(code_of(ez::ErrorCode::device) == EXPORT_ZOO_ERROR_DEVICE);
static_assert(code_of(ez::ErrorCode::shape) == EXPORT_ZOO_ERROR_SHAPE);
static_assert(code_of(ez::ErrorCode::image) == EXPORT_ZOO_ERROR_IMAGE);
static_assert(code_of(ez::ErrorCode::runtime) == EXPORT_ZOO_ERROR_RUNTIME);
static_assert(code_of(ez::ErrorCode::cpu) == EXPORT_ZOO_ERROR_CPU);
static_assert(code_of(ez::ErrorCode::cancelled) == EXPORT_ZOO_ERROR_CANCELLED);

int fail(int code, const char* message) noexcept {
  try {
    last_error() = message;
  } catch (...) {  // no memory for the message
    last_error().clear();
    return EXPORT_ZOO_ERROR_MEMORY;
  }
  return code;
}

// Runs the call. An exception becomes a code and a message.
template <typename Call>
int guarded(Call call) noexcept {
  try {
    call();
    return EXPORT_ZOO_OK;
  } catch (const ez::Error& error) {
    return fail(code_of(error.code()), error.what());
  } catch (const ArgumentError& error) {
    return fail(EXPORT_ZOO_ERROR_ARGUMENT, error.what());
  } catch (const std::bad_alloc&) {
    return fail(EXPORT_ZOO_ERROR_MEMORY, "out of memory");
  } catch (const std::exception& error) {
    return fail(EXPORT_ZOO_ERROR_RUNTIME, error.what());
  } catch (...) {
    return fail(EXPORT_ZOO_ERROR_RUNTIME, "unknown exception");
  }
}

// Checks an argument that must not be NULL; `remedy` says what to give.
void check(const void* argument, const char* name, const char* remedy) {
  if (argument == nullptr) throw ArgumentError(std::string(name) + " is NULL: give " + remedy);
}

const ez::Engine& checked(const export_zoo_engine* engine) {
  check(engine, "engine", "what export_zoo_engine_load() made");
  return engine->engine;
}

const ez::Preprocessor& checked(const export_zoo_preprocessor* preprocessor) {
  check(preprocessor, "preprocessor", "what export_zoo_preprocessor_create() made");
  return preprocessor->preprocessor;
}

ez::Options checked(const export_zoo_options* options) {
  ez::Options found;
  if (options == nullptr) return found;
  const auto size = options->struct_size;
  // All versions of the struct end at a whole pointer; their pointers come first.
  if (size < sizeof(size) || size % alignof(export_zoo_options) != 0 || size > kMostBytesOfOptions) {
    throw ArgumentError("options->struct_size is " + std::to_string(size) +
                        ": begin with export_zoo_options options = EXPORT_ZOO_OPTIONS_INIT");
  }
  export_zoo_options given{};
  std::memcpy(&given, options, std::min(size, sizeof(given)));
  if (size > sizeof(given)) {
    const auto* begin = reinterpret_cast<const unsigned char*>(options);
    if (std::any_of(begin + sizeof(given), begin + size, [](unsigned char byte) { return byte != 0; })) {
      throw ArgumentError("options has fields that this library, version " EXPORT_ZOO_VERSION
                          ", does not know: leave them 0, or update the library");
    }
  }
  const auto text = [](const char* value) { return value == nullptr ? "" : value; };
  found.engine = text(given.engine);
  found.onnxruntime = text(given.onnxruntime);
  found.openvino = text(given.openvino);
  found.tensorrt = text(given.tensorrt);
  if (given.least < EXPORT_ZOO_STATE_DEFAULT || given.least > EXPORT_ZOO_STATE_VERIFIED) {
    throw ArgumentError("options->least is " + std::to_string(given.least) + ": give an export_zoo_state");
  }
  if (given.least == EXPORT_ZOO_STATE_BUILT) found.least = ez::State::built;
  if (given.least == EXPORT_ZOO_STATE_VERIFIED) found.least = ez::State::verified;
  found.allow_failed = given.allow_failed != 0;
  found.measure = given.no_measure == 0;
  found.threads = given.threads;
  if (given.streams != 0) found.streams = given.streams;
  found.device = given.device;
  found.onnxruntime_session.spinning = given.no_spinning == 0;
  found.onnxruntime_session.arena = given.no_arena == 0;
  return found;
}

json to_json(const ez::Port& port) {
  json found{{"name", port.name}, {"dtype", port.dtype}, {"layout", port.layout}, {"shape", port.shape}};
  if (!port.task.empty()) found.update({{"task", port.task}, {"scores", port.scores}});
  return found;
}

json to_json(ez::InputSize size) { return json::array({size.height, size.width}); }

std::string to_json(const ez::Engine& engine) {
  const auto& metadata = engine.metadata();
  const auto& info = engine.info();
  auto further = json::array();
  for (const auto& port : metadata.further_outputs) further.push_back(to_json(port));
  const json found{
      {"model", metadata.model},
      {"ok", metadata.ok},
      {"input", to_json(metadata.input)},
      {"output", to_json(metadata.output)},
      {"further_outputs", further},
      {"batch", {{"min", metadata.batch_min}, {"opt", metadata.batch_opt}, {"max", metadata.batch_max}}},
      {"size",
       {{"min", to_json(metadata.size_min)}, {"opt", to_json(metadata.size_opt)}, {"max", to_json(metadata.size_max)}}},
      {"labels", metadata.labels},
      {"engine",
       {{"name", info.name},
        {"target", info.target},
        {"precision", info.precision},
        {"state", name(info.state)},
        {"size_bytes", info.size_bytes},
        {"backend", engine.backend()},
        {"why", engine.why()}}}};
  return found.dump(-1, ' ', false, json::error_handler_t::replace);
}

const char* text_of(const export_zoo_engine& handle, int key) {
  const auto& engine = handle.engine;
  const auto& metadata = engine.metadata();
  switch (key) {
    case EXPORT_ZOO_TEXT_JSON:
      return handle.json.c_str();
    case EXPORT_ZOO_TEXT_MODEL:
      return metadata.model.c_str();
    case EXPORT_ZOO_TEXT_ENGINE:
      return engine.info().name.c_str();
    case EXPORT_ZOO_TEXT_PRECISION:
      return engine.info().precision.c_str();
    case EXPORT_ZOO_TEXT_STATE:
      return name(engine.info().state);
    case EXPORT_ZOO_TEXT_BACKEND:
      return engine.backend().c_str();
    case EXPORT_ZOO_TEXT_WHY:
      return engine.why().c_str();
    case EXPORT_ZOO_TEXT_INPUT_NAME:
      return metadata.input.name.c_str();
    case EXPORT_ZOO_TEXT_OUTPUT_NAME:
      return metadata.output.name.c_str();
    case EXPORT_ZOO_TEXT_TASK:
      return metadata.output.task.c_str();
    case EXPORT_ZOO_TEXT_SCORES:
      return metadata.output.scores.c_str();
    default:
      throw ArgumentError("there is no text " + std::to_string(key) + ": give an export_zoo_text");
  }
}

std::int64_t number_of(const ez::Metadata& metadata, int key) {
  switch (key) {
    case EXPORT_ZOO_NUMBER_BATCH_MIN:
      return metadata.batch_min;
    case EXPORT_ZOO_NUMBER_BATCH_OPT:
      return metadata.batch_opt;
    case EXPORT_ZOO_NUMBER_BATCH_MAX:
      return metadata.batch_max;
    case EXPORT_ZOO_NUMBER_HEIGHT_MIN:
      return metadata.size_min.height;
    case EXPORT_ZOO_NUMBER_HEIGHT_OPT:
      return metadata.size_opt.height;
    case EXPORT_ZOO_NUMBER_HEIGHT_MAX:
      return metadata.size_max.height;
    case EXPORT_ZOO_NUMBER_WIDTH_MIN:
      return metadata.size_min.width;
    case EXPORT_ZOO_NUMBER_WIDTH_OPT:
      return metadata.size_opt.width;
    case EXPORT_ZOO_NUMBER_WIDTH_MAX:
      return metadata.size_max.width;
    case EXPORT_ZOO_NUMBER_LABELS:
      return static_cast<std::int64_t>(metadata.labels.size());
    case EXPORT_ZOO_NUMBER_OUTPUTS:
      return static_cast<std::int64_t>(1 + metadata.further_outputs.size());
    default:
      throw ArgumentError("there is no number " + std::to_string(key) + ": give an export_zoo_number");
  }
}

std::size_t values_of(const ez::Port& port, const ez::Metadata& metadata, std::int64_t batch, ez::InputSize size) {
  const auto real = ez::detail::verified_size(metadata, batch, size);
  return static_cast<std::size_t>(batch) * ez::detail::values_of_image(port, real);
}

}  // namespace

extern "C" {

const char* export_zoo_version(void) { return EXPORT_ZOO_VERSION; }

int export_zoo_usable_cores(void) {
  int cores = 1;
  (void)guarded([&] { cores = ez::usable_cores(); });
  return cores;
}

const char* export_zoo_last_error(void) { return last_error().c_str(); }

int export_zoo_set_log(export_zoo_log_function log, void* user_data) {
  return guarded([&] {
    if (log == nullptr) return ez::set_log(nullptr);
    ez::set_log([log, user_data](ez::Severity severity, std::string_view runtime, std::string_view message) {
      log(user_data, severity == ez::Severity::error ? 1 : 0, std::string(runtime).c_str(), std::string(message).c_str());
    });
  });
}

int export_zoo_engine_load(const char* bundle, const export_zoo_options* options, export_zoo_engine** engine) {
  return guarded([&] {
    check(engine, "engine", "the address of an export_zoo_engine*");
    *engine = nullptr;
    check(bundle, "bundle", "the directory that export-zoo wrote");
    auto loaded = ez::Engine::load(bundle, checked(options));
    auto text = to_json(loaded);
    *engine = new export_zoo_engine{std::move(loaded), std::move(text)};
  });
}

void export_zoo_engine_free(export_zoo_engine* engine) { delete engine; }

const char* export_zoo_engine_text(const export_zoo_engine* engine, int key) {
  const char* found = nullptr;
  (void)guarded([&] {
    (void)checked(engine);
    found = text_of(*engine, key);
  });
  return found;
}

int export_zoo_engine_number(const export_zoo_engine* engine, int key, int64_t* number) {
  return guarded([&] {
    const auto& metadata = checked(engine).metadata();
    check(number, "number", "the address of an int64_t");
    *number = number_of(metadata, key);
  });
}

const char* export_zoo_engine_label(const export_zoo_engine* engine, size_t index) {
  const char* found = nullptr;
  (void)guarded([&] {
    const auto& labels = checked(engine).metadata().labels;
    if (index >= labels.size()) {
      throw ArgumentError("there is no label " + std::to_string(index) + ": the bundle has " +
                          std::to_string(labels.size()) + " (EXPORT_ZOO_NUMBER_LABELS)");
    }
    found = labels[index].c_str();
  });
  return found;
}

int export_zoo_engine_input_count(const export_zoo_engine* engine, int64_t batch, int64_t height, int64_t width,
                                  size_t* count) {
  return guarded([&] {
    const auto& metadata = checked(engine).metadata();
    check(count, "count", "the address of a size_t");
    *count = values_of(metadata.input, metadata, batch, {height, width});
  });
}

int export_zoo_engine_output_count(const export_zoo_engine* engine, int64_t batch, int64_t height, int64_t width,
                                   size_t* count) {
  return export_zoo_engine_output_count_of(engine, 0, batch, height, width, count);
}

int export_zoo_engine_output_count_of(const export_zoo_engine* engine, size_t output, int64_t batch, int64_t height,
                                      int64_t width, size_t* count) {
  return guarded([&] {
    const auto& metadata = checked(engine).metadata();
    check(count, "count", "the address of a size_t");
    const auto& further = metadata.further_outputs;
    if (output > further.size()) {
      throw ArgumentError("there is no output " + std::to_string(output) + ": the network has " +
                          std::to_string(1 + further.size()) + " (EXPORT_ZOO_NUMBER_OUTPUTS)");
    }
    const auto& port = output == 0 ? metadata.output : further[output - 1];
    *count = values_of(port, metadata, batch, {height, width});
  });
}

int export_zoo_context_create(const export_zoo_engine* engine, export_zoo_context** context) {
  return guarded([&] {
    check(context, "context", "the address of an export_zoo_context*");
    *context = nullptr;
    *context = new export_zoo_context{checked(engine).context()};
  });
}

void export_zoo_context_free(export_zoo_context* context) { delete context; }

void export_zoo_context_cancel(export_zoo_context* context) {
  if (context != nullptr) context->context.cancel();
}

int export_zoo_infer(export_zoo_context* context, const float* input, size_t input_count, int64_t batch, int64_t height,
                     int64_t width, float* output, size_t output_count) {
  return guarded([&] {
    check(context, "context", "what export_zoo_context_create() made");
    check(input, "input", "the preprocessed images");
    check(output, "output", "memory for export_zoo_engine_output_count() values");
    context->context.infer_into(std::span(output, output_count), std::span(input, input_count), batch,
                                {height, width});
  });
}

int export_zoo_infer_all(export_zoo_context* context, const float* input, size_t input_count, int64_t batch,
                         int64_t height, int64_t width, float* const* outputs, const size_t* output_counts,
                         size_t outputs_count) {
  return guarded([&] {
    check(context, "context", "what export_zoo_context_create() made");
    check(input, "input", "the preprocessed images");
    check(outputs, "outputs", "a pointer for each output");
    check(output_counts, "output_counts", "the number of values of each output");
    std::vector<std::span<float>> memory;
    for (size_t i = 0; i < outputs_count; ++i) {
      check(outputs[i], "a pointer in outputs", "memory for export_zoo_engine_output_count_of() values");
      memory.emplace_back(outputs[i], output_counts[i]);
    }
    context->context.infer_into(memory, std::span(input, input_count), batch, {height, width});
  });
}

int export_zoo_preprocessor_create(const export_zoo_engine* engine, int64_t height, int64_t width,
                                   export_zoo_preprocessor** preprocessor) {
  return guarded([&] {
    check(preprocessor, "preprocessor", "the address of an export_zoo_preprocessor*");
    *preprocessor = nullptr;
    const auto& metadata = checked(engine).metadata();
    const ez::InputSize size{height, width};
    const bool own = size == ez::InputSize{} || size == metadata.size_opt;
    const auto options = own ? metadata.preprocess : ez::at_size(metadata.preprocess, size);
    *preprocessor = new export_zoo_preprocessor{ez::Preprocessor(options)};
  });
}

void export_zoo_preprocessor_free(export_zoo_preprocessor* preprocessor) { delete preprocessor; }

int export_zoo_preprocessor_count(const export_zoo_preprocessor* preprocessor, size_t* count) {
  return guarded([&] {
    const auto size = checked(preprocessor).size();
    check(count, "count", "the address of a size_t");
    *count = size;
  });
}

int export_zoo_preprocess(const export_zoo_preprocessor* preprocessor, const void* file, size_t file_size, float* output,
                          size_t output_count) {
  return guarded([&] {
    const auto& preprocess = checked(preprocessor);
    check(file, "file", "the bytes of a JPEG or PNG");
    check(output, "output", "memory for export_zoo_preprocessor_count() values");
    preprocess(std::span(static_cast<const std::byte*>(file), file_size), std::span(output, output_count));
  });
}

int export_zoo_softmax(const float* logits, float* probabilities, size_t count) {
  return guarded([&] {
    check(logits, "logits", "the logits of one image");
    check(probabilities, "probabilities", "memory for as many values");
    std::ranges::copy(ez::softmax({logits, count}), probabilities);
  });
}

int export_zoo_probabilities(const export_zoo_engine* engine, const float* values, float* probabilities, size_t count) {
  return guarded([&] {
    const auto& output = checked(engine).metadata().output;
    check(values, "values", "the values of one image");
    check(probabilities, "probabilities", "memory for as many values");
    std::ranges::copy(ez::probabilities(output, {values, count}), probabilities);
  });
}

}  // extern "C"
