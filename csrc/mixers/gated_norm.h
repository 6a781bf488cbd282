// RMS norms with a gate, and gates alone, which follow a recurrent mixer or attention.
#pragma once

#include "dense.h"
#include "mixers/shapes.h"

namespace edgemoe {

/// Norms and gates x [T, groups * width] in place; the norm is over each group's width. weight [width], or [groups *
/// width] if `weight_per_group`. gate [T, groups * width] lies in rows of `gate_stride` floats.
void gated_norm(Workspace& ws, float* x, const float* gate, size_t gate_stride, const float* weight,
                bool weight_per_group, float eps, Gate kind, int T, int groups, int width);

/// x [T, cols] *= sigmoid(gate [T, cols]).
void sigmoid_gate(Workspace& ws, float* x, const float* gate, int T, int cols);

/// Multiplies each head of x [T, heads * width] by sigmoid, or softplus, of its gate [T, heads].
void head_gate(Workspace& ws, float* x, const float* gate, bool softplus, int T, int heads, int width);

}  // namespace edgemoe
