#include "plan/gpu/reasons.h"

#include <climits>
#include <cstdio>

#include "plan/counts.h"
#include "plan/gpu/sm90a.h"

namespace lowrank_ops {
namespace {

constexpr int kSimtDoubleConfig = 1;  // the only one whose fp64 sums fit into the registers

std::string whole_number(double value) {  // also of values that 64 bits do not hold
  char digits[64];
  std::snprintf(digits, sizeof digits, value < 1e18 ? "%.0f" : "%.3g", value);
  return digits;
}

}  // namespace

std::string dtype_reason(const Problem& p, const GpuKernel& kernel) {
  if (is_simt(kernel)) {
    if (p.dtype == DType::kDouble && kernel.config != kSimtDoubleConfig)
      return "float64 runs in the configuration of 64 pixels alone";
    return "";
  }
  if (p.dtype == DType::kDouble) return "tensor cores here take bfloat16, float16 and float32 as tf32, got float64";
  if (p.dtype == DType::kFloat && !p.tf32)
    return p.op == Op::kLinear ? "float32 is to keep its precision; tf32 is allowed by "
                                 "torch.backends.cuda.matmul.fp32_precision = \"tf32\""
                               : "float32 is to keep its precision; tf32 is allowed by "
                                 "torch.backends.cudnn.conv.fp32_precision = \"tf32\"";
  return "";
}

std::string persistent_reason(const Problem& p, const GpuKernel& kernel) {
  if (!kernel.shape.persistent || is_lean(p, kernel)) return "";
  return "takes copies of 16 bytes alone: input and output in channels_last, channels and ranks in multiples of " +
         std::to_string(kVectorBytes / element_bytes(p.dtype));
}

std::string architecture_reason(const GpuKernel& kernel, const GpuCaps& caps) {
  if (is_sm90a(kernel)) {  // every build has its code, for sm_90 alone
    if (caps.architecture != kernel.first_architecture)
      return "its instructions exist on sm_90 alone, this GPU is sm_" + std::to_string(caps.architecture);
    return caps.tensor_maps ? "" : "this driver has no cuTensorMapEncodeTiled: install one of CUDA 12.0 or newer";
  }
  if (caps.architecture < kernel.first_architecture)
    return std::string("runs from sm_") + std::to_string(kernel.first_architecture) + " on, this GPU is sm_" +
           std::to_string(caps.architecture);
  return "";
}

std::string code_reason(const GpuKernel& kernel, const GpuCaps& caps) {
  if (is_sm90a(kernel) || (caps.built_for.empty() && caps.built_ptx == 0)) return "";
  // Machine code of an architecture runs on later ones of the same generation, PTX on all later architectures.
  bool runs = caps.built_ptx > 0 && caps.built_ptx <= caps.architecture;
  std::string built;
  for (const int architecture : caps.built_for) {
    runs = runs || (architecture / 10 == caps.architecture / 10 && architecture <= caps.architecture);
    built += (built.empty() ? "sm_" : ", sm_") + std::to_string(architecture);
  }
  if (runs) return "";
  if (caps.built_ptx > 0)
    built += (built.empty() ? "PTX of compute_" : ", PTX of compute_") + std::to_string(caps.built_ptx);
  return "built for " + built + ", this GPU is sm_" + std::to_string(caps.architecture) +
         ": set TORCH_CUDA_ARCH_LIST and reinstall, or policy 'chain'";
}

std::string size_reason(const Problem& p) {
  constexpr int64_t kLargest = INT_MAX, kMargin = 1024;  // a tile may reach beyond the last output
  const auto above = [&](const char* what, double value, double limit) {
    return value <= limit
               ? std::string()
               : std::string(what) + " must be at most " + whole_number(limit) + ", got " + whole_number(value);
  };
  if (p.n == 0 || p.s == 0 || p.t == 0 || p.oh == 0 || p.ow == 0 || p.r1 == 0 || p.r2 == 0)
    return "there is nothing to compute";
  std::string reason = above("images (rows of a linear layer)", double(p.n), kLargest - kMargin);
  for (const int64_t channels : {p.s, p.t, p.r1, p.r2})
    if (reason.empty()) reason = above("channels and ranks", double(channels), kLargest / 16);
  if (reason.empty()) reason = above("KH * KW * R1", double(p.kh) * p.kw * p.r1, kLargest);
  const int64_t out[] = {p.oh, p.ow}, in[] = {p.h, p.w}, kernel[] = {p.kh, p.kw};
  for (int axis = 0; axis < 2 && reason.empty(); ++axis) {
    const double beyond = double(kMargin) * p.dilation[axis];
    reason =
        above("coordinates", (out[axis] + beyond) * p.stride[axis] + double(kernel[axis]) * p.dilation[axis], kLargest);
    if (reason.empty()) reason = above("coordinates", double(in[axis]) + p.padding[axis], kLargest);
  }
  return reason;
}

}  // namespace lowrank_ops
