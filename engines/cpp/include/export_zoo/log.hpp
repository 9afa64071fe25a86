#pragma once

#include <functional>
#include <string_view>

#include <export_zoo/visibility.hpp>

namespace export_zoo {

enum class Severity { warning, error };

/// Gets a message of a runtime: "ONNX Runtime", "OpenVINO" or "TensorRT". It is called from any thread, also from several
/// at once, until the function that it came from returns. What it throws is dropped. It must not call this library.
using Log = std::function<void(Severity severity, std::string_view runtime, std::string_view message)>;

/// Sends what runtimes log from now on to `log`, warnings and errors. Without one, which is the default, errors are written
/// to the standard error output, one line each, and warnings are dropped. Failures are thrown as Error in any case.
EXPORT_ZOO_API void set_log(Log log);

}  // namespace export_zoo
