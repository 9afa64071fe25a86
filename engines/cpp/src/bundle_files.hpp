// The files of a bundle, in a directory or in memory.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include <export_zoo/metadata.hpp>

#include "files.hpp"

namespace export_zoo::detail {

// Paths are relative to the bundle, with '/'.
class BundleFiles {
 public:
  BundleFiles() = default;
  BundleFiles(const BundleFiles&) = delete;
  BundleFiles& operator=(const BundleFiles&) = delete;
  virtual ~BundleFiles() = default;

  // The bundle, for messages.
  [[nodiscard]] virtual std::string name() const = 0;

  [[nodiscard]] virtual bool in_memory() const = 0;

  // The path that messages about a file begin with.
  [[nodiscard]] virtual std::filesystem::path path(const std::string& file) const = 0;

  // nullopt if there is no such file.
  [[nodiscard]] virtual std::optional<Source> find(const std::string& file) const = 0;

  // Paths of the files in a folder, without those in folders below it.
  [[nodiscard]] virtual std::vector<std::string> list(const std::string& folder) const = 0;

  // For the message if there is no manifest.json: why, and the next step.
  [[nodiscard]] virtual std::string why_no_bundle() const = 0;
};

class DirectoryFiles final : public BundleFiles {
 public:
  explicit DirectoryFiles(std::filesystem::path directory) : directory_(std::move(directory)) {}

  [[nodiscard]] std::string name() const override { return directory_.string(); }
  [[nodiscard]] bool in_memory() const override { return false; }
  [[nodiscard]] std::filesystem::path path(const std::string& file) const override { return directory_ / file; }
  [[nodiscard]] std::optional<Source> find(const std::string& file) const override;
  [[nodiscard]] std::vector<std::string> list(const std::string& folder) const override;
  [[nodiscard]] std::string why_no_bundle() const override;

 private:
  std::filesystem::path directory_;
};

// `files` must outlive it.
class MemoryFiles final : public BundleFiles {
 public:
  // Throws Error (bundle) if a path is not one within a bundle.
  explicit MemoryFiles(const Files& files);

  [[nodiscard]] std::string name() const override { return "the bundle in memory"; }
  [[nodiscard]] bool in_memory() const override { return true; }
  [[nodiscard]] std::filesystem::path path(const std::string& file) const override { return file; }
  [[nodiscard]] std::optional<Source> find(const std::string& file) const override;
  [[nodiscard]] std::vector<std::string> list(const std::string& folder) const override;
  [[nodiscard]] std::string why_no_bundle() const override;

 private:
  const Files& files_;
};

}  // namespace export_zoo::detail
