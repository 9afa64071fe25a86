// ONNX Runtime's C++ API. Its function table is set when the library is loaded (onnxruntime_backend.cpp).
#pragma once

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
