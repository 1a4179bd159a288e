// The interface between the host and the CUDA kernels: plain structs, and one launcher per op and family of kernels. No
// torch.
//
// A launcher puts one kernel onto `stream` and returns without synchronizing. It returns cudaErrorInvalidValue where
// the family has no such configuration for this dtype. Strides are in elements, widths of vectors in bytes.
#pragma once

#include <cuda_runtime_api.h>

#include "plan/geometry.h"
#include "plan/problem.h"

namespace lowrank_ops {

// A factor as a matrix: rows are the channels that it maps to, columns those that it maps from, and Tucker's core has
// taps beside them: element (row, column, ky, kx). `vector` is the width of its copies: 16, 8 or 4 bytes where the
// column stride is 1 and all addresses are aligned to it; otherwise the size of an element, and the copies take any
// stride.
struct Factor {
  const void* data = nullptr;
  int64_t row_stride = 0, column_stride = 1, tap_stride[2] = {0, 0};
  int vector = 0;
};

struct BlockParams {
  Geometry geometry;
  const void* input = nullptr;                          // [N, S, H, W], any strides
  void* output = nullptr;                               // [N, T, OH, OW], dense, in either memory format
  int64_t input_stride[4] = {}, output_stride[4] = {};  // n, channel, h, w
  int input_vector = 0, output_vector = 0;              // as Factor::vector; columns are channels
  Factor in_factor;                                     // [R1, S]
  Factor core;                                          // Tucker: [R2, R1, KH, KW]
  Factor height_factor, width_factor;                   // CP: [R, KH] and [R, KW], rows by taps (tap_stride[0], [1])
  Factor out_factor;                                    // [T, R2]
  const void* bias = nullptr;                           // [T], dense, or null
  Activation activation = Activation::kNone;
};

// Families. simt: multiply-adds in the dtype (bf16 and fp16 with fp32 sums) on any architecture. sm80: tensor cores by
// mma.sync: bf16, fp16, and fp32 rounded to tf32. sm90a: Hopper's TMA and wgmma: bf16 and fp16 in channels_last, where
// sm90a_reason (plan/gpu/sm90a.h) has no objection.
cudaError_t launch_tucker_simt(const BlockParams& params, DType dtype, int config, cudaStream_t stream);
cudaError_t launch_cp_simt(const BlockParams& params, DType dtype, int config, cudaStream_t stream);
cudaError_t launch_linear_simt(const BlockParams& params, DType dtype, int config, cudaStream_t stream);
cudaError_t launch_tucker_sm80(const BlockParams& params, DType dtype, int config, cudaStream_t stream);
cudaError_t launch_cp_sm80(const BlockParams& params, DType dtype, int config, cudaStream_t stream);
cudaError_t launch_tucker_sm90a(const BlockParams& params, DType dtype, int config, cudaStream_t stream);
cudaError_t launch_cp_sm90a(const BlockParams& params, DType dtype, int config, cudaStream_t stream);
cudaError_t launch_linear_sm80(const BlockParams& params, DType dtype, int config, cudaStream_t stream);
cudaError_t launch_linear_sm90a(const BlockParams& params, DType dtype, int config, cudaStream_t stream);

}  // namespace lowrank_ops
