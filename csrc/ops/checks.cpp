#include "ops/checks.h"

#include "plan/cpu/planner.h"

namespace lowrank_ops {

bool is_supported(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

void check_dim(const char* op, const Argument& argument, int64_t dim, const char* shape) {
  TORCH_CHECK_VALUE(argument.tensor.dim() == dim, op, ": ", argument.name, " must be ", shape, ", got shape ",
                    argument.tensor.sizes());
}

void check_size(const char* op, const Argument& argument, int64_t axis, int64_t required, const char* why) {
  TORCH_CHECK_VALUE(size_of(argument.tensor, axis) == required, op, ": ", argument.name, " must have size ", required,
                    " on axis ", axis, " (", why, "), got shape ", argument.tensor.sizes());
}

void check_nonempty(const char* op, const Argument& argument) {
  for (const int64_t size : argument.tensor.sizes())
    TORCH_CHECK_VALUE(size > 0, op, ": ", argument.name,
                      " must have no axis of size 0 (ranks are at least 1), got shape ", argument.tensor.sizes());
}

void check_pairs(const char* op, const Window& window) {
  const auto check_pair = [op](const char* name, at::IntArrayRef values) {
    TORCH_CHECK_VALUE(values.size() == 2, op, ": ", name, " must have 2 entries (height, width), got ", values);
    for (const int64_t value : values)  // larger ones would overflow in the products below
      TORCH_CHECK_VALUE(value <= INT32_MAX, op, ": ", name, " must be at most ", INT32_MAX, ", got ", values);
  };
  check_pair("stride", window.stride);
  check_pair("padding", window.padding);
  check_pair("dilation", window.dilation);
}

namespace {

// Same floating dtype and device for every tensor of the call.
void check_kind(const char* op, const at::Tensor& input, std::initializer_list<Argument> factors,
                const OptionalTensor& bias) {
  TORCH_CHECK_TYPE(is_supported(input.scalar_type()), op, ": input must be float32, float64, bfloat16 or float16, got ",
                   input.scalar_type());
  const auto check = [&](const char* name, const at::Tensor& tensor) {
    TORCH_CHECK_TYPE(tensor.scalar_type() == input.scalar_type(), op, ": ", name, " must have the input's dtype ",
                     input.scalar_type(), ", got ", tensor.scalar_type(),
                     "; convert the module or the input with .to(dtype), or run under torch.autocast");
    TORCH_CHECK_VALUE(tensor.device() == input.device(), op, ": ", name, " must be on the input's device ",
                      input.device(), ", got ", tensor.device());
  };
  for (const Argument& factor : factors) {
    check(factor.name, factor.tensor);
    check_nonempty(op, factor);
  }
  if (bias) check("bias", *bias);
}

void check_bias(const char* op, const OptionalTensor& bias, int64_t t) {
  TORCH_CHECK_VALUE(!bias || (bias->dim() == 1 && size_of(*bias, 0) == t), op, ": bias must be [T] = [", t,
                    "] (the rows of out_factor) or None, got shape ", bias->sizes());
}

// KH and KW.
std::array<int64_t, 2> kernel_of(const OpCall& call) {
  if (call.op == Op::kTucker) return {size_of(call.core, 2), size_of(call.core, 3)};
  return {size_of(call.height_factor, 1), size_of(call.width_factor, 1)};
}

void check_window(const char* op, const OpCall& call) {
  const Window& window = call.window;
  check_pairs(op, window);
  const char* axis_name[2] = {"height", "width"};
  const std::array<int64_t, 2> kernel = kernel_of(call);
  for (size_t axis = 0; axis < 2; ++axis) {
    TORCH_CHECK_VALUE(window.stride[axis] >= 1, op, ": stride must be at least 1 on each axis, got ", window.stride);
    TORCH_CHECK_VALUE(window.padding[axis] >= 0, op, ": padding must be at least 0 on each axis, got ", window.padding);
    TORCH_CHECK_VALUE(window.dilation[axis] >= 1, op, ": dilation must be at least 1 on each axis, got ",
                      window.dilation);
    const int64_t padded = size_of(call.input, int64_t(2 + axis)) + 2 * window.padding[axis];
    const int64_t reach = window.dilation[axis] * (kernel[axis] - 1) + 1;
    TORCH_CHECK_VALUE(padded >= reach, op, ": the output would be empty: the kernel reaches over ", reach,
                      " pixels along the ", axis_name[axis], ", the padded input has ", padded,
                      "; enlarge the padding or the input");
  }
}

void check_tucker(const char* op, const OpCall& call) {
  const Argument in_factor{"in_factor", call.in_factor}, core{"core", call.core};
  const Argument out_factor{"out_factor", call.out_factor};
  check_dim(op, {"input", call.input}, 4, "[N, S, H, W]");
  check_dim(op, in_factor, 2, "[R1, S]");
  check_dim(op, core, 4, "[R2, R1, KH, KW]");
  check_dim(op, out_factor, 2, "[T, R2]");
  check_kind(op, call.input, {in_factor, core, out_factor}, call.bias);
  check_size(op, in_factor, 1, size_of(call.input, 1), "S, the channels of input");
  check_size(op, core, 1, size_of(call.in_factor, 0), "R1, the rows of in_factor");
  check_size(op, out_factor, 1, size_of(call.core, 0), "R2, the first axis of core");
  check_bias(op, call.bias, size_of(call.out_factor, 0));
  check_window(op, call);
}

void check_cp(const char* op, const OpCall& call) {
  const Argument in_factor{"in_factor", call.in_factor}, height_factor{"height_factor", call.height_factor};
  const Argument width_factor{"width_factor", call.width_factor}, out_factor{"out_factor", call.out_factor};
  check_dim(op, {"input", call.input}, 4, "[N, S, H, W]");
  check_dim(op, in_factor, 2, "[R, S]");
  check_dim(op, height_factor, 2, "[R, KH]");
  check_dim(op, width_factor, 2, "[R, KW]");
  check_dim(op, out_factor, 2, "[T, R]");
  check_kind(op, call.input, {in_factor, height_factor, width_factor, out_factor}, call.bias);
  check_size(op, in_factor, 1, size_of(call.input, 1), "S, the channels of input");
  check_size(op, height_factor, 0, size_of(call.in_factor, 0), "R, the rows of in_factor");
  check_size(op, width_factor, 0, size_of(call.in_factor, 0), "R, the rows of in_factor");
  check_size(op, out_factor, 1, size_of(call.in_factor, 0), "R, the rows of in_factor");
  check_bias(op, call.bias, size_of(call.out_factor, 0));
  check_window(op, call);
}

void check_linear(const char* op, const OpCall& call) {
  const Argument in_factor{"in_factor", call.in_factor}, out_factor{"out_factor", call.out_factor};
  TORCH_CHECK_VALUE(call.input.dim() >= 1, op, ": input must be [..., S], got a tensor of no axes");
  check_dim(op, in_factor, 2, "[R, S]");
  check_dim(op, out_factor, 2, "[T, R]");
  check_kind(op, call.input, {in_factor, out_factor}, call.bias);
  check_size(op, in_factor, 1, size_of(call.input, -1), "S, the last axis of input");
  check_size(op, out_factor, 1, size_of(call.in_factor, 0), "R, the rows of in_factor");
  check_bias(op, call.bias, size_of(call.out_factor, 0));
}

std::vector<int64_t> output_sizes(const OpCall& call) {
  std::vector<int64_t> sizes = call.input.sizes().vec();
  if (call.op == Op::kLinear) {
    sizes.back() = size_of(call.out_factor, 0);
    return sizes;
  }
  sizes[1] = size_of(call.out_factor, 0);
  const Window& window = call.window;
  const std::array<int64_t, 2> kernel = kernel_of(call);
  for (size_t axis = 0; axis < 2; ++axis)
    sizes[2 + axis] =
        output_size(sizes[2 + axis], kernel[axis], window.stride[axis], window.padding[axis], window.dilation[axis]);
  return sizes;
}

}  // namespace

void check(const OpCall& call) {
  const char* op = name_of(call.op);
  switch (call.op) {
    case Op::kTucker:
      return check_tucker(op, call);
    case Op::kCP:
      return check_cp(op, call);
    case Op::kLinear:
      return check_linear(op, call);
  }
}

void check_grad_output(const char* op, const at::Tensor& grad_output, const OpCall& call) {
  const at::Tensor& input = call.input;
  const std::vector<int64_t> required = output_sizes(call);
  TORCH_CHECK_VALUE(grad_output.sizes() == required, op, ": grad_output must have the output's shape ",
                    at::IntArrayRef(required), ", got ", grad_output.sizes());
  TORCH_CHECK_TYPE(grad_output.scalar_type() == input.scalar_type(), op, ": grad_output must have the input's dtype ",
                   input.scalar_type(), ", got ", grad_output.scalar_type());
  TORCH_CHECK_VALUE(grad_output.device() == input.device(), op, ": grad_output must be on the input's device ",
                    input.device(), ", got ", grad_output.device());
}

}  // namespace lowrank_ops
