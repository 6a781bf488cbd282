// Multi-head latent attention (arXiv 2405.04434, section 2.1) in its absorbed form, for prompts and single tokens
// alike.
//
// A position has one key for all heads: a latent, and a part that is turned by the position. A head's own keys and
// values are linear in the latent, so they are never computed. Instead a head's query is mapped to the latent's columns
// (`linear_heads` with the head's key matrix) and attends to the latents, and the result is mapped to the head's values
// (likewise).
#pragma once

#include "dense.h"
#include "kernels/kernels.h"
#include "mixers/shapes.h"

namespace edgemoe {

/// What latent attention needs besides the projections.
struct LatentParts {
  int layer;  ///< for errors
  LatentShape shape;
  const float* norm;  ///< [latent_dim]
  float norm_eps;
  const float* cos;  ///< [T, rope_dim / 2]; null where nothing is turned
  const float* sin;
};

/// Attends to latents. absorbed [T, heads * (latent + rope)] has its latent columns already and gets its RoPE columns
/// from q [T, heads * (nope + rope)]; keys [T, latent + rope] are normed and turned in place and stored at [pos, pos +
/// T). out [T, heads * latent]. Throws RangeError like `attention`.
void latent_attention(Workspace& ws, const float* q, float* absorbed, float* keys, int T, int pos,
                      const LatentParts& parts, const KvLayer& kv, float* out);

/// A layer's projections.
struct LatentMatrices {
  const NestedMatrix* kv_a;
  const NestedMatrix* q_a;  ///< gives the queries where there is no q_b
  const NestedMatrix* q_b;  ///< or null
  const NestedMatrix *k_b, *v_b, *out;
  const float* q_norm;  ///< the norm of what q_a gives, where there is a q_b
  float eps;            ///< of that norm
};

/// Scratch for what the projections give, T rows each.
struct LatentRows {
  float *q_a, *q, *absorbed, *keys, *latents, *values;
};

/// Runs a whole layer, x [T, hidden] to out [T, hidden]: the projections, and `latent_attention` between them.
void attend_latents(Workspace& ws, const float* x, int T, int pos, const LatentParts& parts,
                    const LatentMatrices& matrices, const LatentRows& rows, const KvLayer& kv, float* out);

}  // namespace edgemoe
