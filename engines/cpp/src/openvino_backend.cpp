// OpenVINO on the CPU, by its C API. Compiled where its headers are found. The library is loaded with dlopen.

#include <algorithm>
#include <array>
#include <atomic>
#include <charconv>
#include <cstdint>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <openvino/c/openvino.h>

#include <export_zoo/error.hpp>

#include "backend.hpp"
#include "cores.hpp"
#include "library.hpp"
#include "log.hpp"

namespace export_zoo::detail {

namespace {

constexpr std::array<const char*, 1> kNames{"libopenvino_c.so"};
constexpr std::pair kOldest{2025, 4};  // as in Python: the oldest version that is known to take our graphs

#define EXPORT_ZOO_OPENVINO(name) decltype(&::name) name = reinterpret_cast<decltype(&::name)>(library.symbol(#name))

// The functions of OpenVINO's C API that this file calls.
struct Functions {
  const Library& library;
  EXPORT_ZOO_OPENVINO(ov_get_last_err_msg);
  EXPORT_ZOO_OPENVINO(ov_free);
  EXPORT_ZOO_OPENVINO(ov_core_create);
  EXPORT_ZOO_OPENVINO(ov_core_read_model);
  EXPORT_ZOO_OPENVINO(ov_core_read_model_from_memory_buffer);
  EXPORT_ZOO_OPENVINO(ov_core_compile_model);
  EXPORT_ZOO_OPENVINO(ov_model_free);
  EXPORT_ZOO_OPENVINO(ov_model_inputs_size);
  EXPORT_ZOO_OPENVINO(ov_model_outputs_size);
  EXPORT_ZOO_OPENVINO(ov_model_const_input_by_index);
  EXPORT_ZOO_OPENVINO(ov_model_const_output_by_index);
  EXPORT_ZOO_OPENVINO(ov_output_const_port_free);
  EXPORT_ZOO_OPENVINO(ov_port_get_any_name);
  EXPORT_ZOO_OPENVINO(ov_port_get_element_type);
  EXPORT_ZOO_OPENVINO(ov_port_get_partial_shape);
  EXPORT_ZOO_OPENVINO(ov_partial_shape_free);
  EXPORT_ZOO_OPENVINO(ov_compiled_model_free);
  EXPORT_ZOO_OPENVINO(ov_compiled_model_create_infer_request);
  EXPORT_ZOO_OPENVINO(ov_infer_request_free);
  EXPORT_ZOO_OPENVINO(ov_infer_request_set_input_tensor_by_index);
  EXPORT_ZOO_OPENVINO(ov_infer_request_set_output_tensor_by_index);
  EXPORT_ZOO_OPENVINO(ov_infer_request_infer);
  EXPORT_ZOO_OPENVINO(ov_infer_request_cancel);
  EXPORT_ZOO_OPENVINO(ov_tensor_create_from_host_ptr);
  EXPORT_ZOO_OPENVINO(ov_tensor_free);

  explicit Functions(const Library& from) : library(from) {}

  // Why the last call failed.
  [[nodiscard]] std::string reason() const {
    const char* message = ov_get_last_err_msg();
    if (message == nullptr) return "no reason given";
    std::string found(message);
    ov_free(message);
    std::replace(found.begin(), found.end(), '\n', ' ');
    return found;
  }

  void check(ov_status_e status, const char* what) const {
    if (status == OK) return;
    throw Error(ErrorCode::runtime, std::string("OpenVINO: ") + what + ": " + reason() + ": is there free memory?");
  }
};

// OpenVINO does not say how severe a message is. By default, it only logs errors.
void to_log(const char* message) { log(Severity::error, "OpenVINO", message); }

// What OpenVINO's functions return, with the function that frees it.
template <typename Item>
using Owned = std::unique_ptr<Item, void (*)(Item*)>;

// Such as "2026.4.1". Throws Error (backend_version) if it is too old.
std::string checked_version(const Library& library) {
  EXPORT_ZOO_OPENVINO(ov_get_openvino_version);
  EXPORT_ZOO_OPENVINO(ov_version_free);
  ov_version_t found{};
  std::string version = ov_get_openvino_version(&found) == OK ? found.buildNumber : "unknown";
  ov_version_free(&found);
  version.erase(std::min(version.find('-'), version.size()));  // 2026.4.1-22345-0123456789a-releases/2026/4
  std::pair number{0, 0};
  const char* end = version.data() + version.size();
  const auto [rest, error] = std::from_chars(version.data(), end, number.first);
  if (error == std::errc() && rest != end) std::from_chars(rest + 1, end, number.second);
  if (number < kOldest) {
    throw Error(ErrorCode::backend_version,
                library.path() + ": OpenVINO " + version + " is too old, " + std::to_string(kOldest.first) + "." +
                    std::to_string(kOldest.second) +
                    " or newer is needed: give it in Options::openvino or $EXPORT_ZOO_OPENVINO");
  }
  return version;
}

#undef EXPORT_ZOO_OPENVINO

// One OpenVINO for the whole process, never destroyed, as it leaves threads behind.
struct Runtime {
  Library library;
  std::string version;
  Functions call;
  ov_core_t* core = nullptr;

  explicit Runtime(const std::filesystem::path& given)
      : library(given, "EXPORT_ZOO_OPENVINO", kNames, "OpenVINO"), version(checked_version(library)), call(library) {
    // OpenVINO 2026 and later has this function; earlier versions write to the standard output.
    if (auto* set_callback = library.find("ov_util_set_log_callback")) {
      reinterpret_cast<void (*)(void (*)(const char*))>(set_callback)(to_log);
    }
    call.check(call.ov_core_create(&core), "it does not start");
  }
};

const Runtime& runtime(const std::filesystem::path& given) {
  static std::mutex mutex;
  static const Runtime* loaded = nullptr;
  const std::lock_guard lock(mutex);
  if (loaded == nullptr) {
    loaded = std::make_unique<Runtime>(given).release();
  } else {
    refuse_another(given, loaded->library.path(), "OpenVINO");
  }
  return *loaded;
}

class OpenVinoRunner final : public Runner {
 public:
  OpenVinoRunner(const Functions& call, const ov_compiled_model_t* model, const Metadata& metadata)
      : call_(call),
        input_(metadata.input),
        outputs_(outputs_of(metadata)),
        spare_(outputs_.size()),
        request_(nullptr, call.ov_infer_request_free) {
    ov_infer_request_t* request = nullptr;
    call.check(call.ov_compiled_model_create_infer_request(model, &request), "no request");
    request_.reset(request);
  }

  void run(std::span<const float> input, std::int64_t batch, InputSize size, Outputs outputs) override {
    const auto what = "batch " + std::to_string(batch) + " failed (a smaller one needs less memory)";
    // OpenVINO takes inputs as mutable, and does not write to them.
    const auto in = tensor(shape_of(input_, batch, size), const_cast<float*>(input.data()));
    call_.check(call_.ov_infer_request_set_input_tensor_by_index(request_.get(), 0, in.get()), what.c_str());
    for (std::size_t i = 0; i < outputs_.size(); ++i) {
      const auto shape = shape_of(outputs_[i], batch, size);
      // A request keeps the memory that it was given: an output that nobody wants must not go to that of another call.
      if (i >= outputs.size()) spare_[i].resize(static_cast<std::size_t>(batch) * values_of_image(outputs_[i], size));
      const auto out = tensor(shape, i < outputs.size() ? outputs[i].data() : spare_[i].data());
      call_.check(call_.ov_infer_request_set_output_tensor_by_index(request_.get(), i, out.get()), what.c_str());
    }
    if (cancelled_) return;
    call_.check(call_.ov_infer_request_infer(request_.get()), what.c_str());
  }

  void cancel() noexcept override {
    cancelled_ = true;
    static_cast<void>(call_.ov_infer_request_cancel(request_.get()));
  }

  void renew() noexcept override { cancelled_ = false; }

 private:
  // A tensor of memory that it does not own.
  [[nodiscard]] Owned<ov_tensor_t> tensor(std::vector<std::int64_t> shape, float* values) const {
    ov_tensor_t* made = nullptr;
    const ov_shape_t dimensions{static_cast<std::int64_t>(shape.size()), shape.data()};
    call_.check(call_.ov_tensor_create_from_host_ptr(F32, dimensions, values, &made), "tensor");
    return {made, call_.ov_tensor_free};
  }

  const Functions& call_;
  Port input_;
  std::vector<Port> outputs_;
  std::vector<std::vector<float>> spare_;  // by output
  std::atomic<bool> cancelled_{false};
  Owned<ov_infer_request_t> request_;
};

class OpenVinoBackend final : public Backend {
 public:
  OpenVinoBackend(const EngineSource& engine, const EngineInfo& info, const Metadata& metadata,
                  const Options& options)
      : runtime_(runtime(options.openvino)),
        metadata_(metadata),
        description_("OpenVINO " + runtime_.version),
        compiled_(nullptr, runtime_.call.ov_compiled_model_free) {
    const auto& call = runtime_.call;
    const auto loaded = [&](ov_status_e status) {
      if (status == OK) return;
      throw Error(ErrorCode::runtime, engine.file.path.string() + ": " + description_ + " cannot load it: " + call.reason() +
                                          ": it was verified with " + info.built_by +
                                          ": use that version, or another engine of the bundle");
    };
    ov_model_t* read = nullptr;
    if (const auto& bytes = engine.file.bytes) {
      loaded(call.ov_core_read_model_from_memory_buffer(runtime_.core, reinterpret_cast<const char*>(bytes->data()),
                                                        bytes->size(), nullptr, &read));
    } else {
      loaded(call.ov_core_read_model(runtime_.core, engine.file.path.c_str(), nullptr, &read));
    }
    const Owned<ov_model_t> model(read, call.ov_model_free);
    check_ports(engine, model.get());
    // As in Python (engines/targets/openvino/engine.py). Without the first entry, CPUs with AMX compute floats in
    // bfloat16. Without the last one, two engines of one thread each are bound to the same core.
    const auto streams = std::to_string(options.streams);
    const auto threads = std::to_string(threads_of_stream(options.threads, options.streams) * options.streams);
    ov_compiled_model_t* compiled = nullptr;
    loaded(call.ov_core_compile_model(runtime_.core, model.get(), "CPU", 10, &compiled,  //
                                      "INFERENCE_PRECISION_HINT", "f32",                 //
                                      "PERFORMANCE_HINT", "LATENCY",                     //
                                      "NUM_STREAMS", streams.c_str(),                    //
                                      "INFERENCE_NUM_THREADS", threads.c_str(),          //
                                      "ENABLE_CPU_PINNING", "NO"));
    compiled_.reset(compiled);
  }

  std::unique_ptr<Runner> runner() const override {
    return std::make_unique<OpenVinoRunner>(runtime_.call, compiled_.get(), metadata_);
  }

  const std::string& description() const noexcept override { return description_; }

 private:
  // Buffers have the manifest's sizes, so the engine must match it.
  void check_ports(const EngineSource& engine, const ov_model_t* model) const {
    const auto& call = runtime_.call;
    std::size_t inputs = 0;
    std::size_t outputs = 0;
    call.check(call.ov_model_inputs_size(model, &inputs), "inputs");
    call.check(call.ov_model_outputs_size(model, &outputs), "outputs");
    bool good = inputs == 1 && outputs == 1 + metadata_.further_outputs.size();
    if (good) {
      ov_output_const_port_t* in = nullptr;
      call.check(call.ov_model_const_input_by_index(model, 0, &in), "input");
      good = is({in, call.ov_output_const_port_free}, metadata_.input);
      const auto ports = outputs_of(metadata_);
      for (std::size_t i = 0; good && i < outputs; ++i) {
        ov_output_const_port_t* out = nullptr;
        call.check(call.ov_model_const_output_by_index(model, i, &out), "output");
        good = is({out, call.ov_output_const_port_free}, ports[i]);
      }
    }
    if (good) return;
    throw Error(ErrorCode::bundle, engine.file.path.string() +
                                       ": its input and output are not those of the manifest: export the bundle again");
  }

  bool is(const Owned<ov_output_const_port_t>& owned, const Port& wanted) const {
    const auto& call = runtime_.call;
    const auto* port = owned.get();
    char* name = nullptr;
    call.check(call.ov_port_get_any_name(port, &name), "name");
    const bool same_name = wanted.name == name;
    call.ov_free(name);
    ov_element_type_e type{};
    call.check(call.ov_port_get_element_type(port, &type), "type");
    ov_partial_shape_t shape{};
    call.check(call.ov_port_get_partial_shape(port, &shape), "shape");
    const auto takes = [](const ov_dimension_t& dimension, std::int64_t size) {
      // A dynamic size is 0 to -1, or 0 to the largest number.
      const bool dynamic = dimension.min != dimension.max;
      return size == -1 ? dynamic : dynamic || dimension.max == size;
    };
    const auto rank = static_cast<std::int64_t>(wanted.shape.size());
    const bool same_shape = shape.rank.max == rank && shape.rank.min == rank &&
                            std::equal(shape.dims, shape.dims + rank, wanted.shape.begin(), takes);
    call.ov_partial_shape_free(&shape);
    return same_name && type == F32 && same_shape;
  }

  const Runtime& runtime_;
  Metadata metadata_;
  std::string description_;
  Owned<ov_compiled_model_t> compiled_;
};

}  // namespace

std::unique_ptr<Backend> open_openvino(const EngineSource& engine, const EngineInfo& info,
                                       const Metadata& metadata, const Options& options) {
  return std::make_unique<OpenVinoBackend>(engine, info, metadata, options);
}

}  // namespace export_zoo::detail
