#include <algorithm>
#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <optional>
#include <string_view>

#include <jpeglib.h>  // after cstdio, which it needs

#include <export_zoo/error.hpp>

#include "decode.hpp"
#include "exif.hpp"

namespace export_zoo::detail {

namespace {

// A progressive file of a few kilobytes can have thousands of empty scans, each a pass over all pixels. Encoders write
// about ten. Half a billion pixels take a third of a second.
constexpr std::uint64_t kMostScans = 500;
constexpr std::uint64_t kUsualScans = 20;
constexpr std::uint64_t kMostScannedPixels = 500'000'000;

struct Failure {
  jpeg_error_mgr base;
  std::jmp_buf jump;
  char message[JMSG_LENGTH_MAX];
  std::uint64_t most_scans = kUsualScans;
};

[[noreturn]] void fail(j_common_ptr info) {
  auto* failure = reinterpret_cast<Failure*>(info->err);
  info->err->format_message(info, failure->message);
  std::longjmp(failure->jump, 1);
}

// libjpeg adds an end marker to a truncated file and fills the rest with grey. Here, a truncated file is an error.
boolean no_more(j_decompress_ptr info) {
  auto* failure = reinterpret_cast<Failure*>(info->err);
  std::strcpy(failure->message, "the file is truncated");
  std::longjmp(failure->jump, 1);
}

void quiet(j_common_ptr) {}

void limit_scans(j_common_ptr common) {
  const auto* info = reinterpret_cast<jpeg_decompress_struct*>(common);
  auto* failure = reinterpret_cast<Failure*>(common->err);
  if (static_cast<std::uint64_t>(info->input_scan_number) <= failure->most_scans) return;
  std::snprintf(failure->message, sizeof failure->message, "more than %llu scans of so many pixels: a decompression bomb?",
                static_cast<unsigned long long>(failure->most_scans));
  std::longjmp(failure->jump, 1);
}

struct Jpeg {
  jpeg_decompress_struct info{};
  Failure failure{};
  jpeg_progress_mgr progress{};
  Jpeg() = default;
  Jpeg(const Jpeg&) = delete;
  Jpeg& operator=(const Jpeg&) = delete;
  ~Jpeg() { jpeg_destroy_decompress(&info); }
};

std::optional<int> orientation_of(const jpeg_decompress_struct& info) {
  constexpr std::string_view kExif("Exif\0\0", 6);
  constexpr std::string_view kXmp("http://ns.adobe.com/xap/1.0/\0", 29);
  std::optional<int> found;
  std::optional<int> from_xmp;
  for (const auto* marker = info.marker_list; marker != nullptr; marker = marker->next) {
    const std::string_view data(reinterpret_cast<const char*>(marker->data), marker->data_length);
    if (marker->marker == JPEG_APP0 + 1 && data.starts_with(kExif) && !found) {
      found = exif_orientation({marker->data + kExif.size(), data.size() - kExif.size()});
    } else if (marker->marker == JPEG_APP0 + 1 && data.starts_with(kXmp)) {
      from_xmp = xmp_orientation(data.substr(kXmp.size()));
    }
  }
  return found ? found : from_xmp;
}

// Pillow treats all four-colour files as Adobe's, which are stored inverted.
void cmyk_to_rgb(const std::uint8_t* from, std::uint8_t* to, std::size_t pixels) {
  for (std::size_t i = 0; i < pixels; ++i, from += 4, to += 3) {
    const int white = from[3];
    for (std::size_t channel = 0; channel < 3; ++channel) {
      const int ink = 255 - from[channel];
      const int product = ink * white + 128;
      to[channel] = static_cast<std::uint8_t>(std::max(0, white - (((product >> 8) + product) >> 8)));
    }
  }
}

// longjmp returns into the functions below, so nothing in them has a destructor.
bool read_header(Jpeg& jpeg, std::span<const std::uint8_t> file) {
  auto& info = jpeg.info;
  info.err = jpeg_std_error(&jpeg.failure.base);
  jpeg.failure.base.error_exit = fail;
  jpeg.failure.base.output_message = quiet;
  if (setjmp(jpeg.failure.jump) != 0) return false;
  jpeg_create_decompress(&info);
  jpeg_mem_src(&info, file.data(), static_cast<unsigned long>(file.size()));
  info.src->fill_input_buffer = no_more;
  jpeg.progress.progress_monitor = limit_scans;
  info.progress = &jpeg.progress;
  jpeg_save_markers(&info, JPEG_APP0 + 1, 0xFFFF);
  jpeg_read_header(&info, TRUE);
  return true;
}

bool read_rows(Jpeg& jpeg, std::uint8_t* rows, std::size_t stride) {
  auto& info = jpeg.info;
  if (setjmp(jpeg.failure.jump) != 0) return false;
  info.out_color_space = info.num_components == 1   ? JCS_GRAYSCALE
                         : info.num_components == 4 ? JCS_CMYK
                                                    : JCS_RGB;
  jpeg_start_decompress(&info);
  while (info.output_scanline < info.output_height) {
    JSAMPROW row = rows + std::size_t{info.output_scanline} * stride;
    jpeg_read_scanlines(&info, &row, 1);
  }
  jpeg_finish_decompress(&info);  // damage after the last row is damage, too, as in Pillow
  return true;
}

}  // namespace

Image decode_jpeg(std::span<const std::uint8_t> file, std::uint64_t most_pixels) {
  const auto jpeg = std::make_unique<Jpeg>();
  const auto check = [&](bool good) {
    if (!good) throw Error(ErrorCode::image, std::string("damaged JPEG: ") + jpeg->failure.message + ": save it again");
  };
  check(read_header(*jpeg, file));
  const auto& info = jpeg->info;
  const auto components = static_cast<std::size_t>(info.num_components);
  if (components != 1 && components != 3 && components != 4) {
    throw Error(ErrorCode::image, "JPEG with " + std::to_string(components) + " colours: convert it to RGB first");
  }
  refuse_bomb(info.image_width, info.image_height, most_pixels);
  // From the markers before the pixels, as in Pillow. They are freed when the pixels have been read.
  const int orientation = orientation_of(info).value_or(1);
  const std::size_t pixels = std::size_t{info.image_width} * info.image_height;
  jpeg->failure.most_scans = std::clamp(kMostScannedPixels / std::max<std::uint64_t>(pixels, 1), kUsualScans, kMostScans);
  Image image{static_cast<int>(info.image_width), static_cast<int>(info.image_height), {}};
  if (components == 3) {
    image.rgb.resize(pixels * 3);
    check(read_rows(*jpeg, image.rgb.data(), std::size_t{info.image_width} * 3));
  } else {
    std::vector<std::uint8_t> raw(pixels * components);
    check(read_rows(*jpeg, raw.data(), std::size_t{info.image_width} * components));
    image.rgb.resize(pixels * 3);
    if (components == 4) {
      cmyk_to_rgb(raw.data(), image.rgb.data(), pixels);
    } else {
      for (std::size_t i = 0; i < pixels; ++i) {
        image.rgb[3 * i] = image.rgb[3 * i + 1] = image.rgb[3 * i + 2] = raw[i];
      }
    }
  }
  return upright(std::move(image), orientation);
}

}  // namespace export_zoo::detail
