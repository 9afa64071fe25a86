// What a test gives as an OpenVINO that is too old.

#include <openvino/c/openvino.h>

ov_status_e ov_get_openvino_version(ov_version_t* version) {
  *version = {"2025.3.0-19807-44526285f24-releases/2025/3", "OpenVINO Runtime"};
  return OK;
}

void ov_version_free(ov_version_t*) {}
