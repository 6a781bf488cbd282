// Attention of one layer: prompts in groups of queries, single tokens split over blocks of positions.
//
// A query's result is merged from blocks of kKeyBlock positions, in their order; each block has its own softmax. So it
// depends neither on which thread computes which block nor on the other queries.
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
  const float* sinks;   ///< [num_heads]: each head's softmax has an extra term with this logit, whose value is zero
  bool norm_per_head;
  bool norm_after_rope;  ///< the norm comes after RoPE, not before; only with norm_per_head
  float norm_eps;
  float clip;    ///< clamps q, k and v to ±clip after the norm; 0 for none
  float growth;  ///< queries at position p are multiplied by 1 + growth * log(1 + floor((p + 1) / grow_every))
  int grow_every;
  const float* cos;  ///< [T, rope_dim / 2]
  const float* sin;
  const KeyConstants* constants;  ///< the biases that keys in codes leave out; null for none
  const float* turns;             ///< for `constants`: the tiles of a Rope, of all positions so far
};

/// Adds biases, norms, clamps and rotates q [T, heads * head_dim], k and v [T, kv_heads * head_dim] in place, stores
/// k and v at positions [pos, pos + T) and attends causally, to what is stored. out [T, heads * head_dim]. Throws
/// RangeError where the cache's type cannot hold a key or value; what lies before `pos` stays. For latents, where `kv`
/// has no values, v is null and out [T, heads * value_stride].
void attention(Workspace& ws, float* q, float* k, float* v, int T, int pos, const AttentionParts& parts,
               const KvLayer& kv, float* out);

/// Floats of scratch that attention takes in a workspace.
size_t attention_floats(int num_threads, const WorkspaceShape& shape);

}  // namespace edgemoe
