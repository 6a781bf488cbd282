// A plug-in whose device does nothing but count: its memory is the host's, copies are made at once, and kernels are not
// run. So the time of a pass with it is that of the host's own work. See benchmarks/device_host.py.
#include "idle.h"

#include <memory>

extern "C" {

[[gnu::visibility("default")]] void edgemoe_backend_probe(edgemoe::BackendProbe* out) {
  *out = {};
  out->abi = edgemoe::kBackendAbi;
  out->num_devices = 1;
}

[[gnu::visibility("default")]] edgemoe::Device* edgemoe_backend_open(int, char*, size_t) {
  return std::make_unique<edgemoe::IdleDevice>().release();
}

[[gnu::visibility("default")]] void edgemoe_idle_counts(uint64_t* out) {
  std::memcpy(out, &edgemoe::g_counts, sizeof edgemoe::g_counts);
}

}  // extern "C"
