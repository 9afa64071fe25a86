// What sanitizers leave out: OpenVINO and TBB, which are not built for them, and leave threads behind.

extern "C" {
// NOLINTBEGIN
const char* __lsan_default_suppressions() { return "leak:libopenvino.so\nleak:libopenvino_intel\nleak:libtbb\n"; }
const char* __tsan_default_suppressions() {
  return "called_from_lib:libopenvino.so\ncalled_from_lib:libopenvino_intel\ncalled_from_lib:libtbb.so\n"
         "race:libopenvino.so\nrace:libopenvino_intel\nrace:libtbb.so\n";
}
// NOLINTEND
}
