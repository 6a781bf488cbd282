// The two things in CUDA C++ that g++ cannot parse: kernel launches and shared memory.
//
// The same sources are compiled by nvcc for devices, and by g++ for the tests' simulator. nvcc must be given
// --fmad=false: with it, and with fmaf where the CPU fuses, +, -, *, / and sqrtf round as the CPU's do. Never
// --use_fast_math.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#ifdef EDGEMOE_CUDASIM
#define EDGEMOE_TEXT_(x) #x
#define EDGEMOE_TEXT(x) EDGEMOE_TEXT_(x)
#define EDGEMOE_SHARED(T, name, N) \
  T* const name = static_cast<T*>(::cudasim::shared_memory(__FILE__ ":" EDGEMOE_TEXT(__LINE__), sizeof(T) * (N)))
#define EDGEMOE_LAUNCH(grid, block, stream, kernel, ...) \
  ::cudasim::launch(grid, block, stream, EDGEMOE_TEXT(kernel), kernel, __VA_ARGS__)
#define EDGEMOE_UNROLL
#define EDGEMOE_ROLLED
#define EDGEMOE_UNROLL_8
#else
#define EDGEMOE_SHARED(T, name, N) __shared__ __align__(16) T name[N]
#define EDGEMOE_LAUNCH(grid, block, stream, kernel, ...) \
  (kernel<<<(grid), (block), 0, (stream)>>>(__VA_ARGS__), cudaGetLastError())
#define EDGEMOE_UNROLL _Pragma("unroll")
#define EDGEMOE_ROLLED _Pragma("unroll 1")
#define EDGEMOE_UNROLL_8 _Pragma("unroll 8")
#endif

namespace edgemoe {
namespace cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

}  // namespace cuda
}  // namespace edgemoe
