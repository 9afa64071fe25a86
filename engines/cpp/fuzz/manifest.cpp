// libFuzzer: any bytes are read as a manifest, or refused with an Error.

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

#include <export_zoo/error.hpp>
#include <export_zoo/metadata.hpp>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const std::filesystem::path bundle = [] {
    auto pattern = (std::filesystem::temp_directory_path() / "export-zoo-fuzz-XXXXXX").string();
    return std::filesystem::path(mkdtemp(pattern.data()));
  }();
  std::ofstream(bundle / "manifest.json", std::ios::binary)
      .write(reinterpret_cast<const char*>(data), static_cast<std::streamsize>(size));
  try {
    static_cast<void>(export_zoo::read_metadata(bundle));
  } catch (const export_zoo::Error&) {
  }
  return 0;
}
