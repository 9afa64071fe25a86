// The orientation in an image's EXIF or XMP metadata, as Pillow reads it.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

#include <export_zoo/preprocess.hpp>

namespace export_zoo::detail {

// Tag 0x0112 in the first directory of a TIFF header; nullopt if it is missing or cannot be read.
std::optional<int> exif_orientation(std::span<const std::uint8_t> tiff);

// tiff:Orientation of an XMP packet; nullopt if it is missing.
std::optional<int> xmp_orientation(std::string_view packet);

// Turns the image upright: EXIF 2.32, table 6, values 1 to 8. Other values leave it unchanged.
Image upright(Image image, int orientation);

}  // namespace export_zoo::detail
