#include "exif.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <utility>

namespace export_zoo::detail {

namespace {

// Reads integers of a TIFF structure in its byte order.
class Reader {
 public:
  Reader(std::span<const std::uint8_t> bytes, bool little) : bytes_(bytes), little_(little) {}

  [[nodiscard]] std::optional<std::uint32_t> read(std::size_t at, std::size_t size) const {
    if (at > bytes_.size() || size > bytes_.size() - at) return std::nullopt;
    std::uint32_t value = 0;
    for (std::size_t i = 0; i < size; ++i) {
      value = value << 8 | bytes_[at + (little_ ? size - 1 - i : i)];
    }
    return value;
  }

 private:
  std::span<const std::uint8_t> bytes_;
  bool little_;
};

}  // namespace

std::optional<int> exif_orientation(std::span<const std::uint8_t> tiff) {
  constexpr std::array<std::uint8_t, 6> kExif{'E', 'x', 'i', 'f', 0, 0};
  while (tiff.size() >= kExif.size() && std::equal(kExif.begin(), kExif.end(), tiff.begin())) {
    tiff = tiff.subspan(kExif.size());  // PNG has no need of it, but some writers put it there
  }
  if (tiff.size() < 8) return std::nullopt;
  const bool little = tiff[0] == 'I' && tiff[1] == 'I';
  if (!little && !(tiff[0] == 'M' && tiff[1] == 'M')) return std::nullopt;
  const Reader reader(tiff, little);
  const auto directory = reader.read(4, 4);
  if (!directory) return std::nullopt;
  const auto count = reader.read(*directory, 2);
  if (!count) return std::nullopt;
  for (std::size_t i = 0; i < *count; ++i) {
    const std::size_t entry = std::size_t{*directory} + 2 + 12 * i;
    const auto tag = reader.read(entry, 2);
    if (!tag) return std::nullopt;
    if (*tag != 0x0112) continue;
    // Sizes of TIFF's integers, by type; the first of several values counts, as in Pillow.
    constexpr std::array<std::size_t, 14> kSizes{0, 0, 0, 2, 4, 0, 1, 0, 2, 4, 0, 0, 0, 4};
    const auto type = reader.read(entry + 2, 2);
    const auto values = reader.read(entry + 4, 4);
    if (!type || !values || *type >= kSizes.size() || kSizes[*type] == 0 || *values == 0) return std::nullopt;
    const std::size_t size = kSizes[*type];
    std::optional<std::uint32_t> at = static_cast<std::uint32_t>(entry + 8);
    if (size * *values > 4) {
      at = reader.read(entry + 8, 4);
      if (!at || !reader.read(*at + size * *values - 1, 1)) return std::nullopt;
    }
    const auto value = reader.read(*at, size);
    return value ? std::optional(static_cast<int>(*value & 0xFFFF)) : std::nullopt;
  }
  return std::nullopt;
}

std::optional<int> xmp_orientation(std::string_view packet) {
  constexpr std::string_view kName = "tiff:Orientation";
  for (auto at = packet.find(kName); at != std::string_view::npos; at = packet.find(kName, at + 1)) {
    auto rest = packet.substr(at + kName.size());
    if (rest.starts_with("=\"")) {
      rest.remove_prefix(2);
    } else if (rest.starts_with(">")) {
      rest.remove_prefix(1);
    } else {
      continue;
    }
    if (!rest.empty() && rest[0] >= '0' && rest[0] <= '9') return rest[0] - '0';
  }
  return std::nullopt;
}

Image upright(Image image, int orientation) {
  if (orientation < 2 || orientation > 8) return image;
  const bool swapped = orientation >= 5;
  Image turned{swapped ? image.height : image.width, swapped ? image.width : image.height, {}};
  turned.rgb.resize(image.rgb.size());
  const auto width = static_cast<std::size_t>(image.width);
  const auto height = static_cast<std::size_t>(image.height);
  auto* to = turned.rgb.data();
  for (std::size_t y = 0; y < static_cast<std::size_t>(turned.height); ++y) {
    for (std::size_t x = 0; x < static_cast<std::size_t>(turned.width); ++x) {
      // Position of this pixel in the stored image.
      std::size_t column = swapped ? y : x;
      std::size_t row = swapped ? x : y;
      if (orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8) column = width - 1 - column;
      if (orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7) row = height - 1 - row;
      const auto* from = image.rgb.data() + (row * width + column) * 3;
      *to++ = from[0];
      *to++ = from[1];
      *to++ = from[2];
    }
  }
  return turned;
}

}  // namespace export_zoo::detail
