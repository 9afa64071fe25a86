// What the leak sanitizer leaves out: OpenVINO and TBB, which leave threads behind.

extern "C" {
const char* __lsan_default_suppressions() {  // NOLINT
  return "leak:libopenvino.so\nleak:libopenvino_intel\nleak:libtbb\n";
}
}
