// Layers whose state does not grow with the context, for every instruction set: short convolutions, the gated delta
// rule, and Mamba-2.
//
// Time runs in one order, token after token, and nothing is summed across lanes: a lane is a channel, or a column of a
// state. So a result depends neither on how tokens are split into chunks nor on the instruction set.
#pragma once

#include "kernels.h"

namespace edgemoe {
namespace {

/// 16 * M columns of a head's state over T tokens; see `Kernels::delta_rule`.
template <class V, int M>
void delta_columns(const DeltaHead& h, int T, int column) {
  const float* from = h.before + column;
  float* state = h.state + column;
  for (int t = 0; t < T; ++t, from = state) {
    const float *q = h.q + t * h.key_stride, *k = h.k + t * h.key_stride;
    const float* v = h.v + t * h.value_stride + column;
    const float* decay = h.decay + t * h.decay_stride;
    typename V::F held[M];  // the value that the state has for this key
    for (auto& x : held) x = V::zero();
    for (int i = 0; i < h.key_dim; ++i) {
      const auto a = V::set(decay[h.decay_per_channel ? i : 0]), key = V::set(k[i]);
      const float* old = from + size_t(i) * h.value_dim;
      for (int j = 0; j < M; ++j) held[j] = V::fma(V::mul(V::load(old + 16 * j), a), key, held[j]);
    }
    typename V::F change[M], out[M];
    for (int j = 0; j < M; ++j) {
      change[j] = V::mul(V::set(h.beta[t * h.beta_stride]), V::sub(V::load(v + 16 * j), held[j]));
      out[j] = V::zero();
    }
    for (int i = 0; i < h.key_dim; ++i) {
      const auto a = V::set(decay[h.decay_per_channel ? i : 0]), key = V::set(k[i]), query = V::set(q[i]);
      const float* old = from + size_t(i) * h.value_dim;
      float* row = state + size_t(i) * h.value_dim;
      for (int j = 0; j < M; ++j) {
        const auto s = V::fma(key, change[j], V::mul(V::load(old + 16 * j), a));
        V::store(row + 16 * j, s);
        out[j] = V::fma(s, query, out[j]);
      }
    }
    for (int j = 0; j < M; ++j) V::store(h.out + t * h.out_stride + column + 16 * j, out[j]);
  }
}

/// The same for Mamba-2; see `Kernels::mamba2`.
template <class V, int M>
void mamba_columns(const MambaHead& h, int T, int column) {
  const float* from = h.before + column;
  float* state = h.state + column;
  for (int t = 0; t < T; ++t, from = state) {
    const float *b = h.b + t * h.group_stride, *c = h.c + t * h.group_stride;
    const float* x = h.x + t * h.x_stride + column;
    const auto decay = V::set(h.decay[t * h.step_stride]), step = V::set(h.step[t * h.step_stride]);
    typename V::F in[M], out[M];
    for (int j = 0; j < M; ++j) {
      in[j] = V::mul(step, V::load(x + 16 * j));
      out[j] = V::mul(V::set(h.skip), V::load(x + 16 * j));
    }
    for (int i = 0; i < h.state_dim; ++i) {
      const auto bi = V::set(b[i]), ci = V::set(c[i]);
      const float* old = from + size_t(i) * h.head_dim;
      float* row = state + size_t(i) * h.head_dim;
      for (int j = 0; j < M; ++j) {
        const auto s = V::fma(bi, in[j], V::mul(decay, V::load(old + 16 * j)));
        V::store(row + 16 * j, s);
        out[j] = V::fma(s, ci, out[j]);
      }
    }
    for (int j = 0; j < M; ++j) V::store(h.out + t * h.out_stride + column + 16 * j, out[j]);
  }
}

template <class V>
void delta_rule(const DeltaHead& h, int T, int begin, int end) {
  constexpr int M = V::kHeadVectors;
  int c = begin;
  if constexpr (M > 1) {  // whole rows of 128, so that memory is read in one run
    for (; c + 32 * M <= end; c += 32 * M) delta_columns<V, 2 * M>(h, T, c);
  }
  for (; c + 16 * M <= end; c += 16 * M) delta_columns<V, M>(h, T, c);
  for (; c < end; c += 16) delta_columns<V, 1>(h, T, c);
}

template <class V>
void mamba2(const MambaHead& h, int T, int begin, int end) {
  constexpr int M = V::kHeadVectors;
  int c = begin;
  for (; c + 16 * M <= end; c += 16 * M) mamba_columns<V, M>(h, T, c);
  for (; c < end; c += 16) mamba_columns<V, 1>(h, T, c);
}

template <class V>
void short_conv(const ConvShape& s, const float* x, const float* weight, const float* bias, const float* before,
                float* tail, int T, int begin, int end, float* out) {
  const int past = s.taps - 1;
  for (int c = begin; c < end; c += 16) {
    const int n = end - c < 16 ? end - c : 16;
    typename V::F window[kMaxTaps], w[kMaxTaps];
    for (int j = 0; j < s.taps; ++j) w[j] = load_part<V>(weight + size_t(j) * s.channels + c, n, 0.0f);
    for (int j = 0; j < past; ++j) {
      window[j] = before ? load_part<V>(before + size_t(j) * s.channels + c, n, 0.0f) : V::zero();
    }
    const auto start = bias ? load_part<V>(bias + c, n, 0.0f) : V::zero();
    for (int t = 0; t < T; ++t) {
      window[past] = load_part<V>(x + t * s.x_stride + c, n, 0.0f);
      auto y = start;
      for (int j = 0; j < s.taps; ++j) y = V::fma(w[j], window[j], y);
      store_part<V>(out + t * s.out_stride + c, s.silu ? gated<V>(y, y) : y, n);
      for (int j = 0; j < past; ++j) window[j] = window[j + 1];
    }
    for (int j = 0; j < past; ++j) store_part<V>(tail + size_t(j) * s.channels + c, window[j], n);
  }
}

template <class V>
inline typename V::F sigmoid_16(typename V::F x) {
  const auto one = V::set(1.0f);
  return V::div(one, V::add(one, exp<V>(V::sub(V::zero(), x))));
}

template <class V>
void sigmoid(float* x, int n) {
  for (int i = 0; i < n; i += 16) {
    const int here = n - i < 16 ? n - i : 16;
    store_part<V>(x + i, sigmoid_16<V>(load_part<V>(x + i, here, 0.0f)), here);
  }
}

/// log(1 + e^x) = max(x, 0) + log(1 + y), y = e^-|x|; and log(1 + y) = 2 artanh(y / (2 + y)), a series to 1e-9.
template <class V>
inline typename V::F softplus_16(typename V::F x) {
  const auto y = exp<V>(V::sub(V::zero(), V::abs(x)));
  const auto s = V::div(y, V::add(V::set(2.0f), y)), z = V::mul(s, s);
  auto p = V::set(2.0f / 17);
  p = V::fma(p, z, V::set(2.0f / 15));
  p = V::fma(p, z, V::set(2.0f / 13));
  p = V::fma(p, z, V::set(2.0f / 11));
  p = V::fma(p, z, V::set(2.0f / 9));
  p = V::fma(p, z, V::set(2.0f / 7));
  p = V::fma(p, z, V::set(2.0f / 5));
  p = V::fma(p, z, V::set(2.0f / 3));
  p = V::fma(p, z, V::set(2.0f));
  return V::fma(s, p, V::max(x, V::zero()));
}

template <class V>
void softplus(float* x, const float* bias, int n) {
  for (int i = 0; i < n; i += 16) {
    const int here = n - i < 16 ? n - i : 16;
    auto at = load_part<V>(x + i, here, 0.0f);
    if (bias) at = V::add(at, load_part<V>(bias + i, here, 0.0f));
    store_part<V>(x + i, softplus_16<V>(at), here);
  }
}

template <class V>
void decays(const float* step, const float* rate, bool rate_each, int n, float* out) {
  for (int i = 0; i < n; i += 16) {
    const int here = n - i < 16 ? n - i : 16;
    const auto r = rate_each ? load_part<V>(rate + i, here, 0.0f) : V::set(*rate);
    const auto at = V::mul(r, load_part<V>(step + i, here, 0.0f));
    store_part<V>(out + i, exp<V>(V::sub(V::zero(), at)), here);
  }
}

template <class V>
void sigmoid_mul(const float* gate, const float* x, int n, float* out) {
  for (int i = 0; i < n; i += 16) {
    const int here = n - i < 16 ? n - i : 16;
    const auto s = sigmoid_16<V>(load_part<V>(gate + i, here, 0.0f));
    store_part<V>(out + i, V::mul(load_part<V>(x + i, here, 0.0f), s), here);
  }
}

}  // namespace
}  // namespace edgemoe
