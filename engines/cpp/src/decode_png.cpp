#include <algorithm>
#include <cctype>
#include <csetjmp>
#include <cstring>
#include <optional>
#include <string_view>
#include <vector>

#include <png.h>

#include <export_zoo/error.hpp>

#include "decode.hpp"
#include "exif.hpp"

namespace export_zoo::detail {

namespace {

// After the last row, libpng inflates what follows in search of the end: 8 MB of it can be 8 GB.
constexpr std::size_t kMostTail = 1 << 16;

struct Source {
  std::span<const std::uint8_t> rest;
  png_uint_32 height = PNG_UINT_32_MAX;  // known once the header has been read
  std::size_t tail = 0;                  // bytes read after the last row
  char message[256] = "";
};

void read_bytes(png_structp png, png_bytep to, std::size_t size) {
  auto* source = static_cast<Source*>(png_get_io_ptr(png));
  if (size > source->rest.size()) png_error(png, "the file is truncated");
  constexpr int kPasses = 7;
  if (png_get_current_row_number(png) >= source->height || png_get_current_pass_number(png) >= kPasses) {
    source->tail += size;
    if (source->tail > kMostTail) png_error(png, "there are data after the last row");
  }
  std::memcpy(to, source->rest.data(), size);
  source->rest = source->rest.subspan(size);
}

[[noreturn]] void fail(png_structp png, png_const_charp message) {
  auto* source = static_cast<Source*>(png_get_error_ptr(png));
  std::strncpy(source->message, message, sizeof source->message - 1);
  png_longjmp(png, 1);
}

void quiet(png_structp, png_const_charp) {}

struct Png {
  Source source;
  png_structp png = nullptr;
  png_infop info = nullptr;
  int passes = 1;
  Png() = default;
  Png(const Png&) = delete;
  Png& operator=(const Png&) = delete;
  ~Png() { png_destroy_read_struct(&png, &info, nullptr); }
};

// longjmp returns into the functions below, so nothing in them has a destructor.
bool read_info(Png& reader) {
  reader.png = png_create_read_struct(PNG_LIBPNG_VER_STRING, &reader.source, fail, quiet);
  if (reader.png == nullptr) return false;
  reader.info = png_create_info_struct(reader.png);
  if (reader.info == nullptr) return false;
  if (setjmp(png_jmpbuf(reader.png)) != 0) return false;
  png_set_read_fn(reader.png, &reader.source, read_bytes);
  png_set_user_limits(reader.png, 0x7FFFFFFF, 0x7FFFFFFF);
  // Text and colour profiles are compressed, too. These are Pillow's limits: 1 MiB each, 64 MiB in all.
  png_set_chunk_malloc_max(reader.png, 1 << 20);
  png_set_chunk_cache_max(reader.png, 64);
  png_read_info(reader.png, reader.info);
  return true;
}

// libpng takes memory for a row here.
bool begin(Png& reader) {
  if (setjmp(png_jmpbuf(reader.png)) != 0) return false;
  // Without gamma or background: the stored bytes, widened or cut to 8 bits, with alpha dropped.
  png_set_palette_to_rgb(reader.png);
  png_set_expand_gray_1_2_4_to_8(reader.png);
  png_set_strip_16(reader.png);
  png_set_strip_alpha(reader.png);
  png_set_gray_to_rgb(reader.png);
  reader.passes = png_set_interlace_handling(reader.png);
  png_read_update_info(reader.png, reader.info);
  return true;
}

bool read_rows(Png& reader, png_bytep rows, std::size_t stride) {
  if (setjmp(png_jmpbuf(reader.png)) != 0) return reader.source.tail > kMostTail;  // all rows are there
  const auto height = reader.source.height = png_get_image_height(reader.png, reader.info);
  for (int pass = 0; pass < reader.passes; ++pass) {
    for (std::size_t y = 0; y < height; ++y) png_read_row(reader.png, rows + y * stride, nullptr);
  }
  return true;
}

// The file without its pixels: png_read_end would inflate all that follows the last row, gigabytes in a bomb.
std::vector<std::uint8_t> without_pixels(std::span<const std::uint8_t> file) {
  constexpr std::size_t kSignature = 8;
  constexpr std::size_t kAround = 12;  // a chunk's length, type and checksum
  std::vector<std::uint8_t> rest(file.begin(), file.begin() + kSignature);
  for (auto left = file.subspan(kSignature); left.size() >= kAround;) {
    std::size_t size = 0;
    for (std::size_t i = 0; i < 4; ++i) size = size << 8 | left[i];
    size += kAround;
    if (size > left.size()) break;
    const auto chunk = left.first(size);
    if (std::memcmp(chunk.data() + 4, "IDAT", 4) != 0) rest.insert(rest.end(), chunk.begin(), chunk.end());
    left = left.subspan(size);
  }
  return rest;
}

// Bytes of a profile that was written as hexadecimal text, without its three header lines.
std::vector<std::uint8_t> from_hex(std::string_view text) {
  for (int line = 0; line < 3; ++line) {
    const auto end = text.find('\n');
    if (end == std::string_view::npos) return {};
    text.remove_prefix(end + 1);
  }
  std::vector<std::uint8_t> found;
  int high = -1;
  for (const char c : text) {
    const auto digit = std::string_view("0123456789abcdef").find(static_cast<char>(std::tolower(static_cast<unsigned char>(c))));
    if (digit == std::string_view::npos) continue;
    if (high < 0) {
      high = static_cast<int>(digit);
    } else {
      found.push_back(static_cast<std::uint8_t>(high * 16 + static_cast<int>(digit)));
      high = -1;
    }
  }
  return found;
}

std::optional<int> orientation_of(std::span<const std::uint8_t> file) {
  const auto chunks = without_pixels(file);
  Png reader;
  reader.source.rest = chunks;
  read_info(reader);  // fails at the end, as there are no pixels, and at damage after them, which does not affect them
  if (reader.info == nullptr) return std::nullopt;
  png_uint_32 size = 0;
  png_bytep exif = nullptr;
  if (png_get_eXIf_1(reader.png, reader.info, &size, &exif) != 0 && exif != nullptr) {
    std::span<const std::uint8_t> tiff(exif, size);
    if (const auto found = exif_orientation(tiff)) return found;
  }
  png_textp texts = nullptr;
  int count = 0;
  png_get_text(reader.png, reader.info, &texts, &count);
  for (int i = 0; i < count; ++i) {  // as ImageMagick writes it
    if (std::string_view(texts[i].key) == "Raw profile type exif" && texts[i].text != nullptr) {
      if (const auto found = exif_orientation(from_hex(texts[i].text))) return found;
    }
  }
  for (int i = 0; i < count; ++i) {
    if (std::string_view(texts[i].key) == "XML:com.adobe.xmp" && texts[i].text != nullptr) {
      return xmp_orientation(texts[i].text);
    }
  }
  return std::nullopt;
}

}  // namespace

Image decode_png(std::span<const std::uint8_t> file, std::uint64_t most_pixels) {
  Png reader;
  reader.source.rest = file;
  const auto check = [&](bool good) {
    if (!good) throw Error(ErrorCode::image, std::string("damaged PNG: ") + reader.source.message + ": save it again");
  };
  check(read_info(reader));
  // The size is libpng's own: chunks before IHDR, which it skips, must not hide it.
  const auto width = png_get_image_width(reader.png, reader.info);
  const auto height = png_get_image_height(reader.png, reader.info);
  refuse_bomb(width, height, most_pixels);
  check(begin(reader));
  const std::size_t stride = std::size_t{width} * 3;
  if (png_get_rowbytes(reader.png, reader.info) != stride) {
    throw Error(ErrorCode::image, "unsupported kind of PNG: convert it to RGB first");
  }
  Image image{static_cast<int>(width), static_cast<int>(height), {}};
  image.rgb.resize(stride * height);
  check(read_rows(reader, image.rgb.data(), stride));
  return upright(std::move(image), orientation_of(file).value_or(1));
}

}  // namespace export_zoo::detail
