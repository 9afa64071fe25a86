#pragma once

#include <cstdint>
#include <span>
#include <string>

#include <export_zoo/preprocess.hpp>

namespace export_zoo::detail {

// Pillow refuses more pixels than twice its MAX_IMAGE_PIXELS as a decompression bomb.
inline constexpr std::uint64_t kMostPixels = 2 * (1024ULL * 1024 * 1024 / 4 / 3);

// Throws Error (image).
void refuse_bomb(std::uint64_t width, std::uint64_t height);

// An upright image. Throw Error (image).
Image decode_jpeg(std::span<const std::uint8_t> file);
Image decode_png(std::span<const std::uint8_t> file);

}  // namespace export_zoo::detail
