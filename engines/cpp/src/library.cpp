#include "library.hpp"

#include <cstdlib>
#include <string_view>

#include <dlfcn.h>

#include <export_zoo/error.hpp>

namespace export_zoo::detail {

namespace {

namespace fs = std::filesystem;

// The library that is meant: in a directory, the file whose name begins with `name`. Of several, the first in order of
// their names, so that a link without a version comes before what it points to.
fs::path library_at(const fs::path& given, std::string_view name) {
  std::error_code error;
  fs::path found;
  for (auto entry = fs::directory_iterator(given, error); !error && entry != fs::end(entry); entry.increment(error)) {
    const auto& path = entry->path();
    const bool fits = path.filename().string().starts_with(name) && fs::is_regular_file(path, error);
    if (fits && (found.empty() || path < found)) found = path;
  }
  if (!found.empty()) return fs::absolute(found);
  // dlopen looks up a bare name among the system's libraries only.
  return fs::exists(given, error) ? fs::absolute(given) : given;
}

}  // namespace

void refuse_another(const fs::path& given, const std::string& loaded, const std::string& what) {
  std::error_code unknown;
  if (given.empty() || given == fs::path(loaded) || fs::equivalent(given, loaded, unknown) ||
      fs::equivalent(given, fs::path(loaded).parent_path(), unknown)) {
    return;
  }
  throw Error(ErrorCode::backend_version, "this process already runs " + what + " from " + loaded +
                                              ", and cannot load " + given.string() +
                                              " beside it: give the same path everywhere");
}

Library::Library(const std::filesystem::path& given, const char* variable, std::span<const char* const> names,
                 const std::string& what) {
  const char* named = std::getenv(variable);
  std::string tried;
  const auto attempt = [&](const std::string& path) {
    // Never unloaded: runtimes leave threads and thread-local destructors behind.
    handle_ = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    std::error_code unknown;
    if (handle_ == nullptr) {
      const auto why = fs::is_directory(path, unknown) ? path + ": there is no " + names.back() + " in it" : dlerror();
      tried += (tried.empty() ? "" : "; ") + why;
    }
    path_ = path;
    return handle_ != nullptr;
  };
  if (!given.empty()) {
    attempt(library_at(given, names.back()));
  } else if (named != nullptr && *named != '\0') {
    attempt(library_at(named, names.back()));
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

void* Library::find(const char* name) const noexcept { return dlsym(handle_, name); }

void* Library::symbol(const char* name) const {
  void* found = find(name);
  if (found == nullptr) {
    throw Error(ErrorCode::backend_version, path_ + ": has no symbol " + name +
                                                ", so it is not the expected library: give the right path");
  }
  return found;
}

}  // namespace export_zoo::detail
