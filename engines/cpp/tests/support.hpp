#pragma once

#include <array>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

#include <openssl/evp.h>

#include <gtest/gtest.h>

#include <export_zoo/error.hpp>

namespace support {

namespace fs = std::filesystem;

// Targets whose engines the tests run.
#ifdef EXPORT_ZOO_TEST_OPENVINO
inline const std::vector<std::string> kTargets{"onnxruntime", "openvino"};
#else
inline const std::vector<std::string> kTargets{"onnxruntime"};
#endif

// The directory that make_bundles.py wrote.
inline fs::path bundles() { return EXPORT_ZOO_TEST_BUNDLES; }

inline std::vector<char> read(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

inline void write(const fs::path& path, const std::string& text) {
  std::ofstream(path, std::ios::binary) << text;
}

// SHA-256 of a file, in hexadecimal.
inline std::string sha256(const fs::path& path) {
  const auto data = read(path);
  std::array<unsigned char, EVP_MAX_MD_SIZE> digest{};
  unsigned int size = 0;
  EVP_Digest(data.data(), data.size(), digest.data(), &size, EVP_sha256(), nullptr);
  std::string text;
  for (unsigned int i = 0; i < size; ++i) {
    constexpr std::string_view digits = "0123456789abcdef";
    text += digits[digest.at(i) >> 4U];
    text += digits[digest.at(i) & 15U];
  }
  return text;
}

// The values of a float32 .npy file.
inline std::vector<float> read_npy(const fs::path& path) {
  const auto bytes = read(path);
  const auto header = static_cast<unsigned char>(bytes.at(8)) + 256 * static_cast<unsigned char>(bytes.at(9));
  const auto begin = static_cast<std::size_t>(10 + header);
  std::vector<float> values((bytes.size() - begin) / sizeof(float));
  std::memcpy(values.data(), bytes.data() + begin, values.size() * sizeof(float));
  return values;
}

// A directory of the test's own, removed afterwards.
class Temporary {
 public:
  Temporary() {
    auto pattern = (fs::temp_directory_path() / "export-zoo-XXXXXX").string();
    path_ = mkdtemp(pattern.data());
  }
  Temporary(const Temporary&) = delete;
  Temporary& operator=(const Temporary&) = delete;
  ~Temporary() {
    std::error_code error;
    fs::remove_all(path_, error);
  }
  [[nodiscard]] const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

// The error that a call throws: its code and its message.
template <typename Call>
std::pair<export_zoo::ErrorCode, std::string> error_of(Call call) {
  try {
    call();
  } catch (const export_zoo::Error& error) {
    return {error.code(), error.what()};
  }
  ADD_FAILURE() << "nothing was thrown";
  return {export_zoo::ErrorCode::runtime, ""};
}

// Tests with bundles; the fixtures of ctest make them.
class WithBundles : public testing::Test {
 protected:
  void SetUp() override {
#ifdef EXPORT_ZOO_TEST_OPENVINO  // built with OpenVINO
    setenv("EXPORT_ZOO_OPENVINO", EXPORT_ZOO_TEST_OPENVINO, 0);
    setenv("TBB_ENABLE_SANITIZERS", "1", 0);  // otherwise TBB loads a library in a way that they refuse
#endif
    ASSERT_TRUE(fs::is_directory(bundles())) << "make_bundles.py has not run: run ctest";
  }
};

}  // namespace support
