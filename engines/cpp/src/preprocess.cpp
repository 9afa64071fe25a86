#include <export_zoo/preprocess.hpp>

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include <export_zoo/error.hpp>

#include "resize.hpp"

namespace export_zoo {

namespace {

// JPEG's own limit. Without it, a resized strip of 1 x 30,000 pixels would take gigabytes.
constexpr std::int64_t kMaxSide = 65500;

// The luma of each pixel as Pillow's convert("L") computes it (ITU-R 601-2, in 16-bit fixed point), in all three
// channels: the resize treats channels alike, so that one of them is the resized gray image.
Image luma(const ImageView& image) {
  const auto pixels = static_cast<std::size_t>(image.width) * static_cast<std::size_t>(image.height);
  Image gray{image.width, image.height, std::vector<std::uint8_t>(3 * pixels)};
  const int red = image.order == ImageView::Order::rgb ? 0 : 2;
  auto* to = gray.rgb.data();
  for (int y = 0; y < image.height; ++y) {
    const auto* from = image.pixels + y * image.stride;
    for (int x = 0; x < image.width; ++x, from += 3, to += 3) {
      const auto value = (19595U * from[red] + 38470U * from[1] + 7471U * from[2 - red] + 0x8000U) >> 16U;
      to[0] = to[1] = to[2] = static_cast<std::uint8_t>(value);
    }
  }
  return gray;
}

// `image` outlives the view.
ImageView view_of(const Image& image) {
  return {image.rgb.data(), image.width, image.height, std::ptrdiff_t{3} * image.width, ImageView::Order::rgb};
}

}  // namespace

PreprocessOptions at_size(PreprocessOptions options, InputSize size) {
  const int shorter = std::min(options.crop_height, options.crop_width);
  if (shorter < 1 || size.height < 1 || size.width < 1 || size.height > kMaxSide || size.width > kMaxSide) {
    throw Error(ErrorCode::shape, "preprocess: invalid size of " + std::to_string(size.height) + "x" +
                                      std::to_string(size.width) + " pixels: give sides of 1 to " +
                                      std::to_string(kMaxSide) + ", and the options of a bundle");
  }
  // As in Python: divide first, and round half to even.
  const double ratio = static_cast<double>(options.resize_size) / shorter;
  const double resized = std::nearbyint(static_cast<double>(std::min(size.height, size.width)) * ratio);
  // Preprocessor refuses a size that is too large.
  options.resize_size = static_cast<int>(std::clamp(resized, 1.0, static_cast<double>(kMaxSide) + 1));
  options.crop_height = static_cast<int>(size.height);
  options.crop_width = static_cast<int>(size.width);
  return options;
}

Preprocessor::Preprocessor(const PreprocessOptions& options) : options_(options), table_(options.mean.size() * 256) {
  if (!options.unsupported.empty()) throw Error(ErrorCode::shape, "preprocess: " + options.unsupported);
  const auto channels = options.mean.size();
  if (options.std_dev.size() != channels || (channels != 1 && channels != 3)) {
    throw Error(ErrorCode::shape, "preprocess: " + std::to_string(channels) + " values of mean and " +
                                      std::to_string(options.std_dev.size()) +
                                      " of std_dev: give as many of both, one for gray or three for RGB");
  }
  for (const int side : {options.resize_size, options.crop_height, options.crop_width}) {
    if (side < 1 || side > kMaxSide) {
      throw Error(ErrorCode::shape, "preprocess: invalid side of " + std::to_string(side) +
                                        " pixels: take the options of a bundle");
    }
  }
  for (std::size_t channel = 0; channel < channels; ++channel) {
    const float mean = options.mean.at(channel);
    const float std_dev = options.std_dev.at(channel);
    if (!std::isfinite(mean) || !std::isfinite(std_dev) || std_dev <= 0) {
      throw Error(ErrorCode::shape, "preprocess: mean " + std::to_string(mean) + " and std_dev " +
                                        std::to_string(std_dev) + ": std_dev must be above 0, both finite: take the options of a bundle");
    }
    for (std::size_t value = 0; value < 256; ++value) {
      // Each step is rounded to float, as in torchvision.
      const float scaled = static_cast<float>(value) / 255.0F;
      const float centred = scaled - mean;
      table_[channel * 256 + value] = centred / std_dev;
    }
  }
}

std::size_t Preprocessor::size() const noexcept {
  return options_.mean.size() * static_cast<std::size_t>(options_.crop_height) *
         static_cast<std::size_t>(options_.crop_width);
}

void Preprocessor::operator()(const Image& image, std::span<float> out) const {
  if (image.width < 1 || image.height < 1 ||
      image.rgb.size() != std::size_t{3} * static_cast<std::size_t>(image.width) *
                              static_cast<std::size_t>(image.height)) {
    throw Error(ErrorCode::image, "an image of " + std::to_string(image.width) + "x" + std::to_string(image.height) +
                                      " has " + std::to_string(image.rgb.size()) + " bytes, not 3 per pixel");
  }
  (*this)(view_of(image), out);
}

void Preprocessor::operator()(const ImageView& given, std::span<float> out) const {
  if (out.size() != size()) {
    throw Error(ErrorCode::shape, "the output has space for " + std::to_string(out.size()) +
                                      " values, one image needs " + std::to_string(size()));
  }
  auto image = given;
  const auto packed = std::ptrdiff_t{3} * image.width;
  if (image.stride == 0) image.stride = packed;
  if (image.pixels == nullptr || image.width < 1 || image.height < 1 || std::abs(image.stride) < packed) {
    throw Error(ErrorCode::image, "a view of " + std::to_string(image.width) + "x" + std::to_string(image.height) +
                                      " pixels whose rows are " + std::to_string(image.stride) +
                                      " bytes apart: give pixels, a width and height of 1 or more, and a stride of at "
                                      "least 3 bytes a pixel");
  }
  const std::int64_t longer = std::max(image.width, image.height);
  const std::int64_t shorter = std::min(image.width, image.height);
  const std::int64_t crop = std::min(options_.crop_height, options_.crop_width);
  // torchvision divides floating-point numbers and truncates.
  const auto resized = static_cast<std::int64_t>(static_cast<double>(options_.resize_size * longer) /
                                                 static_cast<double>(shorter));
  if (!options_.squash && resized > kMaxSide) {
    throw Error(ErrorCode::image, std::to_string(image.width) + "x" + std::to_string(image.height) +
                                      " is too narrow: the resize would make it " + std::to_string(resized) + " long");
  }
  int width = image.width <= image.height ? options_.resize_size : static_cast<int>(resized);
  int height = image.width <= image.height ? static_cast<int>(resized) : options_.resize_size;
  if (options_.squash) {
    width = static_cast<int>(std::int64_t{options_.resize_size} * options_.crop_width / crop);
    height = static_cast<int>(std::int64_t{options_.resize_size} * options_.crop_height / crop);
    if (std::max(width, height) > kMaxSide) {
      throw Error(ErrorCode::shape, "preprocess: a resize to " + std::to_string(width) + "x" + std::to_string(height) +
                                        " pixels: take the options of a bundle");
    }
  }
  const int crop_height = options_.crop_height;
  const int crop_width = options_.crop_width;
  // An image that is smaller than the crop gets a black border, with the odd pixel below and to the right.
  const int above = std::max(crop_height - height, 0) / 2;
  const int before = std::max(crop_width - width, 0) / 2;
  const int rows = std::min(height, crop_height);
  const int columns = std::min(width, crop_width);
  // Rounds half to even, as Python does.
  const int top = static_cast<int>(std::nearbyint((height - rows) / 2.0));
  const int left = static_cast<int>(std::nearbyint((width - columns) / 2.0));
  const bool gray = options_.mean.size() == 1;
  const auto resized_to = [&](const ImageView& from) {
    return detail::resize(from, width, height, top, left, rows, columns, options_.interpolation, options_.pillow);
  };
  const auto pixels = gray ? resized_to(view_of(luma(image))) : resized_to(image);
  const auto area = static_cast<std::size_t>(crop_height) * static_cast<std::size_t>(crop_width);
  for (std::size_t channel = 0; channel < options_.mean.size(); ++channel) {
    const float* table = table_.data() + channel * 256;
    float* plane = out.data() + channel * area;
    const auto place = image.order == ImageView::Order::rgb || gray ? channel : 2 - channel;
    if (rows < crop_height || columns < crop_width) std::fill_n(plane, area, table[0]);
    for (int y = 0; y < rows; ++y) {
      const auto* from = pixels.data() + (static_cast<std::size_t>(y) * static_cast<std::size_t>(columns)) * 3 + place;
      float* to = plane + static_cast<std::size_t>(above + y) * static_cast<std::size_t>(crop_width) +
                  static_cast<std::size_t>(before);
      for (int x = 0; x < columns; ++x) to[x] = table[from[static_cast<std::size_t>(x) * 3]];
    }
  }
}

void Preprocessor::operator()(std::span<const std::byte> file, std::span<float> out) const { (*this)(decode(file), out); }

}  // namespace export_zoo
