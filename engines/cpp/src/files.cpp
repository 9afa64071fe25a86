#include "files.hpp"

#include <fstream>
#include <stdexcept>
#include <streambuf>
#include <string>

#include <nlohmann/json.hpp>

namespace export_zoo::detail {

namespace {

constexpr std::uint64_t kMostBytes = 8 << 20;  // parsed, JSON takes twenty times as much memory
constexpr int kMostDeep = 64;

// C++20 has no stream of existing bytes that does not copy them.
class MemoryBuffer : public std::streambuf {
 public:
  explicit MemoryBuffer(std::span<const std::byte> bytes) {
    // A buffer's pointers are mutable; nothing is written through them.
    auto* begin = const_cast<char*>(reinterpret_cast<const char*>(bytes.data()));
    setg(begin, begin, begin + bytes.size());
  }

 protected:
  pos_type seekoff(off_type offset, std::ios_base::seekdir from, std::ios_base::openmode) override {
    const off_type end = egptr() - eback();
    const off_type start = from == std::ios_base::beg ? 0 : from == std::ios_base::cur ? gptr() - eback() : end;
    if (offset < -start || offset > end - start) return pos_type(off_type(-1));
    setg(eback(), eback() + start + offset, egptr());
    return start + offset;
  }

  pos_type seekpos(pos_type position, std::ios_base::openmode mode) override {
    return seekoff(off_type(position), std::ios_base::beg, mode);
  }
};

class MemoryStream final : private MemoryBuffer, public std::istream {
 public:
  explicit MemoryStream(std::span<const std::byte> bytes)
      : MemoryBuffer(bytes), std::istream(static_cast<std::streambuf*>(this)) {}
};

}  // namespace

std::optional<std::uint64_t> Source::size() const {
  if (bytes) return bytes->size();
  std::error_code error;
  if (!std::filesystem::is_regular_file(path, error)) return std::nullopt;
  const auto found = std::filesystem::file_size(path, error);
  return error ? std::nullopt : std::optional<std::uint64_t>(found);
}

std::unique_ptr<std::istream> Source::open() const {
  if (bytes) return std::make_unique<MemoryStream>(*bytes);
  return std::make_unique<std::ifstream>(path, std::ios::binary);
}

nlohmann::json read_json(const Source& source) {
  const auto size = source.size();
  if (!size) throw std::runtime_error("not a file");
  if (*size > kMostBytes) throw std::runtime_error("too large");
  const auto file = source.open();
  if (!*file) throw std::runtime_error("cannot be read: check its permissions");
  const auto shallow = [](int depth, nlohmann::json::parse_event_t, nlohmann::json&) {
    if (depth > kMostDeep) throw std::runtime_error("nested too deep");  // the code that uses it is recursive
    return true;
  };
  try {
    return nlohmann::json::parse(*file, shallow);
  } catch (const nlohmann::json::exception& damage) {
    throw std::runtime_error(damage.what());
  }
}

}  // namespace export_zoo::detail
