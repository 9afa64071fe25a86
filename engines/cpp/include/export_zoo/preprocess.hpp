#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include <export_zoo/metadata.hpp>
#include <export_zoo/visibility.hpp>

namespace export_zoo {

/// An upright 8-bit RGB image, row by row, 3 bytes a pixel.
struct Image {
  int width = 0;
  int height = 0;
  std::vector<std::uint8_t> rgb;
};

/// Where Pillow, too, refuses a file as a decompression bomb.
inline constexpr std::uint64_t kMostPixels = 178'956'970;

/// JPEG or PNG bytes to an image, with the pixels that Pillow decodes: EXIF (or XMP) orientation applied, grayscale,
/// palette and CMYK converted, alpha dropped, 16-bit cut to its high byte. Throws Error (image): another format, damaged,
/// truncated, or more than `most_pixels`. While it is decoded each pixel takes 3 bytes of memory, 6 where the image must be
/// turned, 7 of a CMYK JPEG; a progressive JPEG holds its coefficients, too: up to 9 bytes, 12 turned, 15 of CMYK.
[[nodiscard]] EXPORT_ZOO_API Image decode(std::span<const std::byte> file, std::uint64_t most_pixels = kMostPixels);

/// The same options for inputs of another size, of a bundle with dynamic ones: the resize keeps its proportion to the crop,
/// as Python's preprocess(images, size=...) does. Throws Error (shape) where a side is not 1 to 65,500.
[[nodiscard]] EXPORT_ZOO_API PreprocessOptions at_size(PreprocessOptions options, InputSize size);

/// Images to the network's input, with the bits that torchvision's eval transforms and Pillow make of them at export.
class EXPORT_ZOO_API Preprocessor {
 public:
  /// Throws Error (shape) where a size is not 1 to 65,500, or where mean or std_dev cannot be (std_dev is above 0).
  explicit Preprocessor(const PreprocessOptions& options);

  /// Values of one image: 3 * height * width.
  [[nodiscard]] std::size_t size() const noexcept;

  /// Write one image's values, NCHW float32, to `out`, which holds size() of them. Throws Error (image, shape).
  void operator()(const Image& image, std::span<float> out) const;

  /// The same from JPEG or PNG bytes.
  void operator()(std::span<const std::byte> file, std::span<float> out) const;

 private:
  PreprocessOptions options_;
  std::vector<float> table_;  // of the 256 values of each channel
};

}  // namespace export_zoo
