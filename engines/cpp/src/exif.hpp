// The orientation that a camera noted, as Pillow reads it.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

#include <export_zoo/preprocess.hpp>

namespace export_zoo::detail {

// Tag 0x0112 of a TIFF header's first directory; none if it is not there or cannot be read.
std::optional<int> exif_orientation(std::span<const std::uint8_t> tiff);

// tiff:Orientation of an XMP packet.
std::optional<int> xmp_orientation(std::string_view packet);

// The image turned upright: EXIF 2.32, table 6, values 1 to 8; others leave it as it is.
Image upright(Image image, int orientation);

}  // namespace export_zoo::detail
