// ONNX Runtime's C++ API. Its function table is set when the library is loaded (onnxruntime_backend.cpp).
#pragma once

#define ORT_API_MANUAL_INIT
// The table is a global of this namespace. Under a name of our own, a program that links this library statically may
// use an ONNX Runtime of its own, of another version.
#define Ort export_zoo_onnxruntime  // NOLINT
#include <onnxruntime_cxx_api.h>
