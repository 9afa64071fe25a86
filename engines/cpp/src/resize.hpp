// Pillow's antialiased resize, to the bit.
#pragma once

#include <cstdint>
#include <vector>

#include <export_zoo/preprocess.hpp>

namespace export_zoo::detail {

// The part [top, top + rows) x [left, left + columns) of the image resized to width x height, RGB row by row.
//
// Two passes with 22-bit fixed-point weights of a triangle or Keys cubic (a = -0.5) filter, as wide as the image shrinks,
// rounded to 8 bits between them. `pillow`: from 13 on the pass that leaves less to do comes first.
std::vector<std::uint8_t> resize(const Image& image, int width, int height, int top, int left, int rows, int columns,
                                 PreprocessOptions::Interpolation interpolation, int pillow);

}  // namespace export_zoo::detail
