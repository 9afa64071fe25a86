#include <export_zoo/error.hpp>

namespace export_zoo {

Error::Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}

Error::~Error() = default;  // defined here, so that there is one vtable

const char* name(ErrorCode code) noexcept {
  switch (code) {
    case ErrorCode::bundle:
      return "bundle";
    case ErrorCode::checksum:
      return "checksum";
    case ErrorCode::state:
      return "state";
    case ErrorCode::backend_missing:
      return "backend_missing";
    case ErrorCode::backend_version:
      return "backend_version";
    case ErrorCode::device:
      return "device";
    case ErrorCode::shape:
      return "shape";
    case ErrorCode::image:
      return "image";
    case ErrorCode::runtime:
      return "runtime";
    case ErrorCode::cpu:
      return "cpu";
    case ErrorCode::cancelled:
      return "cancelled";
  }
  return "unknown";
}

}  // namespace export_zoo
