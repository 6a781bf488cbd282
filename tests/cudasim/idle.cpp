// A plug-in whose device does nothing: memory is the host's, copies are made at once, and kernels are not run. What a
// pass takes with it is the host's own work. See benchmarks/device_host.py.
#include <cstdlib>
#include <cstring>
#include <memory>

#include "device/device.h"

namespace edgemoe {
namespace {

class IdleDevice final : public Device {
 public:
  DeviceInfo info() const override {
    DeviceInfo out{};
    std::strcpy(out.name, "device that does nothing");
    out.major = 9;
    out.num_processors = 1;
    out.total_bytes = out.free_bytes = size_t(8) << 30;
    return out;
  }
  void* alloc(size_t bytes, Room) override { return std::calloc(bytes, 1); }
  void free(void* p, Room) noexcept override { std::free(p); }
  void fill(void*, int, size_t) override {}
  void copy_in(int, void* to, const void* pinned, size_t n) override { std::memcpy(to, pinned, n); }
  void copy_out(int, void* pinned, const void* from, size_t n) override { std::memcpy(pinned, from, n); }
  void copy(void* to, const void* from, size_t n) override { std::memcpy(to, from, n); }
  Fence make_fence() override { return 0; }
  void record(Fence, int) override {}
  void wait(int, Fence) override {}
  bool is_done(Fence) override { return true; }
  void sync(Fence) override {}

  void quantize_rows(const RowsCall&, const QuantizedBuffer&) override {}
  void quantize_hidden(Activation, const float*, const float*, int, int, const QuantizedBuffer&, float*) override {}
  void ranks(const RanksCall*, int) override {}
  void products(const Product*, int) override {}
  void matmul_f32(const float*, const float*, int, int, int, float*) override {}
  void norm_rows(float*, const float*, float, const float*, float, int, int, float*) override {}
  void prepare_heads(const HeadsCall&, int) override {}
  void attend(const AttendCall&, int, int) override {}
  void combine(const float*, const int32_t*, const float*, int, int, int, float*) override {}
  void add_rows(const float*, float, const float*, const float*, int, int, float*) override {}
  void add_bias(const float*, int, int, float*) override {}
  void scale(float, size_t, float*) override {}
  void multiply(const float*, size_t, size_t, float*) override {}
  void weigh(const float*, const float*, int, int, float*) override {}
  void gate_heads(float*, const float*, HeadGate, int, int, int) override {}
  void gated_norm(float*, const float*, const float*, bool, float, Gate, int, int, int) override {}
  void short_conv(const ConvShape&, const float*, const float*, const float*, const float*, float*, int,
                  float*) override {}
  void delta_rule(const DeltaCall&, int) override {}
  void mamba2(const MambaCall&, int) override {}
  void prepare_latents(const LatentsCall&, int) override {}
};

}  // namespace
}  // namespace edgemoe

extern "C" {

[[gnu::visibility("default")]] void edgemoe_backend_probe(edgemoe::BackendProbe* out) {
  *out = {};
  out->abi = edgemoe::kBackendAbi;
  out->num_devices = 1;
}

[[gnu::visibility("default")]] edgemoe::Device* edgemoe_backend_open(int, char*, size_t) {
  return std::make_unique<edgemoe::IdleDevice>().release();
}

}  // extern "C"
