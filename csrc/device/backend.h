// Finds a device behind a plug-in: a shared library that is opened only when one is asked for.
#pragma once

#include <memory>
#include <string>

#include "device/device.h"

namespace edgemoe {

/// What a plug-in says. Throws nothing: one that cannot be opened, or is of another abi, says so in `why_not`.
BackendProbe probe_backend(const std::string& path) noexcept;

/// Opens a device of a plug-in, which stays loaded. Throws DeviceError with the reason.
std::unique_ptr<Device> open_device(const std::string& path, int ordinal);

}  // namespace edgemoe
