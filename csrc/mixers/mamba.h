// Mamba-2's state space layer (arXiv 2405.21060), as a recurrence over time.
#pragma once

#include "dense.h"
#include "mixers/shapes.h"

namespace edgemoe {

/// A layer's parameters besides its matrices and its convolution; all [num_heads].
struct MambaParts {
  MambaShape shape;
  const float* rate;  ///< a step's decay is exp(-rate * step)
  const float* step_bias;
  const float* skip;
};

/// Runs the recurrence over T tokens.
///
/// x [T, heads * head_dim], b and c [T, groups * state_dim] lie in rows of `stride` floats. `step` [T, num_heads]
/// becomes softplus(step + bias); `decay` [T, num_heads] is scratch. `before` [num_heads, state_dim, head_dim], or null
/// for zeros, is the state before the tokens, and `state` becomes that after them; they may be the same. out [T,
/// num_heads * head_dim].
void mamba2(Workspace& ws, const MambaParts& parts, const float* x, const float* b, const float* c, size_t stride,
            float* step, float* decay, int T, const float* before, float* state, float* out);

}  // namespace edgemoe
