// Plain functions over the kernels: only kernels.cu needs nvcc.
#pragma once

#include <cuda_runtime.h>

#include "device/device.h"

namespace edgemoe {
namespace cuda {

cudaError_t quantize_rows_async(const float* x, const float* up, const int32_t* rows, int n, int cols,
                                const QuantizedBuffer& out, cudaStream_t s);
cudaError_t products_async(const Product* list, int count, cudaStream_t s);
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

}  // namespace cuda
}  // namespace edgemoe
