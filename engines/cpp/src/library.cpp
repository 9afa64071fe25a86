#include "library.hpp"

#include <cstdlib>

#include <dlfcn.h>

#include <export_zoo/error.hpp>

namespace export_zoo::detail {

Library::Library(const std::filesystem::path& given, const char* variable, std::span<const char* const> names,
                 const std::string& what) {
  const char* named = std::getenv(variable);
  std::string tried;
  const auto attempt = [&](const std::string& path) {
    // Never unloaded: runtimes leave threads and thread-local destructors behind.
    handle_ = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle_ == nullptr) tried += std::string(tried.empty() ? "" : "; ") + dlerror();
    path_ = path;
    return handle_ != nullptr;
  };
  if (!given.empty()) {
    // dlopen looks up a bare name among the system's libraries only.
    std::error_code error;
    attempt((std::filesystem::exists(given, error) ? std::filesystem::absolute(given) : given).string());
  } else if (named != nullptr && *named != '\0') {
    attempt(named);
  } else {
    for (const char* candidate : names) {
      if (attempt(candidate)) break;
    }
  }
  if (handle_ == nullptr) {
    throw Error(ErrorCode::backend_missing, what + " cannot be loaded (" + tried +
                                                "): install it, or give the library's path in the environment variable " +
                                                variable + ", or in Options");
  }
}

void* Library::symbol(const char* name) const {
  void* found = dlsym(handle_, name);
  if (found == nullptr) {
    throw Error(ErrorCode::backend_version, path_ + ": has no symbol " + name +
                                                ", so it is not the expected library: give the right path");
  }
  return found;
}

}  // namespace export_zoo::detail
