#pragma once

#include <cstdint>
#include <span>
#include <string>

#include <export_zoo/preprocess.hpp>

namespace export_zoo::detail {

// Throws Error (image) if the image has more than `most_pixels`, or a side of more than 1,000,000.
void refuse_bomb(std::uint64_t width, std::uint64_t height, std::uint64_t most_pixels);

// Return an upright image. Throw Error (image).
Image decode_jpeg(std::span<const std::uint8_t> file, std::uint64_t most_pixels);
Image decode_png(std::span<const std::uint8_t> file, std::uint64_t most_pixels);

}  // namespace export_zoo::detail
