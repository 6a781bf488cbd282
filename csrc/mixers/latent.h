// Multi-head latent attention (arXiv 2405.04434, section 2.1) in its absorbed form, for prompts and single tokens
// alike.
//
// A position has one key for all heads: a latent, and a part that is turned by the position. A head's own keys and
// values would be linear in the latent. So its query is brought to the latent's columns instead (`linear_heads` with
// the head's key matrix), attends to the latents, and what comes out is brought to the head's values (likewise).
#pragma once

#include "dense.h"
#include "kernels/kernels.h"
#include "mixers/shapes.h"

namespace edgemoe {

/// What it needs besides the projections.
struct LatentParts {
  int layer;  ///< for errors
  LatentShape shape;
  const float* norm;  ///< [latent_dim]
  float norm_eps;
  const float* cos;  ///< [T, rope_dim / 2]; null where it does not rotate
  const float* sin;
};

/// q [T, heads * (nope + rope)], of which the parts for RoPE are used; absorbed [T, heads * (latent + rope)], whose
/// latent columns are there, gets these; keys [T, latent + rope] are normed and turned in place and stored at [pos, pos
/// + T). out [T, heads * latent]. Throws RangeError like `attention`.
void latent_attention(Workspace& ws, const float* q, float* absorbed, float* keys, int T, int pos,
                      const LatentParts& parts, const KvLayer& kv, float* out);

/// A layer's projections.
struct LatentMatrices {
  const NestedMatrix* kv_a;
  const NestedMatrix* q_a;  ///< to queries, where there is no q_b
  const NestedMatrix* q_b;  ///< or null
  const NestedMatrix *k_b, *v_b, *out;
  const float* q_norm;  ///< of what q_a gives, where there is a q_b
  float eps;            ///< its own
};

/// Scratch for what they give, T rows each.
struct LatentRows {
  float *q_a, *q, *absorbed, *keys, *latents, *values;
};

/// All of a layer on x [T, hidden] to out [T, hidden]: the projections, and `latent_attention` between them.
void attend_latents(Workspace& ws, const float* x, int T, int pos, const LatentParts& parts,
                    const LatentMatrices& matrices, const LatentRows& rows, const KvLayer& kv, float* out);

}  // namespace edgemoe
