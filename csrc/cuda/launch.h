// Plain functions that launch the kernels, so that only kernels.cu needs nvcc.
#pragma once

#include <cuda_runtime.h>

#include "device/device.h"

namespace edgemoe {
namespace cuda {

cudaError_t quantize_rows_async(const RowsCall& x, const QuantizedBuffer& out, cudaStream_t s);
cudaError_t quantize_hidden_async(Activation kind, const float* gate, const float* up, int n, int cols,
                                  const QuantizedBuffer& out, float* hidden, cudaStream_t s);
cudaError_t ranks_async(const RanksCall* list, int count, cudaStream_t s);
cudaError_t products_async(const Product* list, int count, cudaStream_t s);
cudaError_t chosen_products_async(const ChosenCall& call, cudaStream_t s);
cudaError_t choose_async(const ChooseCall& call, int T, cudaStream_t s);
cudaError_t matmul_f32_async(const float* w, const float* x, int n, int rows, int cols, float* y, cudaStream_t s);
cudaError_t norm_rows_async(float* x, const float* added, float scale, const float* weight, float eps, int n, int cols,
                            float* out, cudaStream_t s);
cudaError_t prepare_heads_async(const HeadsCall& call, int T, cudaStream_t s);
cudaError_t attend_async(const AttendCall& call, int T, int num_blocks, cudaStream_t s);
cudaError_t combine_async(const float* parts, const int32_t* rows, const float* gates, int T, int K, int cols,
                          float* out, cudaStream_t s);
cudaError_t add_rows_async(const float* x, float scale, const float* gate_weight, const float* gate_input, int T,
                           int cols, float* out, cudaStream_t s);
cudaError_t add_bias_async(const float* bias, int T, int cols, float* out, cudaStream_t s);
cudaError_t scale_async(float factor, size_t n, float* out, cudaStream_t s);
cudaError_t multiply_async(const float* factors, size_t size, size_t n, float* out, cudaStream_t s);
cudaError_t weigh_async(const float* x, const float* gates, int T, int cols, float* out, cudaStream_t s);
cudaError_t gate_heads_async(float* x, const float* gate, HeadGate kind, int T, int heads, int width, cudaStream_t s);
cudaError_t gated_norm_async(float* x, const float* gate, const float* weight, bool weight_per_group, float eps,
                             Gate kind, int T, int groups, int width, cudaStream_t s);
cudaError_t short_conv_async(const ConvShape& shape, const float* x, const float* weight, const float* bias,
                             const float* before, float* tail, int T, float* out, cudaStream_t s);
cudaError_t delta_rule_async(const DeltaCall& call, int T, cudaStream_t s);
cudaError_t mamba2_async(const MambaCall& call, int T, cudaStream_t s);
cudaError_t prepare_latents_async(const LatentsCall& call, int T, cudaStream_t s);
cudaError_t post_async(const PostCall& call, cudaStream_t s);

}  // namespace cuda
}  // namespace edgemoe
