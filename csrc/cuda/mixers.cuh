// Mixers whose state does not grow, and gates: time runs in one order, and a thread is a channel or a column of a
// state, as a lane is on the CPU (kernels/recurrent-inl.h).
#pragma once

#include "heads.cuh"
#include "rows.cuh"

namespace edgemoe {
namespace cuda {

constexpr int kStateThreads = 128;

/// Grid: groups of 256 values.
template <HeadGate kKind>
__global__ void __launch_bounds__(kRowThreads) gate_heads(float* x, const float* gate, int width, size_t n) {
  const size_t i = size_t(blockIdx.x) * kRowThreads + threadIdx.x;
  if (i >= n) return;
  const float g = gate[kKind == HeadGate::kSigmoid ? i : i / width];
  x[i] = x[i] * (kKind == HeadGate::kSoftplusHead ? softplus(g) : sigmoid(g));
}

/// Grid: the groups of all rows.
template <Gate kKind>
__global__ void __launch_bounds__(kRowThreads) gated_norm(float* x, const float* gate, const float* weight,
                                                          bool weight_per_group, float eps, int groups, int width) {
  EDGEMOE_SHARED(float, total, 1);
  const size_t at = size_t(blockIdx.x) * width;
  float* mine = x + at;
  const float* z = gate + at;
  const float* w = weight + (weight_per_group ? size_t(int(blockIdx.x) % groups) * width : 0);
  if constexpr (kKind == Gate::kSiluFirst) {
    for (int c = threadIdx.x; c < width; c += kRowThreads) mine[c] = silu_mul(z[c], mine[c]);
    __syncthreads();
  }
  if (threadIdx.x < 32) {
    const float sum = dot16(mine, mine, width);
    if (threadIdx.x == 0) total[0] = sum;
  }
  __syncthreads();
  const float inverse = 1.0f / sqrtf(total[0] / float(width) + eps);
  for (int c = threadIdx.x; c < width; c += kRowThreads) {
    const float y = mine[c] * inverse * w[c];
    if constexpr (kKind == Gate::kSilu) mine[c] = silu_mul(z[c], y);
    if constexpr (kKind == Gate::kSigmoid) mine[c] = y * sigmoid(z[c]);
    if constexpr (kKind == Gate::kSiluFirst) mine[c] = y;
  }
}

/// Grid: groups of 256 channels. The window's newest value is its last, whatever the taps.
__global__ void __launch_bounds__(kRowThreads)
    short_conv(ConvShape s, const float* x, const float* weight, const float* bias, const float* before, float* tail,
               int T, float* out) {
  const int c = int(blockIdx.x) * kRowThreads + int(threadIdx.x), skipped = kMaxTaps - s.taps;
  if (c >= s.channels) return;
  float window[kMaxTaps], w[kMaxTaps];
  EDGEMOE_UNROLL
  for (int j = 0; j < kMaxTaps; ++j) {
    const size_t at = size_t(j - skipped) * s.channels + c;
    w[j] = j >= skipped ? weight[at] : 0.0f;
    window[j] = j >= skipped && j < kMaxTaps - 1 && before ? before[at] : 0.0f;
  }
  const float start = bias ? bias[c] : 0.0f;
  for (int t = 0; t < T; ++t) {
    window[kMaxTaps - 1] = x[t * s.x_stride + c];
    float y = start;
    EDGEMOE_UNROLL
    for (int j = 0; j < kMaxTaps; ++j) y = j >= skipped ? fmaf(w[j], window[j], y) : y;
    out[t * s.out_stride + c] = s.silu ? gated(y, y) : y;
    EDGEMOE_UNROLL
    for (int j = 0; j + 1 < kMaxTaps; ++j) window[j] = window[j + 1];
  }
  EDGEMOE_UNROLL
  for (int j = 0; j + 1 < kMaxTaps; ++j) {
    if (j >= skipped) tail[size_t(j - skipped) * s.channels + c] = window[j];
  }
}

/// Grid: (heads of q, heads of k and one for decays and betas, tokens).
__global__ void __launch_bounds__(kStateThreads) prepare_delta(DeltaCall call) {
  const DeltaShape& s = call.shape;
  const size_t t = blockIdx.y;
  const int place = int(blockIdx.x);
  if (place < 2 * s.key_heads) {  // scales it to unit length
    if (threadIdx.x >= 32) return;
    const bool is_key = place >= s.key_heads;
    float* x = (is_key ? call.k : call.q) + t * call.stride + size_t(place % s.key_heads) * s.key_dim;
    const float sum = __shfl_sync(kAllLanes, dot16(x, x, s.key_dim), 0);
    const float inverse = 1.0f / sqrtf(sum / float(s.key_dim) + call.norm_eps);
    __syncwarp();
    for (int i = threadIdx.x; i < s.key_dim; i += 32) x[i] = x[i] * inverse * (is_key ? call.k_weight : call.q_weight);
    return;
  }
  const int per_head = s.decay_per_channel ? s.key_dim : 1, decays = s.value_heads * per_head;
  float* decay = call.decay + t * decays;
  for (int i = threadIdx.x; i < decays; i += kStateThreads) {
    const float at = decay[i] + call.bias[i], rate = call.rate[i / per_head];
    const float steps = s.decay == Decay::kSoftplus ? rate * softplus(at) : kDecayBound * sigmoid(rate * at);
    decay[i] = exact_exp(0.0f - steps);
  }
  float* beta = call.beta + t * s.value_heads;
  for (int i = threadIdx.x; i < s.value_heads; i += kStateThreads) beta[i] = sigmoid(beta[i]);
}

/// Grid: (value heads, groups of 128 columns).
__global__ void __launch_bounds__(kStateThreads) delta_rule(DeltaCall call, int T) {
  const DeltaShape& s = call.shape;
  const int head = int(blockIdx.x), column = int(blockIdx.y) * kStateThreads + int(threadIdx.x);
  if (column >= s.value_dim) return;
  const int per_head = s.decay_per_channel ? s.key_dim : 1, each = s.decay_per_channel ? 1 : 0;
  const size_t key = size_t(head / (s.value_heads / s.key_heads)) * s.key_dim, dv = size_t(s.value_dim);
  const size_t matrix = size_t(head) * s.key_dim * dv + column, value = head * dv + column;
  float* state = call.state + matrix;
  const float* from = call.before ? call.before + matrix : nullptr;
  for (int t = 0; t < T; ++t, from = state) {
    const float *q = call.q + t * call.stride + key, *k = call.k + t * call.stride + key;
    const float* decay = call.decay + (size_t(t) * s.value_heads + head) * per_head;
    float held = 0;  // the value that the state has for this key
    EDGEMOE_UNROLL_8
    for (int i = 0; i < s.key_dim; ++i) held = fmaf((from ? from[i * dv] : 0.0f) * decay[i * each], k[i], held);
    const float change = call.beta[size_t(t) * s.value_heads + head] * (call.v[t * call.stride + value] - held);
    float out = 0;
    EDGEMOE_UNROLL_8
    for (int i = 0; i < s.key_dim; ++i) {
      const float next = fmaf(k[i], change, (from ? from[i * dv] : 0.0f) * decay[i * each]);
      state[i * dv] = next;
      out = fmaf(next, q[i], out);
    }
    call.out[size_t(t) * s.value_heads * dv + value] = out;
  }
}

/// Grid: tokens.
__global__ void __launch_bounds__(kStateThreads) prepare_mamba(MambaCall call) {
  const int heads = call.shape.num_heads;
  const size_t at = size_t(blockIdx.x) * heads;
  for (int h = threadIdx.x; h < heads; h += kStateThreads) {
    const float step = softplus(call.step[at + h] + call.step_bias[h]);
    call.step[at + h] = step;
    call.decay[at + h] = exact_exp(0.0f - call.rate[h] * step);
  }
}

/// Grid: (heads, groups of 128 columns).
__global__ void __launch_bounds__(kStateThreads) mamba2(MambaCall call, int T) {
  const MambaShape& s = call.shape;
  const int head = int(blockIdx.x), column = int(blockIdx.y) * kStateThreads + int(threadIdx.x);
  if (column >= s.head_dim) return;
  const size_t group = size_t(head / (s.num_heads / s.groups)) * s.state_dim, width = size_t(s.head_dim);
  const size_t matrix = size_t(head) * s.state_dim * width + column, value = head * width + column;
  float* state = call.state + matrix;
  const float* from = call.before ? call.before + matrix : nullptr;
  for (int t = 0; t < T; ++t, from = state) {
    const float *b = call.b + t * call.stride + group, *c = call.c + t * call.stride + group;
    const float x = call.x[t * call.stride + value], decay = call.decay[size_t(t) * s.num_heads + head];
    const float in = call.step[size_t(t) * s.num_heads + head] * x;
    float out = call.skip[head] * x;
    EDGEMOE_UNROLL_8
    for (int i = 0; i < s.state_dim; ++i) {
      const float next = fmaf(b[i], in, decay * (from ? from[i * width] : 0.0f));
      state[i * width] = next;
      out = fmaf(next, c[i], out);
    }
    call.out[size_t(t) * s.num_heads * width + value] = out;
  }
}

}  // namespace cuda
}  // namespace edgemoe
