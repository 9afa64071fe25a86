// A shared library, loaded with dlopen and never unloaded.
#pragma once

#include <filesystem>
#include <span>
#include <string>

namespace export_zoo::detail {

class Library {
 public:
  // Loads the library at `given`. If that is empty, loads the one that the environment variable names. Otherwise, loads
  // the first of `names` that the system's loader finds. Instead of a library, its directory may be given: the file in
  // it then begins with the last of `names`. Throws Error (backend_missing) with what was tried.
  Library(const std::filesystem::path& given, const char* variable, std::span<const char* const> names,
          const std::string& what);

  // Throws Error (backend_version) if the library lacks the symbol.
  [[nodiscard]] void* symbol(const char* name) const;

  // nullptr if the library lacks the symbol.
  [[nodiscard]] void* find(const char* name) const noexcept;

  [[nodiscard]] const std::string& path() const noexcept { return path_; }

 private:
  void* handle_ = nullptr;
  std::string path_;
};

// Throws Error (backend_version) if `given` is not empty and is another library than the `loaded` one: a process keeps
// the first one.
void refuse_another(const std::filesystem::path& given, const std::string& loaded, const std::string& what);

}  // namespace export_zoo::detail
