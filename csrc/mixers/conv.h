// Short causal convolutions over time, each channel by itself: Mamba's, the delta rules', LFM2's.
#pragma once

#include "dense.h"

namespace edgemoe {

/// Convolves x [T, channels] to out [T, channels]; see `Kernels::short_conv`. Threads share the channels.
void short_conv(Workspace& ws, const ConvShape& shape, const float* x, const float* weight, const float* bias,
                const float* before, float* tail, int T, float* out);

}  // namespace edgemoe
