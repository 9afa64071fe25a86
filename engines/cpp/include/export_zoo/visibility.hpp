#pragma once

#if defined(EXPORT_ZOO_STATIC)
#define EXPORT_ZOO_API
#else
#define EXPORT_ZOO_API __attribute__((visibility("default")))
#endif
