// The one file of device code: every kernel's launch.
#include "attend.cuh"
#include "heads.cuh"
#include "launch.h"
#include "products.cuh"
#include "rows.cuh"

namespace edgemoe {
namespace cuda {
namespace {

constexpr unsigned kMostInGrid = 65535;  ///< along its second and third axis

dim3 grid(int x, int y = 1, int z = 1) { return dim3(unsigned(x), unsigned(y), unsigned(z)); }

template <KvType kKeys>
cudaError_t attend_with(const AttendCall& call, dim3 grid, cudaStream_t s) {
  switch (call.kv.value_type) {
    case KvType::kF16:
      return EDGEMOE_LAUNCH(grid, dim3(kKeyBlock), s, (attend<kKeys, KvType::kF16>), call);
    case KvType::kF32:
      return EDGEMOE_LAUNCH(grid, dim3(kKeyBlock), s, (attend<kKeys, KvType::kF32>), call);
    case KvType::kQ8:
      return EDGEMOE_LAUNCH(grid, dim3(kKeyBlock), s, (attend<kKeys, KvType::kQ8>), call);
    default:  // packed ones are the CPU's
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t quantize_rows_async(const float* x, const float* up, const int32_t* rows, int n, int cols,
                                const QuantizedBuffer& out, cudaStream_t s) {
  const dim3 size = grid(blocks(out.tiles * kScales, kRowThreads / 32), n);
  return EDGEMOE_LAUNCH(size, dim3(kRowThreads), s, quantize_rows, x, up, rows, cols, out.tiles, out.codes, out.scales,
                        out.sums);
}

cudaError_t products_async(const Product* list, int count, cudaStream_t s) {
  for (int first = 0; first < count; first += kMostProducts) {
    ProductList part{};
    int max_rows = 0, max_n = 0;
    const int n = min(kMostProducts, count - first);
    for (int i = 0; i < n; ++i) {
      part.of[i] = list[first + i];
      max_rows = max(max_rows, part.of[i].w.rows);
      max_n = max(max_n, part.of[i].n);
    }
    const int row_blocks = blocks(max_rows, kTileRows);
    const cudaError_t e = max_n == 1 ? EDGEMOE_LAUNCH(grid(row_blocks, n), dim3(kWarps * 32), s, products<1>, part)
                                     : EDGEMOE_LAUNCH(grid(row_blocks, n, blocks(max_n, kFewTokens)), dim3(kWarps * 32),
                                                      s, products<kFewTokens>, part);
    if (e != cudaSuccess) return e;
  }
  return cudaSuccess;
}

cudaError_t matmul_f32_async(const float* w, const float* x, int n, int rows, int cols, float* y, cudaStream_t s) {
  return EDGEMOE_LAUNCH(grid(blocks(rows, 16), n), dim3(kRowThreads), s, matmul_f32, w, x, rows, cols, y);
}

cudaError_t norm_rows_async(float* x, const float* added, float scale, const float* weight, float eps, int n, int cols,
                            float* out, cudaStream_t s) {
  return EDGEMOE_LAUNCH(grid(n), dim3(kRowThreads), s, norm_rows, x, added, scale, weight, eps, cols, out);
}

cudaError_t prepare_heads_async(const HeadsCall& call, int T, cudaStream_t s) {
  const int heads = call.q.num_heads + call.k.num_heads + call.v.num_heads;
  return EDGEMOE_LAUNCH(grid(heads, T), dim3(32), s, prepare_heads, call);
}

cudaError_t attend_async(const AttendCall& call, int T, int num_blocks, cudaStream_t s) {
  static_assert(kMostHeadDim <= 1024, "a block's threads");
  const dim3 size = grid(num_blocks, call.shape.num_kv_heads, T);
  if (size.y > kMostInGrid || size.z > kMostInGrid) return cudaErrorInvalidValue;
  cudaError_t e = cudaErrorInvalidValue;
  switch (call.kv.key_type) {
    case KvType::kF16:
      e = attend_with<KvType::kF16>(call, size, s);
      break;
    case KvType::kF32:
      e = attend_with<KvType::kF32>(call, size, s);
      break;
    case KvType::kQ8:
      e = attend_with<KvType::kQ8>(call, size, s);
      break;
    default:  // packed ones are the CPU's
      break;
  }
  if (e != cudaSuccess) return e;
  return EDGEMOE_LAUNCH(grid(call.shape.num_heads, T), dim3(kMostHeadDim), s, merge_blocks, call, num_blocks);
}

cudaError_t combine_async(const float* parts, const int32_t* rows, const float* gates, int T, int K, int cols,
                          float* out, cudaStream_t s) {
  return EDGEMOE_LAUNCH(grid(blocks(cols, kRowThreads), T), dim3(kRowThreads), s, combine, parts, rows, gates, K, cols,
                        out);
}

cudaError_t add_rows_async(const float* x, float scale, const float* gate_weight, const float* gate_input, int T,
                           int cols, float* out, cudaStream_t s) {
  return EDGEMOE_LAUNCH(grid(T), dim3(kRowThreads), s, add_rows, x, scale, gate_weight, gate_input, cols, out);
}

cudaError_t add_bias_async(const float* bias, int T, int cols, float* out, cudaStream_t s) {
  return EDGEMOE_LAUNCH(grid(T), dim3(kRowThreads), s, add_bias, bias, cols, out);
}

cudaError_t scale_async(float factor, size_t n, float* out, cudaStream_t s) {
  return EDGEMOE_LAUNCH(dim3(unsigned((n + kRowThreads - 1) / kRowThreads)), dim3(kRowThreads), s, scale_all, factor, n,
                        out);
}

}  // namespace cuda
}  // namespace edgemoe
