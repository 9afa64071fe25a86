/* Version of these headers, for C and C++. CMake reads it here. */
#ifndef EXPORT_ZOO_VERSION_H
#define EXPORT_ZOO_VERSION_H

#define EXPORT_ZOO_VERSION "0.1.0"
#define EXPORT_ZOO_VERSION_MAJOR 0
#define EXPORT_ZOO_VERSION_MINOR 1
#define EXPORT_ZOO_VERSION_PATCH 0

#endif
