// Attention of one layer: prompts in groups of queries, single tokens split over blocks of positions.
//
// A query's result is that of blocks of kKeyBlock positions, each with a softmax of its own, merged in their order. So
// it does not depend on who computes which block, nor on the queries beside it.
#pragma once

#include <cstddef>

#include "dense.h"
#include "mixers/key_constants.h"

namespace edgemoe {

/// What attention needs besides the projections. Null pointers where the model has none.
struct AttentionParts {
  int layer;  ///< for errors
  AttentionShape shape;
  const float *q_bias, *k_bias, *v_bias;
  const float *q_norm, *k_norm;
  const float* v_norm;  ///< [head_dim]
  const float* sinks;   ///< [num_heads]: each head's softmax has a further term of this logit, whose value is zero
  bool norm_per_head;
  bool norm_after_rope;  ///< and not before; only per head
  float norm_eps;
  float clip;    ///< clamps q, k and v to ±clip after the norm; 0 for none
  float growth;  ///< queries at position p are at last times 1 + growth * log(1 + (p + 1) / grow_every)
  int grow_every;
  const float* cos;  ///< [T, rope_dim / 2]
  const float* sin;
  const KeyConstants* constants;  ///< what keys in codes lack; null for nothing
  const float* turns;             ///< for these: the tiles of a Rope, of all positions until now
};

/// Adds biases, norms, clamps and rotates q [T, heads * head_dim], k and v [T, kv_heads * head_dim] in place, stores
/// k and v at positions [pos, pos + T) and attends causally, to what is stored. out [T, heads * head_dim]. Throws
/// RangeError where the cache's type cannot hold a key or value; what lies before `pos` stays. For latents, where `kv`
/// has no values, v is null and out [T, heads * value_stride].
void attention(Workspace& ws, float* q, float* k, float* v, int T, int pos, const AttentionParts& parts,
               const KvLayer& kv, float* out);

/// Scratch that attention takes of a workspace.
size_t attention_floats(int num_threads, const WorkspaceShape& shape);

}  // namespace edgemoe
