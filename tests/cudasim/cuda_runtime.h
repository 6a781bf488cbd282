// Stands in for CUDA's header of this name when g++ compiles the kernels for the simulator. It has what csrc/cuda uses
// and no more, so that the tests need no toolkit. nvcc checks the same sources against NVIDIA's own header.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 {
  float x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};

// ---------------------------------------------------------------- the runtime's functions

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorIllegalState = 401,
  cudaErrorNotReady = 600,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchTimeout = 702,
  cudaErrorLaunchFailure = 719,
  cudaErrorStreamCaptureUnsupported = 900,
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
using cudaStream_t = struct CUstream_st*;
using cudaEvent_t = struct CUevent_st*;
using cudaGraph_t = struct CUgraph_st*;
using cudaGraphExec_t = struct CUgraphExec_st*;
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal = 1 };
struct cudaDeviceProp {
  char name[256];
  int major, minor, multiProcessorCount, integrated;
  size_t totalGlobalMem;
};
constexpr unsigned cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2, cudaHostAllocMapped = 2,
                   cudaHostRegisterMapped = 2;

extern "C" {
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* to, int device);
cudaError_t cudaMemGetInfo(size_t* free, size_t* total);
cudaError_t cudaMalloc(void** to, size_t bytes);
cudaError_t cudaFree(void* p);
cudaError_t cudaHostAlloc(void** to, size_t bytes, unsigned flags);
cudaError_t cudaFreeHost(void* p);
cudaError_t cudaHostRegister(void* p, size_t bytes, unsigned flags);
cudaError_t cudaHostGetDevicePointer(void** to, void* p, unsigned flags);
cudaError_t cudaHostUnregister(void* p);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* to, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamQuery(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags);
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long flags);
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* to, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
}

// ---------------------------------------------------------------- what kernels see

namespace cudasim {

/// A thread's coordinates.
struct Place {
  uint3 thread, block;
  dim3 block_size, grid_size;
  int linear;  ///< the thread, in its block
};
extern Place* g_here;

void sync_threads(const char* file, int line);
/// Waits for all lanes of `mask`. Returns the value of each lane.
const uint64_t* exchange(unsigned mask, uint64_t value, const char* what);
void* shared_memory(const char* key, size_t bytes);
/// Returns an error if a kernel's argument points neither to device memory nor to pinned memory.
cudaError_t check_pointer(const void* p, const char* kernel, int arg);
cudaError_t enqueue_kernel(dim3 grid, dim3 block, cudaStream_t stream, const char* name, std::function<void()> body);

template <class T>
cudaError_t check_argument(const T& value, const char* kernel, int arg) {
  if constexpr (std::is_pointer_v<T>) return check_pointer(value, kernel, arg);
  return cudaSuccess;
}

/// Queues a launch; arguments are copied, as CUDA does.
template <class... P, class... A>
cudaError_t launch(dim3 grid, dim3 block, cudaStream_t stream, const char* name, void (*kernel)(P...), A&&... given) {
  std::tuple<std::decay_t<P>...> args(std::forward<A>(given)...);
  cudaError_t error = cudaSuccess;
  int i = 0;
  std::apply([&](const auto&... a) { ((error = error ? error : check_argument(a, name, i++)), ...); }, args);
  if (error) return error;
  return enqueue_kernel(grid, block, stream, name, [kernel, args] { std::apply(kernel, args); });
}

template <class T>
uint64_t pack(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T>
T unpack(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline int lane() { return g_here->linear & 31; }
template <class T>
T shuffle(unsigned mask, T value, int from, const char* what) {
  return unpack<T>(exchange(mask, pack(value), what)[from]);
}

}  // namespace cudasim

#define threadIdx (::cudasim::g_here->thread)
#define blockIdx (::cudasim::g_here->block)
#define blockDim (::cudasim::g_here->block_size)
#define gridDim (::cudasim::g_here->grid_size)
#define __syncthreads() ::cudasim::sync_threads(__FILE__, __LINE__)

/// Does nothing: here a kernel is one step for the host, which sees nothing out of order.
inline void __threadfence_system() {}
inline void __syncwarp(unsigned mask = 0xffffffffu) { cudasim::exchange(mask, 0, "__syncwarp"); }
template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
  return cudasim::shuffle(mask, value, from, "__shfl_sync");
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width) {
  const int lane = cudasim::lane(), from = lane + int(by);
  return cudasim::shuffle(mask, value, from > (lane | (width - 1)) ? lane : from, "__shfl_down_sync");
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int by) {
  return cudasim::shuffle(mask, value, cudasim::lane() ^ by, "__shfl_xor_sync");
}
inline int __any_sync(unsigned mask, int yes) {
  const uint64_t* all = cudasim::exchange(mask, yes != 0, "__any_sync");
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1) && all[i]) return 1;
  }
  return 0;
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
template <class T>
T __ldg(const T* p) {
  return *p;
}
inline int __float2int_rz(float x) { return x == x ? int(x) : 0; }  // 0 for NaN, as the instruction gives
inline float __int_as_float(int bits) { return cudasim::unpack<float>(uint32_t(bits)); }
inline int __float_as_int(float x) { return int(cudasim::pack(x)); }
/// Need not be atomic: the threads of a block are fibers of one thread.
inline unsigned long long atomicMin(unsigned long long* p, unsigned long long value) {
  const unsigned long long old = *p;
  if (value < old) *p = value;
  return old;
}
