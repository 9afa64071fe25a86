// Images that cannot be decoded are refused; odd ones have a defined outcome. Bit-equality: check_preprocess.py.

#include <algorithm>
#include <chrono>
#include <limits>
#include <string>

#include <gmock/gmock.h>
#include <zlib.h>

#include <export_zoo/postprocess.hpp>
#include <export_zoo/preprocess.hpp>

#include "support.hpp"

namespace {

namespace ez = export_zoo;
using support::error_of;
using testing::Each;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsNan;

ez::PreprocessOptions options_of(int resize, int height, int width) {
  ez::PreprocessOptions options;
  options.resize_size = resize;
  options.crop_height = height;
  options.crop_width = width;
  options.std_dev = {1, 1, 1};
  options.pillow = 13;
  return options;
}

ez::Image image_of(int width, int height, std::uint8_t value) {
  return {width, height, std::vector<std::uint8_t>(static_cast<std::size_t>(width * height * 3), value)};
}

TEST(Decode, RefusesWhatIsNoImage) {
  for (const std::string text : {"", "hello", "GIF89a", "\xff\xd8\xff", "\x89PNG\r\n\x1a\n"}) {
    const auto [code, message] =
        error_of([&] { static_cast<void>(ez::decode(std::as_bytes(std::span(text)))); });
    EXPECT_EQ(code, ez::ErrorCode::image) << text;
    EXPECT_FALSE(message.empty());
  }
}

TEST(Decode, RefusesBombsByTheirHeader) {
  // A PNG header of 60,000 x 60,000 pixels, and nothing behind it.
  const unsigned char header[] = {0x89, 'P',  'N',  'G',  '\r', '\n', 0x1a, '\n', 0,    0,    0,    13,
                                  'I',  'H',  'D',  'R',  0,    0,    0xea, 0x60, 0,    0,    0xea, 0x60,
                                  8,    2,    0,    0,    0,    0x8d, 0x7b, 0x1c, 0x15, 0,    0,    0,
                                  0,    'I',  'D',  'A',  'T',  0x35, 0xaf, 0x06, 0x1e};
  const auto [code, message] = error_of([&] { static_cast<void>(ez::decode(std::as_bytes(std::span(header)))); });
  EXPECT_EQ(code, ez::ErrorCode::image);
}

TEST(Decode, RefusesABombWhoseSizeStandsBehindAnotherChunk) {
  // A chunk "zzZz" of 1 x 1, then a header of 20,000 x 20,000 pixels.
  const unsigned char bomb[] = {
      0x89, 'P',  'N',  'G',  '\r', '\n', 0x1A, '\n', 0,    0,    0,    8,    'z',  'z',  'Z',  'z',  0,    0,    0,
      1,    0,    0,    0,    1,    0x28, 0xF9, 0xE3, 0x61, 0,    0,    0,    13,   'I',  'H',  'D',  'R',  0,    0,
      0x4E, 0x20, 0,    0,    0x4E, 0x20, 8,    2,    0,    0,    0,    0x6C, 0x12, 0xD1, 0x6E, 0,    0,    0,    17,
      'I',  'D',  'A',  'T',  0x78, 0x9C, 0x63, 0x60, 0x18, 0x05, 0xA3, 0x60, 0x14, 0x0C, 0x77, 0,    0,    0x03, 0xE8,
      0,    0x01, 0xB3, 0xA6, 0xD3, 0x46, 0,    0,    0,    0,    'I',  'E',  'N',  'D',  0xAE, 0x42, 0x60, 0x82};
  const auto [code, message] = error_of([&] { static_cast<void>(ez::decode(std::as_bytes(std::span(bomb)))); });
  EXPECT_EQ(code, ez::ErrorCode::image);
  EXPECT_THAT(message, HasSubstr("20000x20000 pixels are more than"));
}

TEST(Decode, RefusesAJpegThatIsDamagedBehindItsLastRow) {
  auto bytes = support::read(support::bundles() / "images/00-baseline.jpg");
  const std::string file(bytes.begin(), bytes.end());
  EXPECT_NO_THROW(static_cast<void>(ez::decode(std::as_bytes(std::span(file)))));
  auto damaged = file.substr(0, file.size() - 2) + file.substr(file.find("\xff\xc0"), 19) + "\xff\xd9";
  EXPECT_THAT(error_of([&] { static_cast<void>(ez::decode(std::as_bytes(std::span(damaged)))); }).second,
              HasSubstr("damaged JPEG"));
}

TEST(Decode, RefusesMoreThanTheCallerWants) {
  const auto bytes = support::read(support::bundles() / "images/00-baseline.jpg");
  const auto image = ez::decode(std::as_bytes(std::span(bytes)));
  const auto pixels = static_cast<std::uint64_t>(image.width) * static_cast<std::uint64_t>(image.height);
  EXPECT_EQ(ez::decode(std::as_bytes(std::span(bytes)), pixels).rgb, image.rgb);
  const auto [code, message] =
      error_of([&] { static_cast<void>(ez::decode(std::as_bytes(std::span(bytes)), pixels - 1)); });
  EXPECT_EQ(code, ez::ErrorCode::image);
  EXPECT_THAT(message, HasSubstr(std::to_string(pixels - 1)));
}

TEST(Decode, RefusesProgressiveFilesOfThousandsOfScans) {
  auto bytes = support::read(support::bundles() / "images/01-progressive.jpg");
  const std::string file(bytes.begin(), bytes.end());
  const auto scan = file.substr(file.rfind("\xff\xda"), file.size() - 2 - file.rfind("\xff\xda"));
  const auto repeated = [&](int times) {
    auto text = file.substr(0, file.size() - 2);  // without the end's marker
    for (int i = 0; i < times; ++i) text += scan;
    return text + "\xff\xd9";
  };
  const auto harmless = repeated(100);
  EXPECT_NO_THROW(static_cast<void>(ez::decode(std::as_bytes(std::span(harmless)))));
  // The same scans of many more pixels, which are not even there: 8,000 x 6,200.
  auto large = repeated(30);
  large.replace(large.find("\xff\xc2") + 5, 4, std::string("\x18\x38\x1f\x40", 4));
  EXPECT_THAT(error_of([&] { static_cast<void>(ez::decode(std::as_bytes(std::span(large)))); }).second,
              HasSubstr("26 scans of so many pixels"));
  const auto bomb = repeated(1000);
  EXPECT_THAT(error_of([&] { static_cast<void>(ez::decode(std::as_bytes(std::span(bomb)))); }).second,
              HasSubstr("501 scans of so many pixels"));
}

TEST(Decode, RefusesScansOfManySamplesHoweverFewThereAre) {
  // 1,000 bytes: four components of 4,000 x 4,000 pixels in each of 20 scans, and arithmetic coding, which decodes nothing
  // at all for as long as it is asked to.
  std::string file("\xff\xd8\xff\xdb\0\x43\0", 7);
  file += std::string(64, '\1') + std::string("\xff\xca\0\x14\x08\x0f\xa0\x0f\xa0\x04", 10);
  for (char id = 1; id <= 4; ++id) file += {id, 0x11, 0};
  for (int i = 0; i < 20; ++i) {
    file += std::string("\xff\xda\0\x0e\x04", 5);
    for (char id = 1; id <= 4; ++id) file += {id, 0};
    file += std::string("\0\0", 2) + (i == 0 ? '\x0d' : static_cast<char>(0xED - 0x11 * std::min(i, 13)));
  }
  file += "\xff\xd9";
  EXPECT_THAT(error_of([&] { static_cast<void>(ez::decode(std::as_bytes(std::span(file)))); }).second,
              HasSubstr("scans of so many pixels"));
}

TEST(Decode, IsNotSlowedDownByEmptySegments) {
  const auto bytes = support::read(support::bundles() / "images/00-baseline.jpg");
  const std::string file(bytes.begin(), bytes.end());
  std::string many = file.substr(0, 2);
  for (int i = 0; i < 200'000; ++i) many += std::string("\xff\xe1\0\2", 4);
  many += file.substr(2);
  const auto start = std::chrono::steady_clock::now();
  EXPECT_EQ(ez::decode(std::as_bytes(std::span(many))).rgb, ez::decode(std::as_bytes(std::span(file))).rgb);
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(10));  // 100 s with libjpeg's list
}

std::string chunk(const std::string& type, const std::string& data) {
  const auto number = [](std::size_t value) {
    std::string text;
    for (const int shift : {24, 16, 8, 0}) text += static_cast<char>(value >> static_cast<unsigned>(shift));
    return text;
  };
  const auto body = type + data;
  const auto checksum = crc32(0, reinterpret_cast<const Bytef*>(body.data()), static_cast<uInt>(body.size()));
  return number(data.size()) + body + number(checksum);
}

std::string png(const std::string& size, const std::string& pixels) {
  return std::string("\x89PNG\r\n\x1a\n") + chunk("IHDR", size + std::string("\x08\x02\0\0\0", 5)) + chunk("IDAT", pixels) +
         chunk("IEND", "");
}

TEST(Decode, ReadsNoMoreOfAPngThanItsRows) {
  // One pixel, and 8 GB of zeros after it, a megabyte at a time.
  std::string segment(1 << 20, '\0');
  std::string compressed(1 << 14, '\0');
  z_stream stream{};
  ASSERT_EQ(deflateInit(&stream, 9), Z_OK);
  const auto flushed = [&] {
    stream.next_in = reinterpret_cast<Bytef*>(segment.data());
    stream.avail_in = static_cast<uInt>(segment.size());
    stream.next_out = reinterpret_cast<Bytef*>(compressed.data());
    stream.avail_out = static_cast<uInt>(compressed.size());
    deflate(&stream, Z_FULL_FLUSH);
    return compressed.substr(0, compressed.size() - stream.avail_out);
  };
  auto pixels = flushed();
  const auto more = flushed();
  deflateEnd(&stream);
  for (int i = 0; i < 8000; ++i) pixels += more;
  const auto file = png(std::string("\0\0\0\1\0\0\0\1", 8), pixels);
  const auto start = std::chrono::steady_clock::now();
  EXPECT_EQ(ez::decode(std::as_bytes(std::span(file))).rgb, std::vector<std::uint8_t>(3));
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(10));
}

TEST(Decode, RefusesLongSides) {
  const auto file = png(std::string("\0\x0f\x42\x41\0\0\0\1", 8), "");  // 1,000,001 x 1
  EXPECT_THAT(error_of([&] { static_cast<void>(ez::decode(std::as_bytes(std::span(file)))); }).second,
              HasSubstr("1000001x1 has a side of more than 1000000 pixels"));
}

TEST(Preprocess, RefusesOptionsThatAreOfNoBundle) {
  EXPECT_EQ(error_of([] { ez::Preprocessor(ez::PreprocessOptions()); }).first, ez::ErrorCode::shape);
  EXPECT_EQ(error_of([] { ez::Preprocessor(options_of(-1, 8, 8)); }).first, ez::ErrorCode::shape);
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (const float value : {0.0F, -1.0F, kInfinity, std::numeric_limits<float>::quiet_NaN()}) {
    auto options = options_of(8, 8, 8);
    options.std_dev[1] = value;  // 0 is what an empty PreprocessOptions has
    const auto [code, message] = error_of([&] { ez::Preprocessor{options}; });
    EXPECT_EQ(code, ez::ErrorCode::shape) << value;
    EXPECT_THAT(message, HasSubstr("std_dev"));
  }
  for (const std::size_t channels : {0U, 2U, 4U}) {
    auto options = options_of(8, 8, 8);
    options.mean.assign(channels, 0);
    options.std_dev.assign(channels, 1);
    EXPECT_THAT(error_of([&] { ez::Preprocessor{options}; }).second, HasSubstr("one for gray or three for RGB"));
  }
  auto options = options_of(8, 8, 8);
  options.mean[2] = kInfinity;
  EXPECT_EQ(error_of([&] { ez::Preprocessor{options}; }).first, ez::ErrorCode::shape);
}

TEST(Preprocess, AtAnotherSizeResizesInProportionAsPythonRounds) {
  const auto resize = [](int was, int crop, std::int64_t height, std::int64_t width) {
    const auto options = ez::at_size(options_of(was, crop, crop + 10), {height, width});
    EXPECT_EQ(options.crop_height, height);
    EXPECT_EQ(options.crop_width, width);
    return options.resize_size;
  };
  EXPECT_EQ(resize(232, 224, 224, 500), 232);
  EXPECT_EQ(resize(232, 224, 500, 294), 304) << "304.5, half to even";
  EXPECT_EQ(resize(232, 224, 182, 182), 189) << "188.5, and a little more where the ratio comes first";
  EXPECT_EQ(resize(2, 224, 1, 1), 1) << "never 0";
  EXPECT_EQ(resize(65500, 1, 65500, 65500), 65501) << "more than Preprocessor takes";
}

TEST(Preprocess, AtASizeThatCannotBeIsRefused) {
  for (const auto& size : {ez::InputSize{0, 8}, {8, -1}, {65501, 8}, {8, INT64_MAX}}) {
    EXPECT_EQ(error_of([&] { static_cast<void>(ez::at_size(options_of(8, 8, 8), size)); }).first, ez::ErrorCode::shape);
  }
  EXPECT_EQ(error_of([] { static_cast<void>(ez::at_size({}, {8, 8})); }).first, ez::ErrorCode::shape);
}

TEST(Preprocess, RefusesRoomOfTheWrongSizeAndImagesThatAreNone) {
  const ez::Preprocessor preprocess(options_of(8, 8, 8));
  std::vector<float> out(preprocess.size() - 1);
  EXPECT_EQ(error_of([&] { preprocess(image_of(9, 9, 1), out); }).first, ez::ErrorCode::shape);
  out.resize(preprocess.size());
  EXPECT_EQ(error_of([&] { preprocess(ez::Image{9, 9, {1, 2, 3}}, out); }).first, ez::ErrorCode::image);
  EXPECT_EQ(error_of([&] { preprocess(ez::Image{}, out); }).first, ez::ErrorCode::image);
  EXPECT_THAT(error_of([&] { preprocess(image_of(1, 70000, 1), out); }).second, HasSubstr("too narrow"));
}

// Rows that are further apart than they are wide, from top to bottom or the other way round, as RGB and BGR, give what the
// same image gives by itself, with each way of resizing (which one depends on the proportions), and in gray.
TEST(Preprocess, TakesViewsOfOthersMemory) {
  for (const auto& [width, height] : {std::pair(31, 23), {23, 31}, {8, 8}, {8, 20}, {20, 8}, {5, 6}, {200, 9}}) {
    auto image = image_of(width, height, 0);
    unsigned int state = 1;
    for (auto& value : image.rgb) value = static_cast<std::uint8_t>((state = state * 1103515245U + 12345U) >> 16U);
    for (const bool gray : {false, true}) {
      auto options = options_of(8, 8, 8);
      if (gray) options.mean = {0.5F}, options.std_dev = {0.25F};
      for (const int pillow : {12, 13}) {
        options.pillow = pillow;
        const ez::Preprocessor preprocess(options);
        std::vector<float> want(preprocess.size());
        preprocess(image, want);
        for (const auto order : {ez::ImageView::Order::rgb, ez::ImageView::Order::bgr}) {
          for (const int direction : {1, -1}) {
            const auto stride = static_cast<std::size_t>(3 * width + 5);
            std::vector<std::uint8_t> memory(stride * static_cast<std::size_t>(height), 99);
            const auto upper = direction > 0 ? 0 : stride * static_cast<std::size_t>(height - 1);
            for (std::size_t i = 0; i < image.rgb.size(); ++i) {
              const auto y = i / static_cast<std::size_t>(3 * width);
              const auto x = i % static_cast<std::size_t>(3 * width);
              const auto channel = order == ez::ImageView::Order::rgb ? x % 3 : 2 - x % 3;
              memory[direction > 0 ? upper + y * stride + x / 3 * 3 + channel : upper - y * stride + x / 3 * 3 + channel] =
                  image.rgb[i];
            }
            std::vector<float> found(preprocess.size());
            preprocess(ez::ImageView{memory.data() + upper, width, height,
                                     static_cast<std::ptrdiff_t>(stride) * direction, order},
                       found);
            EXPECT_EQ(found, want) << width << 'x' << height << " pillow " << pillow << " gray " << gray;
          }
        }
      }
    }
  }
}

TEST(Preprocess, RefusesViewsOfNothing) {
  const ez::Preprocessor preprocess(options_of(8, 8, 8));
  std::vector<float> out(preprocess.size());
  const std::vector<std::uint8_t> memory(300);
  for (const auto& view : {ez::ImageView{}, ez::ImageView{nullptr, 9, 9}, ez::ImageView{memory.data(), 0, 9},
                           ez::ImageView{memory.data(), 9, -1}, ez::ImageView{memory.data(), 9, 9, 26},
                           ez::ImageView{memory.data(), 9, 9, -26}}) {
    const auto [code, message] = error_of([&] { preprocess(view, out); });
    EXPECT_EQ(code, ez::ErrorCode::image);
    EXPECT_THAT(message, HasSubstr("a stride of at least 3 bytes a pixel"));
  }
  preprocess(ez::ImageView{memory.data(), 9, 9}, out);
  EXPECT_EQ(error_of([&] { preprocess(ez::ImageView{memory.data(), 9, 9}, std::span(out).first(9)); }).first,
            ez::ErrorCode::shape);
}

TEST(Preprocess, PutsABlackBorderAroundSmallImages) {
  const ez::Preprocessor preprocess(options_of(2, 5, 4));
  std::vector<float> out(preprocess.size());
  preprocess(image_of(2, 2, 255), out);
  EXPECT_THAT(std::vector<float>(out.begin(), out.begin() + 20),
              ElementsAre(0, 0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0));
}

TEST(Postprocess, SoftmaxAddsUpToOneWithoutOverflow) {
  const std::vector<float> logits{1000.0F, 1001.0F, -1000.0F};
  const auto found = ez::softmax(logits);
  EXPECT_FLOAT_EQ(found[0] + found[1] + found[2], 1);
  EXPECT_FLOAT_EQ(found[1] / found[0], std::exp(1.0F));
  EXPECT_TRUE(ez::softmax({}).empty());
}

TEST(Postprocess, SoftmaxOfInfinitiesIsTheirShare) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  EXPECT_THAT(ez::softmax(std::vector<float>{kInfinity, 1, kInfinity, -kInfinity}), ElementsAre(0.5F, 0, 0.5F, 0));
  EXPECT_THAT(ez::softmax(std::vector<float>{-kInfinity, 1}), ElementsAre(0, 1));
  EXPECT_THAT(ez::softmax(std::vector<float>{-kInfinity, -kInfinity}), ElementsAre(0.5F, 0.5F));
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THAT(ez::softmax(std::vector<float>{kInfinity, kNan, 1}), Each(IsNan()));
  EXPECT_THAT(ez::softmax(std::vector<float>{kNan, -kInfinity}), Each(IsNan()));
}

TEST(Postprocess, ProbabilitiesAreMadeOnlyOfLogits) {
  ez::Port output;
  output.scores = "logits";
  const std::vector<float> values{0, 2, -1000};
  const std::vector<float> shares{0.5F, 1 / (1 + std::exp(-2.0F)), 0};
  for (const auto* task : {"binary", "multilabel"}) {
    output.task = task;
    EXPECT_THAT(ez::probabilities(output, values), testing::Pointwise(testing::FloatEq(), shares));
  }
  EXPECT_EQ(ez::threshold(output), 0.0F);
  output.task = "classification";
  EXPECT_EQ(ez::probabilities(output, values), ez::softmax(values));
  output.task = "regression";
  EXPECT_EQ(ez::probabilities(output, values), values);
  output.task = "multilabel";
  output.scores = "probabilities";
  EXPECT_EQ(ez::probabilities(output, values), values);
  EXPECT_EQ(ez::threshold(output), 0.5F);
}

TEST(Postprocess, TopKIsOrderedAndNeverLongerThanThereAreClasses) {
  const std::vector<float> scores{0.1F, 0.4F, 0.4F, 0.05F};
  const auto found = ez::top_k(scores, 3);
  ASSERT_EQ(found.size(), 3U);
  EXPECT_EQ(found[0].index, 1U);
  EXPECT_EQ(found[1].index, 2U);
  EXPECT_EQ(found[2].index, 0U);
  EXPECT_EQ(ez::top_k(scores, 10).size(), 4U);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const auto odd = ez::top_k(std::vector<float>{nan, 1, nan, 3, 2}, 5);
  EXPECT_EQ((std::vector<std::size_t>{odd[0].index, odd[1].index, odd[2].index, odd[3].index, odd[4].index}),
            (std::vector<std::size_t>{3, 4, 1, 0, 2}));
}

}  // namespace
