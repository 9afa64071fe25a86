#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <map>
#include <mutex>
#include <string_view>
#include <vector>

#include <export_zoo/error.hpp>

#include "backend.hpp"
#include "cores.hpp"
#include "kernel_probe.hpp"
#include "library.hpp"
#include "log.hpp"
#include "onnxruntime.hpp"
#include "targets.hpp"

namespace export_zoo::detail {

namespace {

constexpr std::array<const char*, 2> kNames{"libonnxruntime.so.1", "libonnxruntime.so"};
constexpr const char* kExactEntry = "session.x64quantprecision";  // INT8 weights become uint8, on x86-64

void ORT_API_CALL to_log(void*, OrtLoggingLevel level, const char*, const char*, const char*, const char* message) {
  log(level >= ORT_LOGGING_LEVEL_ERROR ? Severity::error : Severity::warning, "ONNX Runtime", message);
}

// One ONNX Runtime for the whole process: its C++ API keeps the function table in a global.
struct Runtime {
  Ort::Env env{nullptr};
  std::string path;
  std::string version;
};

const Runtime& runtime(const std::filesystem::path& given) {
  static std::mutex mutex;
  // Never destroyed: at exit, ONNX Runtime's own statics, which were created later, are destroyed before ours.
  static const Runtime* loaded = nullptr;
  const std::lock_guard lock(mutex);
  if (loaded != nullptr) {
    refuse_another(given, loaded->path, "ONNX Runtime");
    return *loaded;
  }
  const Library library(given, "EXPORT_ZOO_ONNXRUNTIME", kNames, "ONNX Runtime");
  const auto get_base = reinterpret_cast<const OrtApiBase* (*)()>(library.symbol("OrtGetApiBase"));
  const OrtApiBase* base = get_base();
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (api == nullptr) {
    throw Error(ErrorCode::backend_version, library.path() + ": ONNX Runtime " + base->GetVersionString() +
                                                " is too old, 1." + std::to_string(ORT_API_VERSION) +
                                                " or newer is needed: give it in Options::onnxruntime or "
                                                "$EXPORT_ZOO_ONNXRUNTIME");
  }
  Ort::InitApi(api);
  auto fresh = std::make_unique<Runtime>();
  try {
    fresh->env = Ort::Env(ORT_LOGGING_LEVEL_WARNING, "export_zoo", to_log, nullptr);
  } catch (const Ort::Exception& error) {
    throw Error(ErrorCode::runtime, library.path() + ": ONNX Runtime does not start: " + error.what() +
                                        ": reinstall it, or give another library");
  }
  fresh->path = library.path();
  fresh->version = base->GetVersionString();
  loaded = fresh.release();
  return *loaded;
}

Ort::MemoryInfo cpu_memory() {
  try {
    return Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  } catch (const Ort::Exception& error) {
    throw Error(ErrorCode::runtime, std::string("ONNX Runtime: ") + error.what() + ": is there free memory?");
  }
}

// Session entries that keep the engine's INT8 sums exact on this CPU; empty if they are exact anyway.
std::map<std::string, std::string> entries_here(const EngineInfo& info, const Ort::Env& env) {
  if (!precision_of(info).integer_sums) return {};
  auto entries = info.saturating_cpu_session.value_or(std::map<std::string, std::string>{{kExactEntry, "1"}});
  if (entries.empty() || !int8_sums_saturate(env)) return {};
  return entries;
}

// Parts of the messages with which ONNX Runtime refuses kExactEntry if nodes share an INT8 tensor: those of 1.24 and
// later, and those of 1.21 to 1.23, which name the tensor that should replace the shared one.
constexpr std::array<std::string_view, 3> kSharedTensor{"AddInitializedOrtValue", "Attempt to replace the existing tensor",
                                                        "_s8_2_u8"};

bool refuses_shared_tensor(std::string_view message) {
  const auto in = [&](std::string_view part) { return message.find(part) != std::string_view::npos; };
  return std::any_of(kSharedTensor.begin(), kSharedTensor.end(), in);
}

// Error message that names the engine that cannot be exact here, and the next step.
std::string not_exact(const EngineSource& engine, const std::string& library, const Metadata& metadata,
                      const Options& options) {
  constexpr std::string_view kOther = "onnxruntime-fp32";
  const auto is_other = [&](const EngineInfo& info) { return info.name == kOther; };
  const bool other = !options.engine.empty() && std::any_of(metadata.engines.begin(), metadata.engines.end(), is_other);
  return engine.file.path.string() + ": INT8 sums saturate on this CPU, and " + library + " refuses " + kExactEntry +
         ", which makes them exact, because nodes of the graph share an INT8 tensor: export the bundle again" +
         (other ? ", or load " + std::string(kOther) : "");
}

std::unique_ptr<Ort::Session> session_of(const EngineSource& engine, const Ort::Env& env, Ort::SessionOptions& options) {
  if (!engine.file.bytes) return std::make_unique<Ort::Session>(env, engine.file.path.c_str(), options);
  return std::make_unique<Ort::Session>(env, engine.file.bytes->data(), engine.file.bytes->size(), options);
}

// Options of sessions from memory.
void add_memory(const EngineSource& engine, Ort::SessionOptions& options) {
  // ONNX Runtime takes only the weights of the main graph from memory. It would read others from the working directory,
  // unchecked; in this one there is no file.
  options.AddConfigEntry("session.model_external_initializers_file_folder_path", "/dev/null");
  // Otherwise, by an entry of the manifest, sessions might refer to bytes that are freed.
  options.AddConfigEntry("session.use_ort_model_bytes_directly", "0");
  std::vector<std::string> names;
  std::vector<char*> buffers;
  std::vector<std::size_t> sizes;
  for (const auto& [name, file] : engine.weights) {
    names.push_back(name);
    buffers.push_back(const_cast<char*>(reinterpret_cast<const char*>(file.bytes->data())));  // only read
    sizes.push_back(file.bytes->size());
  }
  if (!names.empty()) options.AddExternalInitializersFromFilesInMemory(names, buffers, sizes);
}

class OnnxRuntimeRunner final : public Runner {
 public:
  OnnxRuntimeRunner(Ort::Session& session, const Metadata& metadata)
      : session_(session), memory_(cpu_memory()), input_(metadata.input), outputs_(outputs_of(metadata)) {}

  void run(std::span<const float> input, std::int64_t batch, InputSize size, Outputs outputs) override {
    try {
      // ONNX Runtime takes inputs as mutable, and does not write to them.
      const auto in = tensor({const_cast<float*>(input.data()), input.size()}, shape_of(input_, batch, size));
      std::vector<Ort::Value> out;
      std::vector<const char*> names;
      for (std::size_t i = 0; i < outputs.size(); ++i) {
        out.push_back(tensor(outputs[i], shape_of(outputs_[i], batch, size)));
        names.push_back(outputs_[i].name.c_str());
      }
      const char* input_name = input_.name.c_str();
      session_.Run(options_, &input_name, &in, 1, names.data(), out.data(), out.size());
    } catch (const Ort::Exception& error) {
      throw Error(ErrorCode::runtime, std::string("ONNX Runtime failed at batch ") + std::to_string(batch) + ": " +
                                          error.what() + ": is there memory for it? A smaller batch needs less");
    }
  }

  void cancel() noexcept override { options_.SetTerminate(); }
  void renew() noexcept override { options_.UnsetTerminate(); }

 private:
  [[nodiscard]] Ort::Value tensor(std::span<float> values, const std::vector<std::int64_t>& shape) const {
    return Ort::Value::CreateTensor<float>(memory_, values.data(), values.size(), shape.data(), shape.size());
  }

  Ort::Session& session_;
  Ort::MemoryInfo memory_;
  Ort::RunOptions options_;
  Port input_;
  std::vector<Port> outputs_;
};

// Session entries of this library; Options give others.
constexpr const char* kStopSpinning = "session.force_spinning_stop";
constexpr const char* kSpinning = "session.intra_op.allow_spinning";
constexpr const char* kDisabled = "optimization.disable_specified_optimizers";

void set_up(Ort::SessionOptions& session, const OnnxRuntimeOptions& given) {
  for (const auto& [key, value] : given.entries) {
    for (const auto* own : {kStopSpinning, kSpinning, kDisabled, kExactEntry}) {
      if (key == own) {
        throw Error(ErrorCode::runtime, "OnnxRuntimeOptions::entries: " + key + " is set by this library: leave it out" +
                                            (key == kSpinning ? ", and set OnnxRuntimeOptions::spinning" : ""));
      }
    }
    session.AddConfigEntry(key.c_str(), value.c_str());
  }
  // Otherwise, idle threads of one engine spin on the cores that the next one needs.
  session.AddConfigEntry(kStopSpinning, "1");
  if (!given.spinning) session.AddConfigEntry(kSpinning, "0");
  if (!given.arena) session.DisableCpuMemArena();
  for (const auto& provider : given.providers) {
    try {
      session.AppendExecutionProvider(provider.name, {provider.options.begin(), provider.options.end()});
    } catch (const Ort::Exception& error) {
      std::string known;
      for (const auto& name : Ort::GetAvailableProviders()) known += (known.empty() ? "" : ", ") + name;
      throw Error(ErrorCode::backend_missing, "OnnxRuntimeOptions::providers: " + provider.name + ": " + error.what() +
                                                  ": this ONNX Runtime has " + known);
    }
  }
}

class OnnxRuntimeBackend final : public Backend {
 public:
  OnnxRuntimeBackend(const EngineSource& engine, const EngineInfo& info, const Metadata& metadata,
                     const Options& options)
      : metadata_(metadata) {
    const auto& here = runtime(options.onnxruntime);
    description_ = "ONNX Runtime " + here.version;
    const auto entries = entries_here(info, here.env);
    const auto found = entries.find(kExactEntry);
    const bool exact = found != entries.end() && found->second == "1";
    try {
      Ort::SessionOptions session;
      const int threads = threads_of_stream(options.threads, options.streams);
      session.SetIntraOpNumThreads(threads);
      set_up(session, options.onnxruntime_session);
      // The FP16 layout pass of ONNX Runtime 1.31 crashes on transformers; Python disables it, too.
      if (precision_of(info).float16) {
        session.AddConfigEntry(kDisabled, "NchwcTransformer");
      }
      for (const auto& [key, value] : entries) session.AddConfigEntry(key.c_str(), value.c_str());
      if (engine.file.bytes) add_memory(engine, session);
      if (exact) session.SetLogSeverityLevel(ORT_LOGGING_LEVEL_FATAL);  // a refusal is thrown, not logged
      // A session of one thread computes in the thread that calls it. Another one has threads that its callers share.
      const int sessions = threads == 1 ? 1 : options.streams;
      for (int i = 0; i < sessions; ++i) {
        sessions_.push_back(session_of(engine, here.env, session));
      }
    } catch (const Ort::Exception& error) {
      if (exact && refuses_shared_tensor(error.what())) {
        throw Error(ErrorCode::cpu, not_exact(engine, description_, metadata, options));
      }
      throw Error(ErrorCode::runtime, engine.file.path.string() + ": " + description_ + " cannot load it: " + error.what() +
                                          ": it was verified with " + info.built_by +
                                          ": use that version, or another engine of the bundle");
    }
    if (exact) description_ += std::string(", exact INT8 sums (") + kExactEntry + ")";
    for (const auto& provider : options.onnxruntime_session.providers) description_ += ", " + provider.name;
    check_ports(engine);
  }

  std::unique_ptr<Runner> runner() const override {
    // Ort::Session::Run is safe to call from several threads, though not const.
    return std::make_unique<OnnxRuntimeRunner>(*sessions_[next_++ % sessions_.size()], metadata_);
  }

  const std::string& description() const noexcept override { return description_; }

 private:
  // Buffers have the manifest's sizes, so the engine must match it.
  void check_ports(const EngineSource& engine) const {
    const auto same = [](const Ort::TypeInfo& type, const Port& port) {
      if (type.GetONNXType() != ONNX_TYPE_TENSOR) return false;
      const auto info = type.GetTensorTypeAndShapeInfo();
      const auto shape = info.GetShape();
      return info.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT && shape.size() == port.shape.size() &&
             std::equal(shape.begin(), shape.end(), port.shape.begin());  // -1 where the size is dynamic
    };
    bool good = false;
    try {
      const Ort::Session& session = *sessions_.front();
      Ort::AllocatorWithDefaultOptions allocator;
      good = session.GetInputCount() == 1 && session.GetOutputCount() == 1 + metadata_.further_outputs.size() &&
             session.GetInputNameAllocated(0, allocator).get() == metadata_.input.name &&
             same(session.GetInputTypeInfo(0), metadata_.input);
      const auto ports = outputs_of(metadata_);
      for (std::size_t i = 0; good && i < ports.size(); ++i) {
        good = session.GetOutputNameAllocated(i, allocator).get() == ports[i].name &&
               same(session.GetOutputTypeInfo(i), ports[i]);
      }
    } catch (const Ort::Exception&) {
    }
    if (!good) {
      throw Error(ErrorCode::bundle, engine.file.path.string() +
                                         ": its input and output are not those of the manifest: export the bundle again");
    }
  }

  Metadata metadata_;
  std::string description_;
  std::vector<std::unique_ptr<Ort::Session>> sessions_;  // destroying even an empty Ort::Session needs the library
  mutable std::atomic<std::size_t> next_{0};             // session of the next context
};

}  // namespace

std::unique_ptr<Backend> open_onnxruntime(const EngineSource& engine, const EngineInfo& info,
                                          const Metadata& metadata, const Options& options) {
  return std::make_unique<OnnxRuntimeBackend>(engine, info, metadata, options);
}

}  // namespace export_zoo::detail
