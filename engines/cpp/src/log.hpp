// Where messages of runtimes go.
#pragma once

#include <string_view>

#include <export_zoo/log.hpp>

namespace export_zoo::detail {

void log(Severity severity, std::string_view runtime, std::string_view message) noexcept;

}  // namespace export_zoo::detail
