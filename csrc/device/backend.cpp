#include "device/backend.h"

#include <dlfcn.h>

#include <cstdio>

#include "error.h"

namespace edgemoe {
namespace {

/// Returns a function of a plug-in. Throws DeviceError.
template <class F>
F* function_of(const std::string& path, const char* name) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    const char* why = dlerror();
    throw DeviceError("plug-in " + path + ": " + (why ? why : "cannot be opened"));
  }
  void* found = dlsym(library, name);
  if (!found) throw DeviceError("plug-in " + path + " has no function " + name);
  return reinterpret_cast<F*>(found);
}

}  // namespace

BackendProbe probe_backend(const std::string& path) noexcept {
  BackendProbe out{};
  const auto refuse = [&out](const std::string& why) {
    out.num_devices = 0;
    std::snprintf(out.why_not, sizeof out.why_not, "%s", why.c_str());
  };
  try {
    function_of<ProbeBackend>(path, kProbeName)(&out);
    if (out.abi != kBackendAbi) {
      refuse("plug-in " + path + " has version " + std::to_string(out.abi) + " of the interface, and version " +
             std::to_string(kBackendAbi) + " is needed: build the plug-in and edgemoe from the same source");
    }
  } catch (const std::exception& e) {
    refuse(e.what());
  }
  return out;
}

std::unique_ptr<Device> open_device(const std::string& path, int ordinal) {
  const BackendProbe probe = probe_backend(path);
  if (probe.why_not[0]) throw DeviceError(probe.why_not);
  if (ordinal < 0 || ordinal >= probe.num_devices) {
    throw DeviceError("cuda:" + std::to_string(ordinal) + ": there " +
                      (probe.num_devices == 1 ? std::string("is one device")
                                              : "are " + std::to_string(probe.num_devices) + " devices") +
                      ", counted from 0");
  }
  char error[512] = "";
  Device* device = function_of<OpenDevice>(path, kOpenName)(ordinal, error, sizeof error);
  if (!device) throw DeviceError("cuda:" + std::to_string(ordinal) + ": " + error);
  return std::unique_ptr<Device>(device);
}

}  // namespace edgemoe
