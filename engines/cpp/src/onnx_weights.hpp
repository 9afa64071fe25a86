// Weights that an ONNX file keeps in other files.
#pragma once

#include <set>
#include <string>

#include "files.hpp"

namespace export_zoo::detail {

// Names of the files that tensors of this graph refer to, as they stand in it: relative to its directory. Throws
// std::runtime_error if the file cannot be read as ONNX.
std::set<std::string> weight_files(const Source& graph);

}  // namespace export_zoo::detail
