#include "files.hpp"

#include <cstdint>
#include <fstream>
#include <stdexcept>
#include <string>

#include <nlohmann/json.hpp>

namespace export_zoo::detail {

namespace {

constexpr std::uintmax_t kMostBytes = 8 << 20;  // parsed, JSON takes twenty times as much memory
constexpr int kMostDeep = 64;

}  // namespace

nlohmann::json read_json(const std::filesystem::path& path) {
  std::error_code error;
  if (!std::filesystem::is_regular_file(path, error)) {  // reading a pipe would block
    throw std::runtime_error(error ? error.message() : "not a file");
  }
  if (std::filesystem::file_size(path, error) > kMostBytes || error) throw std::runtime_error("too large");
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot be read: check its permissions");
  const auto shallow = [](int depth, nlohmann::json::parse_event_t, nlohmann::json&) {
    if (depth > kMostDeep) throw std::runtime_error("nested too deep");  // the code that uses it is recursive
    return true;
  };
  try {
    return nlohmann::json::parse(file, shallow);
  } catch (const nlohmann::json::exception& damage) {
    throw std::runtime_error(damage.what());
  }
}

}  // namespace export_zoo::detail
