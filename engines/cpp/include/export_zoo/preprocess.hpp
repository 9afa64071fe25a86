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

/// 8-bit pixels of 3 bytes in memory of others: a cv::Mat, a camera's buffer, shared memory. Nothing is copied.
struct ImageView {
  enum class Order { rgb, bgr };

  const std::uint8_t* pixels = nullptr;  ///< first pixel of the upper row
  int width = 0;
  int height = 0;
  std::ptrdiff_t stride = 0;  ///< bytes from a row to the one below, negative if that comes first; 0: 3 * width
  Order order = Order::rgb;   ///< OpenCV's is bgr
};

/// Maximum number of pixels of an image. Pillow refuses larger files, too, as decompression bombs.
inline constexpr std::uint64_t kMostPixels = 178'956'970;

/// Decodes a JPEG or PNG to the pixels that Pillow decodes. EXIF (or XMP) orientation is applied. Grayscale, palette
/// and CMYK are converted, alpha is dropped, 16-bit values are cut to their high byte. Throws Error (image): another
/// format, damaged, truncated, or more than `most_pixels`.
///
/// Memory per pixel while decoding: 3 bytes; 6 if the image must be turned; 7 for a CMYK JPEG. A progressive JPEG also
/// holds its coefficients: up to 9 bytes; 12 if turned; 15 for CMYK.
[[nodiscard]] EXPORT_ZOO_API Image decode(std::span<const std::byte> file, std::uint64_t most_pixels = kMostPixels);

/// The same options for inputs of another size, for bundles with dynamic height and width. The resize keeps its
/// proportion to the crop, as in Python's preprocess(images, size=...). Throws Error (shape) if a side is not 1 to
/// 65,500.
[[nodiscard]] EXPORT_ZOO_API PreprocessOptions at_size(PreprocessOptions options, InputSize size);

/// Turns images into the network's input, equal to the bit to torchvision's eval transforms and Pillow at export.
class EXPORT_ZOO_API Preprocessor {
 public:
  /// Throws Error (shape) if a size is not 1 to 65,500, if mean or std_dev is not finite, if std_dev is not above 0, if
  /// they are not for one or three channels, or if the options are `unsupported`.
  explicit Preprocessor(const PreprocessOptions& options);

  /// Number of values of one image: channels * height * width.
  [[nodiscard]] std::size_t size() const noexcept;

  /// Writes one image's values, NCHW float32, to `out`, which holds size() values. Throws Error (image, shape).
  void operator()(const Image& image, std::span<float> out) const;

  /// The same from pixels in memory of others. The image must be upright.
  void operator()(const ImageView& image, std::span<float> out) const;

  /// The same from JPEG or PNG bytes.
  void operator()(std::span<const std::byte> file, std::span<float> out) const;

 private:
  PreprocessOptions options_;
  std::vector<float> table_;  // normalized value of each of the 256 levels, by channel
};

}  // namespace export_zoo
