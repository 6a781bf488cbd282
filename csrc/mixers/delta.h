// The gated delta rule: Gated DeltaNet (arXiv 2412.06464) with one decay per head, Kimi Delta Attention (arXiv
// 2510.26692) with one per key channel.
#pragma once

#include "dense.h"
#include "mixers/shapes.h"

namespace edgemoe {

/// A layer's parameters besides its matrices; see `Decay`.
struct DeltaParts {
  DeltaShape shape;
  const float* rate;  ///< [value_heads]
  const float* bias;  ///< [value_heads] or [value_heads * key_dim]
};

/// Runs the rule over T tokens.
///
/// q, k [T, key_heads * key_dim] inside rows of `qkv_stride` floats, v [T, value_heads * value_dim] likewise. q and k
/// are scaled to unit length (x / sqrt(sum x^2 + 1e-6)), q also by key_dim^-0.5; all in place. `decay` [T, value_heads]
/// or [T, value_heads * key_dim] is x of `Decay` and becomes a. `beta` [T, value_heads] becomes sigmoid(beta). `before`
/// [value_heads, key_dim, value_dim], or null for zeros, is the state before the tokens, and `state` becomes that after
/// them; they may be the same. out [T, value_heads * value_dim].
void delta_rule(Workspace& ws, const DeltaParts& parts, float* q, float* k, const float* v, size_t qkv_stride,
                float* decay, float* beta, int T, const float* before, float* state, float* out);

}  // namespace edgemoe
