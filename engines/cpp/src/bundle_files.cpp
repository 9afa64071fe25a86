#include "bundle_files.hpp"

#include <export_zoo/error.hpp>

namespace export_zoo::detail {

namespace fs = std::filesystem;

std::optional<Source> DirectoryFiles::find(const std::string& file) const {
  std::error_code error;
  if (!fs::exists(path(file), error)) return std::nullopt;
  return Source{path(file)};
}

std::vector<std::string> DirectoryFiles::list(const std::string& folder) const {
  std::vector<std::string> found;
  std::error_code error;
  for (fs::directory_iterator entry(path(folder), error), end; !error && entry != end; entry.increment(error)) {
    found.push_back(folder + "/" + entry->path().filename().string());
  }
  return found;
}

std::string DirectoryFiles::why_no_bundle() const {
  std::error_code error;
  const std::string why = fs::is_directory(directory_, error) ? "no manifest.json in it"
                          : fs::exists(directory_, error)     ? "it is a file"
                                                              : "there is no such directory";
  return why + "): pass the directory that `export-zoo export` wrote";
}

MemoryFiles::MemoryFiles(const Files& files) : files_(files) {
  for (const auto& [file, bytes] : files) {
    const fs::path path(file);
    // Not normalized: two paths might become one.
    if (file.empty() || path.is_absolute() || file.find('\\') != std::string::npos ||
        path.lexically_normal().string() != file || *path.begin() == "..") {
      throw Error(ErrorCode::bundle, "the bundle in memory: '" + file +
                                         "' is not a path within a bundle: give paths such as manifest.json and "
                                         "files/model.onnx");
    }
  }
}

std::optional<Source> MemoryFiles::find(const std::string& file) const {
  const auto found = files_.find(fs::path(file).lexically_normal().string());
  if (found == files_.end()) return std::nullopt;
  return Source{file, found->second};
}

std::vector<std::string> MemoryFiles::list(const std::string& folder) const {
  const auto start = folder + "/";
  std::vector<std::string> found;
  for (auto entry = files_.lower_bound(start); entry != files_.end() && entry->first.starts_with(start); ++entry) {
    if (entry->first.find('/', start.size()) == std::string::npos) found.push_back(entry->first);
  }
  return found;
}

std::string MemoryFiles::why_no_bundle() const {
  return "no manifest.json among " + std::to_string(files_.size()) +
         " files): give all files of the bundle, by their paths within it";
}

}  // namespace export_zoo::detail
