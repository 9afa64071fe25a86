// libFuzzer: any bytes are read as a manifest, or refused with an Error.

#include <cstddef>
#include <cstdint>
#include <span>

#include <export_zoo/error.hpp>
#include <export_zoo/metadata.hpp>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    static_cast<void>(export_zoo::read_metadata(export_zoo::Files{{"manifest.json", std::as_bytes(std::span(data, size))}}));
  } catch (const export_zoo::Error&) {
  }
  return 0;
}
