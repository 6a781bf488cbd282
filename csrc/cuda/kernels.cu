// The one file of device code: the launches of all kernels.
#include "attend.cuh"
#include "choose.cuh"
#include "heads.cuh"
#include "launch.h"
#include "mixers.cuh"
#include "products.cuh"
#include "ranks.cuh"
#include "rows.cuh"

namespace edgemoe {
namespace cuda {
namespace {

constexpr unsigned kMostInGrid = 65535;  ///< along its second and third axis

dim3 grid(int x, int y = 1, int z = 1) { return dim3(unsigned(x), unsigned(y), unsigned(z)); }

template <KvType kKeys>
cudaError_t attend_with(const AttendCall& call, dim3 grid, cudaStream_t s) {
  if (!call.kv.values) return EDGEMOE_LAUNCH(grid, dim3(kKeyBlock), s, (attend<kKeys, kKeys, true>), call);
  switch (call.kv.value_type) {
    case KvType::kF16:
      return EDGEMOE_LAUNCH(grid, dim3(kKeyBlock), s, (attend<kKeys, KvType::kF16, false>), call);
    case KvType::kF32:
      return EDGEMOE_LAUNCH(grid, dim3(kKeyBlock), s, (attend<kKeys, KvType::kF32, false>), call);
    case KvType::kQ8:
      return EDGEMOE_LAUNCH(grid, dim3(kKeyBlock), s, (attend<kKeys, KvType::kQ8, false>), call);
    default:  // packed types are for the CPU only
      return cudaErrorInvalidValue;
  }
}

dim3 groups_of(size_t n) { return dim3(unsigned((n + kRowThreads - 1) / kRowThreads)); }

}  // namespace

cudaError_t quantize_rows_async(const RowsCall& x, const QuantizedBuffer& out, cudaStream_t s) {
  const dim3 size = grid(x.n, blocks(out.tiles * kScales, kRowThreads / 32));
  return EDGEMOE_LAUNCH(size, dim3(kRowThreads), s, quantize_rows, x, out);
}

cudaError_t quantize_hidden_async(Activation kind, const float* gate, const float* up, int n, int cols,
                                  const QuantizedBuffer& out, float* hidden, cudaStream_t s) {
  const dim3 size = grid(n, blocks(out.tiles * kScales, kRowThreads / 32)), block(kRowThreads);
  switch (kind) {
    case Activation::kSwiglu:
      return EDGEMOE_LAUNCH(size, block, s, quantize_hidden<Activation::kSwiglu>, gate, up, cols, out, hidden);
    case Activation::kGeglu:
      return EDGEMOE_LAUNCH(size, block, s, quantize_hidden<Activation::kGeglu>, gate, up, cols, out, hidden);
    case Activation::kClampedSwiglu:
      return EDGEMOE_LAUNCH(size, block, s, quantize_hidden<Activation::kClampedSwiglu>, gate, up, cols, out, hidden);
    case Activation::kRelu2:
      return EDGEMOE_LAUNCH(size, block, s, quantize_hidden<Activation::kRelu2>, gate, up, cols, out, hidden);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t ranks_async(const RanksCall* list, int count, cudaStream_t s) {
  for (int first = 0; first < count; first += kMostRanks) {
    RanksList part{};
    int most = 0;
    const int n = min(kMostRanks, count - first);
    for (int i = 0; i < n; ++i) {
      part.of[i] = list[first + i];
      most = max(most, part.of[i].x.n);
    }
    const cudaError_t e = EDGEMOE_LAUNCH(grid(most, n), dim3(kRowThreads), s, ranks, part);
    if (e != cudaSuccess) return e;
  }
  return cudaSuccess;
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

cudaError_t chosen_products_async(const ChosenCall& call, cudaStream_t s) {
  return EDGEMOE_LAUNCH(grid(blocks(call.rows, kTileRows), call.count * call.parts), dim3(kWarps * 32), s,
                        chosen_products, call);
}

cudaError_t choose_async(const ChooseCall& call, int T, cudaStream_t s) {
  if (!is_known(call.rule)) return cudaErrorInvalidValue;
  return EDGEMOE_LAUNCH(grid(T), dim3(32), s, choose, call);
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
  static_assert(kMostHeadDim <= kQueryFloats, "a block has room for a query");
  // For latents, whose one head all queries share, a block takes as many queries as it has room for.
  const int most = kQueryFloats / (blocks(call.kv.head_stride, kKvGroup) * kKvGroup);
  const int quads = blocks(call.shape.num_heads, min(kHeadQueries, most));
  const dim3 size = grid(num_blocks, call.kv.values ? call.shape.num_kv_heads : quads, T);
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
    default:  // packed types are for the CPU only
      break;
  }
  if (e != cudaSuccess) return e;
  return EDGEMOE_LAUNCH(grid(call.shape.num_heads, T), dim3(kKeyBlock), s, merge_blocks, call, num_blocks);
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
  return EDGEMOE_LAUNCH(groups_of(n), dim3(kRowThreads), s, scale_all, factor, n, out);
}

cudaError_t multiply_async(const float* factors, size_t size, size_t n, float* out, cudaStream_t s) {
  return EDGEMOE_LAUNCH(groups_of(n), dim3(kRowThreads), s, multiply, factors, size, n, out);
}

cudaError_t weigh_async(const float* x, const float* gates, int T, int cols, float* out, cudaStream_t s) {
  return EDGEMOE_LAUNCH(grid(T), dim3(kRowThreads), s, weigh, x, gates, cols, out);
}

cudaError_t gate_heads_async(float* x, const float* gate, HeadGate kind, int T, int heads, int width, cudaStream_t s) {
  const size_t n = size_t(T) * heads * width;
  const dim3 size = groups_of(n), block(kRowThreads);
  switch (kind) {
    case HeadGate::kSigmoid:
      return EDGEMOE_LAUNCH(size, block, s, gate_heads<HeadGate::kSigmoid>, x, gate, width, n);
    case HeadGate::kSigmoidHead:
      return EDGEMOE_LAUNCH(size, block, s, gate_heads<HeadGate::kSigmoidHead>, x, gate, width, n);
    case HeadGate::kSoftplusHead:
      return EDGEMOE_LAUNCH(size, block, s, gate_heads<HeadGate::kSoftplusHead>, x, gate, width, n);
  }
  return cudaErrorInvalidValue;
}

cudaError_t gated_norm_async(float* x, const float* gate, const float* weight, bool weight_per_group, float eps,
                             Gate kind, int T, int groups, int width, cudaStream_t s) {
  const dim3 size = grid(T * groups), block(kRowThreads);
  switch (kind) {
    case Gate::kSilu:
      return EDGEMOE_LAUNCH(size, block, s, gated_norm<Gate::kSilu>, x, gate, weight, weight_per_group, eps, groups,
                            width);
    case Gate::kSigmoid:
      return EDGEMOE_LAUNCH(size, block, s, gated_norm<Gate::kSigmoid>, x, gate, weight, weight_per_group, eps, groups,
                            width);
    case Gate::kSiluFirst:
      return EDGEMOE_LAUNCH(size, block, s, gated_norm<Gate::kSiluFirst>, x, gate, weight, weight_per_group, eps,
                            groups, width);
  }
  return cudaErrorInvalidValue;
}

cudaError_t short_conv_async(const ConvShape& shape, const float* x, const float* weight, const float* bias,
                             const float* before, float* tail, int T, float* out, cudaStream_t s) {
  return EDGEMOE_LAUNCH(groups_of(size_t(shape.channels)), dim3(kRowThreads), s, short_conv, shape, x, weight, bias,
                        before, tail, T, out);
}

cudaError_t delta_rule_async(const DeltaCall& call, int T, cudaStream_t s) {
  const DeltaShape& shape = call.shape;
  const cudaError_t e = EDGEMOE_LAUNCH(grid(2 * shape.key_heads + 1, T), dim3(kStateThreads), s, prepare_delta, call);
  if (e != cudaSuccess) return e;
  return EDGEMOE_LAUNCH(grid(shape.value_heads, blocks(shape.value_dim, kStateThreads)), dim3(kStateThreads), s,
                        delta_rule, call, T);
}

cudaError_t mamba2_async(const MambaCall& call, int T, cudaStream_t s) {
  const cudaError_t e = EDGEMOE_LAUNCH(grid(T), dim3(kStateThreads), s, prepare_mamba, call);
  if (e != cudaSuccess) return e;
  return EDGEMOE_LAUNCH(grid(call.shape.num_heads, blocks(call.shape.head_dim, kStateThreads)), dim3(kStateThreads), s,
                        mamba2, call, T);
}

cudaError_t prepare_latents_async(const LatentsCall& call, int T, cudaStream_t s) {
  return EDGEMOE_LAUNCH(grid(call.shape.num_heads + 1, T), dim3(32), s, prepare_latents, call);
}

cudaError_t post_async(const PostCall& call, cudaStream_t s) {
  return EDGEMOE_LAUNCH(grid(1), dim3(kRowThreads), s, post, call);
}

}  // namespace cuda
}  // namespace edgemoe
