#include "decode.hpp"

#include <algorithm>
#include <array>

#include <export_zoo/error.hpp>

namespace export_zoo {

namespace {

// libpng takes up to 16 bytes for each pixel of a row, however few rows there are. As libpng's own limit.
constexpr std::uint64_t kMostSide = 1'000'000;

}  // namespace

void detail::refuse_bomb(std::uint64_t width, std::uint64_t height, std::uint64_t most_pixels) {
  if (width * height > most_pixels) {
    throw Error(ErrorCode::image, std::to_string(width) + "x" + std::to_string(height) + " pixels are more than " +
                                      std::to_string(most_pixels) + ": a decompression bomb?");
  }
  if (std::max(width, height) > kMostSide) {
    throw Error(ErrorCode::image, std::to_string(width) + "x" + std::to_string(height) + " has a side of more than " +
                                      std::to_string(kMostSide) + " pixels: a decompression bomb?");
  }
}

Image decode(std::span<const std::byte> file, std::uint64_t most_pixels) {
  const std::span<const std::uint8_t> bytes(reinterpret_cast<const std::uint8_t*>(file.data()), file.size());
  if (bytes.empty()) throw Error(ErrorCode::image, "empty file");
  constexpr std::array<std::uint8_t, 3> kJpeg{0xFF, 0xD8, 0xFF};
  constexpr std::array<std::uint8_t, 8> kPng{0x89, 'P', 'N', 'G', '\r', '\n', 0x1A, '\n'};
  const auto begins = [&](const auto& magic) {
    return bytes.size() >= magic.size() && std::equal(magic.begin(), magic.end(), bytes.begin());
  };
  if (begins(kJpeg)) return detail::decode_jpeg(bytes, most_pixels);
  if (begins(kPng)) return detail::decode_png(bytes, most_pixels);
  throw Error(ErrorCode::image, "neither JPEG nor PNG: convert it first");
}

}  // namespace export_zoo
