#include <array>
#include <memory>

#include <openssl/evp.h>

#include <export_zoo/error.hpp>

#include "checksum.hpp"
#include "manifest.hpp"

namespace export_zoo::detail {

std::string sha256_of(const Source& source) {
  const auto file = source.open();
  const std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context(EVP_MD_CTX_new(), &EVP_MD_CTX_free);
  if (!*file || !context || EVP_DigestInit_ex(context.get(), EVP_sha256(), nullptr) != 1) return {};
  std::array<char, 1 << 16> buffer;
  while (file->read(buffer.data(), buffer.size()) || file->gcount() > 0) {
    if (EVP_DigestUpdate(context.get(), buffer.data(), static_cast<std::size_t>(file->gcount())) != 1) return {};
  }
  std::array<unsigned char, EVP_MAX_MD_SIZE> digest;
  unsigned int size = 0;
  if (EVP_DigestFinal_ex(context.get(), digest.data(), &size) != 1) return {};
  std::string hex;
  for (unsigned int i = 0; i < size; ++i) {
    constexpr const char* kDigits = "0123456789abcdef";
    hex += kDigits[digest.at(i) >> 4];
    hex += kDigits[digest.at(i) & 15];
  }
  return hex;
}

std::string manifest_sha256(const BundleFiles& bundle) {
  const auto manifest = bundle.find("manifest.json");
  return manifest ? sha256_of(*manifest) : "";
}

Source checked(const BundleFiles& bundle, const File& file) {
  const auto path = bundle.path(file.path).string();
  const auto source = bundle.find(file.path);
  const auto size = source ? source->size() : std::nullopt;
  if (!size) {
    throw Error(ErrorCode::checksum, path + ": missing from the bundle: copy it again, files/ included");
  }
  if (!*source->open()) {
    throw Error(ErrorCode::checksum, path + ": cannot be read: check its permissions");
  }
  if (*size != file.size_bytes || sha256_of(*source) != file.sha256) {
    throw Error(ErrorCode::checksum, path +
                                         ": checksum mismatch: not the file that the manifest describes: copy or "
                                         "export the bundle again");
  }
  return *source;
}

}  // namespace export_zoo::detail
