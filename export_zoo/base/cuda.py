"""Facts about the CUDA driver and the GPU of this machine, queried with ctypes: no other package is needed."""

from __future__ import annotations

import ctypes


def _driver() -> ctypes.CDLL | None:
    """The CUDA driver; None unless it is installed and finds a device."""
    for library in ("libcuda.so.1", "nvcuda.dll"):
        try:
            driver = ctypes.CDLL(library)
        except OSError:
            continue
        count = ctypes.c_int(0)
        if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0:
            return driver
    return None


def driver_version() -> tuple[int, int] | None:
    """Major and minor version of CUDA that the driver supports; None without a driver."""
    driver, version = _driver(), ctypes.c_int(0)
    if driver is None or driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def has_cuda_device() -> bool:
    """Whether the CUDA driver is installed and finds a device."""
    return _driver() is not None


def device_capability() -> str | None:
    """Compute capability of the first CUDA device, for example "9.0"; None without a device.

    Attributes 75 and 76 of the driver API (CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR).
    """
    driver = _driver()
    if driver is None:
        return None
    values = []
    for attribute in (75, 76):
        value = ctypes.c_int(0)
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0) != 0:
            return None
        values.append(value.value)
    return f"{values[0]}.{values[1]}"


def device_name() -> str | None:
    """Name and compute capability of the first CUDA device, for example "NVIDIA H100 80GB HBM3, 9.0".

    None without a device.
    """
    driver, capability, name = _driver(), device_capability(), ctypes.create_string_buffer(256)
    if driver is None or capability is None or driver.cuDeviceGetName(name, len(name), 0) != 0:
        return None
    return f"{name.value.decode()}, {capability}"
