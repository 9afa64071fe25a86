#pragma once

#include <stdexcept>
#include <string>

#include <export_zoo/visibility.hpp>

namespace export_zoo {

/// Kind of error, for programs. The message tells people what to do.
enum class ErrorCode {
  bundle,           ///< not a bundle, or its manifest is damaged or of another version
  checksum,         ///< a file is missing, or is not the one that the manifest describes
  state,            ///< the bundle failed its parity gate, or the engine did not reach the required state
  backend_missing,  ///< the runtime library was not found, or no engine can run here
  backend_version,  ///< the runtime library is too old, or is not the version that built the engine
  device,           ///< no such GPU here
  shape,            ///< wrong number of values, or a batch outside the verified range
  image,            ///< bytes that cannot be decoded to an 8-bit RGB image
  runtime,          ///< the runtime library failed
  cpu,              ///< on this CPU the INT8 engine's logits would differ from the verified ones
  cancelled,        ///< Context::cancel() was called
};

/// The only exception that the library throws, std::bad_alloc aside.
class EXPORT_ZOO_API Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message);
  ~Error() override;

  [[nodiscard]] ErrorCode code() const noexcept { return code_; }

 private:
  ErrorCode code_;
};

/// "bundle", "checksum", ...
[[nodiscard]] EXPORT_ZOO_API const char* name(ErrorCode code) noexcept;

}  // namespace export_zoo
