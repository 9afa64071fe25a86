// Pillow's antialiased resize, to the bit.
#pragma once

#include <cstdint>
#include <vector>

#include <export_zoo/preprocess.hpp>

namespace export_zoo::detail {

// Resizes the image, whose stride is not 0, to width x height and returns the part [top, top + rows) x
// [left, left + columns), row by row, in the image's order.
//
// Two passes with 22-bit fixed-point weights, rounded to 8 bits between them. The filter is a triangle or a Keys cubic
// (a = -0.5), widened by the factor by which the image shrinks. `pillow` is Pillow's major version: from 13 on, the
// pass that leaves less work comes first.
std::vector<std::uint8_t> resize(const ImageView& image, int width, int height, int top, int left, int rows, int columns,
                                 PreprocessOptions::Interpolation interpolation, int pillow);

}  // namespace export_zoo::detail
