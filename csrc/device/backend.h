// Opens devices through a plug-in: a shared library that is loaded only when a device is asked for.
#pragma once

#include <memory>
#include <string>

#include "device/device.h"

namespace edgemoe {

/// Returns what a plug-in reports. Throws nothing: if it cannot be opened, or has another ABI, `why_not` says so.
BackendProbe probe_backend(const std::string& path) noexcept;

/// Opens a device of a plug-in, which stays loaded. Throws DeviceError with the reason.
std::unique_ptr<Device> open_device(const std::string& path, int ordinal);

}  // namespace edgemoe
