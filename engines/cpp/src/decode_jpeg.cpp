#include <algorithm>
#include <array>
#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <optional>
#include <string_view>
#include <vector>

#include <jpeglib.h>  // after cstdio, which it needs

#include <export_zoo/error.hpp>

#include "decode.hpp"
#include "exif.hpp"

namespace export_zoo::detail {

namespace {

// A progressive file of a few kilobytes can have thousands of empty scans, each a pass over all samples of its components.
// Encoders write about ten scans, of 8 (4:2:0) to 24 (CMYK) samples a pixel in all. Half a billion samples take a third of
// a second with Huffman codes, and 1.4 s with arithmetic ones, which go on where the data has ended.
constexpr int kMostScans = 500;
constexpr std::uint64_t kUsualSamples = 24;
constexpr std::uint64_t kMostSamples = 500'000'000;

struct Failure {
  jpeg_error_mgr base;
  std::jmp_buf jump;
  char message[JMSG_LENGTH_MAX];
  int scan = 0;
  std::uint64_t samples = 0;  // of all scans up to this one
  std::uint64_t most_samples = kMostSamples;
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
  if (info->input_scan_number == failure->scan) return;
  failure->scan = info->input_scan_number;
  for (int i = 0; i < info->comps_in_scan; ++i) {
    const auto* component = info->cur_comp_info[i];
    failure->samples += std::uint64_t{component->width_in_blocks} * component->height_in_blocks * DCTSIZE2;
  }
  if (failure->scan <= kMostScans && failure->samples <= failure->most_samples) return;
  std::snprintf(failure->message, sizeof failure->message, "%d scans of so many pixels: a decompression bomb?", failure->scan);
  std::longjmp(failure->jump, 1);
}

// Views of the file's APP1 segments that may tell of orientation. libjpeg's own list of segments takes time in the square
// of their number, and a segment takes four bytes.
struct Segments {
  std::array<std::string_view, 16> exif;  // one block may lie in several
  std::size_t exifs = 0;
  std::string_view xmp;
};

struct Jpeg {
  jpeg_decompress_struct info{};
  Failure failure{};
  Segments segments{};
  jpeg_progress_mgr progress{};
  Jpeg() = default;
  Jpeg(const Jpeg&) = delete;
  Jpeg& operator=(const Jpeg&) = delete;
  ~Jpeg() { jpeg_destroy_decompress(&info); }
};

constexpr std::string_view kExif("Exif\0\0", 6);
constexpr std::string_view kXmp("http://ns.adobe.com/xap/1.0/\0", 29);

// The whole file lies in memory, so the views stay valid.
boolean note_segment(j_decompress_ptr info) {
  auto& source = *info->src;
  const auto* bytes = source.next_input_byte;
  if (source.bytes_in_buffer < 2) return no_more(info);
  const auto size = std::max(std::size_t{2}, std::size_t{bytes[0]} << 8 | bytes[1]);
  if (size > source.bytes_in_buffer) return no_more(info);
  const std::string_view data(reinterpret_cast<const char*>(bytes) + 2, size - 2);
  auto& segments = static_cast<Jpeg*>(info->client_data)->segments;
  if (data.starts_with(kExif) && segments.exifs < segments.exif.size()) {
    segments.exif[segments.exifs++] = data.substr(kExif.size());
  } else if (data.starts_with(kXmp)) {
    segments.xmp = data.substr(kXmp.size());
  }
  source.next_input_byte += size;
  source.bytes_in_buffer -= size;
  return TRUE;
}

std::optional<int> orientation_of(const Segments& segments) {
  std::vector<std::uint8_t> exif;
  for (const auto& part : segments.exif) exif.insert(exif.end(), part.begin(), part.end());
  if (const auto found = exif_orientation(exif)) return found;
  return xmp_orientation(segments.xmp);
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
  info.client_data = &jpeg;
  jpeg_set_marker_processor(&info, JPEG_APP0 + 1, note_segment);
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
  // From the segments before the pixels, as in Pillow.
  const int orientation = orientation_of(jpeg->segments).value_or(1);
  const std::size_t pixels = std::size_t{info.image_width} * info.image_height;
  if (!info.arith_code) jpeg->failure.most_samples = std::max(kMostSamples, kUsualSamples * pixels);
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
