#include "resize.hpp"

#include <algorithm>
#include <cmath>

namespace export_zoo::detail {

namespace {

constexpr int kBits = 32 - 8 - 2;
constexpr std::int32_t kHalf = 1 << (kBits - 1);
constexpr std::size_t kChannels = 3;

double triangle(double x) { return std::max(0.0, 1.0 - std::abs(x)); }

// Keys 1981, a = -0.5.
double cubic(double x) {
  constexpr double a = -0.5;
  x = std::abs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
  return 0.0;
}

// Input pixels of each output pixel, and their weights.
struct Taps {
  std::vector<int> first;
  std::vector<int> count;
  std::vector<std::int32_t> weights;  // `width` for each output pixel
  std::size_t width = 0;

  [[nodiscard]] const std::int32_t* of(std::size_t i) const { return weights.data() + i * width; }
};

// Taps of the output pixels [begin, begin + count) of `out`.
Taps taps(int in, int out, int begin, int count, PreprocessOptions::Interpolation interpolation) {
  const bool is_cubic = interpolation == PreprocessOptions::Interpolation::bicubic;
  const double scale = static_cast<double>(in) / out;
  const double stretch = std::max(scale, 1.0);
  const double support = (is_cubic ? 2.0 : 1.0) * stretch;
  Taps found;
  found.width = static_cast<std::size_t>(std::ceil(support)) * 2 + 1;
  found.weights.resize(static_cast<std::size_t>(count) * found.width);
  std::vector<double> row(found.width);
  for (int i = 0; i < count; ++i) {
    const double center = (begin + i + 0.5) * scale;
    const int first = std::max(0, static_cast<int>(center - support + 0.5));
    const int last = std::min(in, static_cast<int>(center + support + 0.5));
    double sum = 0;
    for (int x = first; x < last; ++x) {
      const double at = (x - center + 0.5) * (1.0 / stretch);
      const double weight = is_cubic ? cubic(at) : triangle(at);
      row[static_cast<std::size_t>(x - first)] = weight;
      sum += weight;
    }
    for (int x = 0; x < last - first; ++x) {
      double weight = row[static_cast<std::size_t>(x)];
      if (sum != 0.0) weight /= sum;
      found.weights[static_cast<std::size_t>(i) * found.width + static_cast<std::size_t>(x)] =
          static_cast<std::int32_t>((weight < 0 ? -0.5 : 0.5) + weight * (1 << kBits));
    }
    found.first.push_back(first);
    found.count.push_back(last - first);
  }
  return found;
}

std::uint8_t to_byte(std::int32_t sum) { return static_cast<std::uint8_t>(std::clamp(sum >> kBits, 0, 255)); }

// Rows of pixels, 3 bytes each.
struct Plane {
  std::vector<std::uint8_t> own;
  const std::uint8_t* data = nullptr;
  std::ptrdiff_t stride = 0;  // bytes from row to row
  int first = 0;  // index of the first row (or column) that it holds
  std::size_t rows = 0;
  std::size_t columns = 0;

  [[nodiscard]] const std::uint8_t* row(std::size_t i) const { return data + static_cast<std::ptrdiff_t>(i) * stride; }
};

Plane make(std::size_t rows, std::size_t columns) {
  Plane plane;
  plane.own.resize(rows * columns * kChannels);
  plane.data = plane.own.data();
  plane.stride = static_cast<std::ptrdiff_t>(columns * kChannels);
  plane.rows = rows;
  plane.columns = columns;
  return plane;
}

Plane across(const Plane& in, const Taps& taps, std::size_t begin, std::size_t rows) {
  auto out = make(rows, taps.first.size());
  out.first = static_cast<int>(begin);
  for (std::size_t y = 0; y < rows; ++y) {
    const auto* line = in.row(begin + y);
    auto* to = out.own.data() + y * out.columns * kChannels;
    for (std::size_t x = 0; x < out.columns; ++x) {
      const auto* weights = taps.of(x);
      const auto* from = line + static_cast<std::size_t>(taps.first[x]) * kChannels;
      std::int32_t red = kHalf;
      std::int32_t green = kHalf;
      std::int32_t blue = kHalf;
      for (int i = 0; i < taps.count[x]; ++i, from += kChannels) {
        red += from[0] * weights[i];
        green += from[1] * weights[i];
        blue += from[2] * weights[i];
      }
      *to++ = to_byte(red);
      *to++ = to_byte(green);
      *to++ = to_byte(blue);
    }
  }
  return out;
}

Plane down(const Plane& in, const Taps& taps) {
  auto out = make(taps.first.size(), in.columns);
  std::vector<std::int32_t> sums(in.columns * kChannels);
  for (std::size_t y = 0; y < out.rows; ++y) {
    std::fill(sums.begin(), sums.end(), kHalf);
    for (int i = 0; i < taps.count[y]; ++i) {
      const auto* line = in.row(static_cast<std::size_t>(taps.first[y] + i - in.first));
      const auto weight = taps.of(y)[i];
      for (std::size_t x = 0; x < sums.size(); ++x) sums[x] += line[x] * weight;
    }
    std::transform(sums.begin(), sums.end(), out.own.begin() + static_cast<std::ptrdiff_t>(y * sums.size()), to_byte);
  }
  return out;
}

// Copies the columns [begin, begin + columns) of each row.
Plane cut(const Plane& in, std::size_t begin, std::size_t columns) {
  auto out = make(in.rows, columns);
  for (std::size_t y = 0; y < in.rows; ++y) {
    std::copy_n(in.row(y) + begin * kChannels, columns * kChannels, out.own.data() + y * columns * kChannels);
  }
  return out;
}

}  // namespace

std::vector<std::uint8_t> resize(const ImageView& image, int width, int height, int top, int left, int rows, int columns,
                                 PreprocessOptions::Interpolation interpolation, int pillow) {
  Plane plane;
  plane.data = image.pixels;
  plane.stride = image.stride;
  plane.rows = static_cast<std::size_t>(image.height);
  plane.columns = static_cast<std::size_t>(image.width);
  const bool horizontal = width != image.width;
  const bool vertical = height != image.height;
  // Fitted to Pillow 13 over many sizes. Each pass rounds, so the order changes the result.
  const bool vertical_first = pillow >= 13 && horizontal && vertical && height < image.height &&
                              image.height - height > 2 * (image.width - width);
  const auto columns_of = [&](const Plane& in, std::size_t begin, std::size_t count) {
    if (!horizontal) {
      auto out = cut(in, static_cast<std::size_t>(left), static_cast<std::size_t>(columns));
      return out;
    }
    return across(in, taps(image.width, width, left, columns, interpolation), begin, count);
  };
  if (!vertical) {
    plane = columns_of(plane, 0, plane.rows);
    const auto begin = plane.own.begin() + static_cast<std::ptrdiff_t>(top) * columns * static_cast<int>(kChannels);
    return {begin, begin + static_cast<std::ptrdiff_t>(rows) * columns * static_cast<int>(kChannels)};
  }
  const auto vertical_taps = taps(image.height, height, top, rows, interpolation);
  if (vertical_first) {
    plane = down(plane, vertical_taps);
    return columns_of(plane, 0, plane.rows).own;
  }
  if (!horizontal) return down(columns_of(plane, 0, plane.rows), vertical_taps).own;
  const auto first = static_cast<std::size_t>(vertical_taps.first.front());
  const auto last = static_cast<std::size_t>(vertical_taps.first.back() + vertical_taps.count.back());
  return down(columns_of(plane, first, last - first), vertical_taps).own;
}

}  // namespace export_zoo::detail
