// CUDA's Device, and the two functions by which the core finds it.
#include "device/device.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "error.h"
#include "launch.h"

namespace edgemoe {
namespace cuda {
namespace {

void check(cudaError_t e, const char* call) {
  if (e == cudaSuccess) return;
  cudaGetLastError();  // clears it: else the next call would report it again, although work can go on
  throw DeviceError(std::string(call) + ": " + cudaGetErrorString(e));
}

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(int ordinal) : CudaDevice() {
    check(cudaSetDevice(ordinal), "cudaSetDevice");
    check(cudaGetDeviceProperties(&properties_, ordinal), "cudaGetDeviceProperties");
    for (cudaStream_t& s : queues_) check(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking), "cudaStreamCreate");
  }
  ~CudaDevice() override {
    if (queues_[0]) cudaDeviceSynchronize();
    for (cudaGraphExec_t g : noted_) {
      if (g) cudaGraphExecDestroy(g);
    }
    for (cudaEvent_t e : events_) cudaEventDestroy(e);
    for (cudaStream_t s : queues_) {
      if (s) cudaStreamDestroy(s);
    }
  }

  DeviceInfo info() const override {
    DeviceInfo out{};
    std::snprintf(out.name, sizeof out.name, "%.127s", properties_.name);
    out.major = properties_.major;
    out.minor = properties_.minor;
    out.num_processors = properties_.multiProcessorCount;
    out.is_unified = properties_.integrated != 0;
    check(cudaMemGetInfo(&out.free_bytes, &out.total_bytes), "cudaMemGetInfo");
    return out;
  }

  void* alloc(size_t bytes, Room room) override {
    void* p = nullptr;
    const cudaError_t e = room == Room::kPinned ? cudaHostAlloc(&p, bytes, cudaHostAllocMapped) : cudaMalloc(&p, bytes);
    if (e == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      throw OutOfBudget(std::string("the device has no room for ") + std::to_string(bytes) +
                        (room == Room::kPinned ? " bytes of pinned memory" : " bytes"));
    }
    check(e, room == Room::kPinned ? "cudaHostAlloc" : "cudaMalloc");
    return p;
  }
  void free(void* p, Room room) noexcept override { room == Room::kPinned ? cudaFreeHost(p) : cudaFree(p); }
  const void* lend(void* host, size_t bytes) override {
    check(cudaHostRegister(host, bytes, cudaHostRegisterMapped), "cudaHostRegister");
    void* there = nullptr;
    check(cudaHostGetDevicePointer(&there, host, 0), "cudaHostGetDevicePointer");
    return there;
  }
  void take_back(void* host) noexcept override {
    cudaDeviceSynchronize();
    cudaHostUnregister(host);
  }
  void fill(void* to, int byte, size_t n) override {
    check(cudaMemsetAsync(to, byte, n, queues_[kCompute]), "cudaMemsetAsync");
  }
  void copy_in(int queue, void* to, const void* pinned, size_t n) override {
    check(cudaMemcpyAsync(to, pinned, n, cudaMemcpyHostToDevice, queues_[queue]), "copy to the device");
  }
  void copy_out(int queue, void* pinned, const void* from, size_t n) override {
    check(cudaMemcpyAsync(pinned, from, n, cudaMemcpyDeviceToHost, queues_[queue]), "copy from the device");
  }
  void copy(void* to, const void* from, size_t n) override {
    check(cudaMemcpyAsync(to, from, n, cudaMemcpyDeviceToDevice, queues_[kCompute]), "copy on the device");
  }

  Fence make_fence() override {
    cudaEvent_t e;
    check(cudaEventCreateWithFlags(&e, cudaEventDisableTiming), "cudaEventCreate");
    events_.push_back(e);
    return Fence(events_.size() - 1);
  }
  void record(Fence f, int queue) override { check(cudaEventRecord(events_[f], queues_[queue]), "cudaEventRecord"); }
  void wait(int queue, Fence f) override {
    check(cudaStreamWaitEvent(queues_[queue], events_[f], 0), "cudaStreamWaitEvent");
  }
  bool is_done(Fence f) override {
    const cudaError_t e = cudaEventQuery(events_[f]);
    if (e == cudaErrorNotReady) return false;
    check(e, "work on the device");
    return true;
  }
  void sync(Fence f) override { check(cudaEventSynchronize(events_[f]), "work on the device"); }
  bool progress() override {
    const cudaError_t e = cudaStreamQuery(main());
    if (e == cudaErrorNotReady) return true;
    check(e, "work on the device");
    return false;
  }

  void begin_noting() override {
    // Thread-local: calls of other threads meanwhile are not captured.
    check(cudaStreamBeginCapture(main(), cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
  }
  int end_noting() override {
    cudaGraph_t graph = nullptr;
    check(cudaStreamEndCapture(main(), &graph), "cudaStreamEndCapture");
    cudaGraphExec_t made = nullptr;
    const cudaError_t e = cudaGraphInstantiate(&made, graph, 0);
    cudaGraphDestroy(graph);
    check(e, "cudaGraphInstantiate");
    noted_.push_back(made);
    return int(noted_.size()) - 1;
  }
  void repeat(int noted) override { check(cudaGraphLaunch(noted_[size_t(noted)], main()), "cudaGraphLaunch"); }
  void forget(int noted) noexcept override {
    cudaGraphExecDestroy(noted_[size_t(noted)]);
    noted_[size_t(noted)] = nullptr;
  }

  void quantize_rows(const RowsCall& x, const QuantizedBuffer& out) override {
    launched(quantize_rows_async(x, out, main()), "quantize_rows");
  }
  void quantize_hidden(Activation kind, const float* gate, const float* up, int n, int cols, const QuantizedBuffer& out,
                       float* hidden) override {
    launched(quantize_hidden_async(kind, gate, up, n, cols, out, hidden, main()), "quantize_hidden");
  }
  void ranks(const RanksCall* list, int count) override { launched(ranks_async(list, count, main()), "ranks"); }
  void products(const Product* list, int count) override { launched(products_async(list, count, main()), "products"); }
  void matmul_f32(const float* w, const float* x, int n, int rows, int cols, float* y) override {
    launched(matmul_f32_async(w, x, n, rows, cols, y, main()), "matmul_f32");
  }
  void norm_rows(float* x, const float* added, float scale, const float* weight, float eps, int n, int cols,
                 float* out) override {
    launched(norm_rows_async(x, added, scale, weight, eps, n, cols, out, main()), "norm_rows");
  }
  void prepare_heads(const HeadsCall& call, int T) override {
    launched(prepare_heads_async(call, T, main()), "prepare_heads");
  }
  void attend(const AttendCall& call, int T, int num_blocks) override {
    launched(attend_async(call, T, num_blocks, main()), "attend");
  }
  void choose(const ChooseCall& call, int T) override { launched(choose_async(call, T, main()), "choose"); }
  void chosen_products(const ChosenCall& call) override {
    launched(chosen_products_async(call, main()), "chosen_products");
  }
  void combine(const float* parts, const int32_t* rows, const float* gates, int T, int K, int cols,
               float* out) override {
    launched(combine_async(parts, rows, gates, T, K, cols, out, main()), "combine");
  }
  void add_rows(const float* x, float scale, const float* gate_weight, const float* gate_input, int T, int cols,
                float* out) override {
    launched(add_rows_async(x, scale, gate_weight, gate_input, T, cols, out, main()), "add_rows");
  }
  void add_bias(const float* bias, int T, int cols, float* out) override {
    launched(add_bias_async(bias, T, cols, out, main()), "add_bias");
  }
  void scale(float factor, size_t n, float* out) override { launched(scale_async(factor, n, out, main()), "scale"); }
  void multiply(const float* factors, size_t size, size_t n, float* out) override {
    launched(multiply_async(factors, size, n, out, main()), "multiply");
  }
  void weigh(const float* x, const float* gates, int T, int cols, float* out) override {
    launched(weigh_async(x, gates, T, cols, out, main()), "weigh");
  }
  void gate_heads(float* x, const float* gate, HeadGate kind, int T, int heads, int width) override {
    launched(gate_heads_async(x, gate, kind, T, heads, width, main()), "gate_heads");
  }
  void gated_norm(float* x, const float* gate, const float* weight, bool weight_per_group, float eps, Gate kind, int T,
                  int groups, int width) override {
    launched(gated_norm_async(x, gate, weight, weight_per_group, eps, kind, T, groups, width, main()), "gated_norm");
  }
  void short_conv(const ConvShape& shape, const float* x, const float* weight, const float* bias, const float* before,
                  float* tail, int T, float* out) override {
    launched(short_conv_async(shape, x, weight, bias, before, tail, T, out, main()), "short_conv");
  }
  void delta_rule(const DeltaCall& call, int T) override { launched(delta_rule_async(call, T, main()), "delta_rule"); }
  void mamba2(const MambaCall& call, int T) override { launched(mamba2_async(call, T, main()), "mamba2"); }
  void post(const PostCall& call) override { launched(post_async(call, main()), "post"); }
  void prepare_latents(const LatentsCall& call, int T) override {
    launched(prepare_latents_async(call, T, main()), "prepare_latents");
  }

 private:
  CudaDevice() = default;  // the other constructor delegates to it, so that the destructor runs if that one fails

  cudaStream_t main() const { return queues_[kCompute]; }
  static void launched(cudaError_t e, const char* kernel) { check(e, kernel); }

  cudaDeviceProp properties_{};
  cudaStream_t queues_[kNumQueues] = {};
  std::vector<cudaEvent_t> events_;
  std::vector<cudaGraphExec_t> noted_;  ///< by their numbers; null where forgotten
};

constexpr int kLeastMajor = 7, kLeastMinor = 5;  ///< the first whose tensor cores have 8-bit dot products

}  // namespace
}  // namespace cuda
}  // namespace edgemoe

using edgemoe::BackendProbe;

extern "C" {

[[gnu::visibility("default")]] void edgemoe_backend_probe(BackendProbe* out) {
  *out = {};
  out->abi = edgemoe::kBackendAbi;
  cudaDriverGetVersion(&out->driver);
  cudaRuntimeGetVersion(&out->runtime);
  const cudaError_t e = cudaGetDeviceCount(&out->num_devices);
  if (e == cudaSuccess && out->num_devices > 0) return;
  cudaGetLastError();
  out->num_devices = 0;
  const auto why = [out](const std::string& text) {
    std::snprintf(out->why_not, sizeof out->why_not, "%s", text.c_str());
  };
  const auto version = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
  if (out->driver == 0) {
    why("no NVIDIA driver");
  } else if (e == cudaErrorInsufficientDriver || out->driver / 1000 < out->runtime / 1000) {
    why("the driver is too old: it is for CUDA " + version(out->driver) + ", this plug-in for " +
        version(out->runtime));
  } else {
    why(e == cudaSuccess || e == cudaErrorNoDevice ? "no device"
                                                   : std::string("cudaGetDeviceCount: ") + cudaGetErrorString(e));
  }
}

[[gnu::visibility("default")]] edgemoe::Device* edgemoe_backend_open(int ordinal, char* error, size_t size) {
  using namespace edgemoe::cuda;
  try {
    auto device = std::make_unique<CudaDevice>(ordinal);
    const edgemoe::DeviceInfo info = device->info();
    if (std::make_pair(info.major, info.minor) < std::make_pair(kLeastMajor, kLeastMinor)) {
      std::snprintf(error, size, "%s has compute capability %d.%d, and %d.%d is needed", info.name, info.major,
                    info.minor, kLeastMajor, kLeastMinor);
      return nullptr;
    }
    return device.release();
  } catch (const std::exception& e) {
    std::snprintf(error, size, "%s", e.what());
    return nullptr;
  }
}

}  // extern "C"
