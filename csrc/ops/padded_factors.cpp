#include "ops/padded_factors.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <memory>
#include <utility>
#include <vector>

#include "ops/chain.h"
#include "ops/checks.h"
#include "ops/factor_record.h"
#include "plan/integers.h"
#include "plan/plan.h"

namespace lowrank_ops {
namespace {

using at::Tensor;

constexpr int64_t kAlignment = 128;  // bytes: a line of L2; TMA needs 16

struct Record {
  at::ScalarType dtype = at::kFloat;
  std::array<FactorRecord, 5> factors;  // those that the op does not have are zero

  bool operator==(const Record&) const = default;
};

// What the address of the tensor's memory is kept with.
struct Context {
  Tensor memory;
  PaddedFactors factors;
  Record record;
};
void release(void* context) {
  delete static_cast<Context*>(context);
}

// The factors of a call, each in the place where every op has it.
std::array<Argument, 5> arguments_of(const OpCall& call) {
  return {Argument{"in_factor", call.in_factor}, Argument{"core", call.core},
          Argument{"height_factor", call.height_factor}, Argument{"width_factor", call.width_factor},
          Argument{"out_factor", call.out_factor}};
}

Record record_of(const OpCall& call) {
  Record record;
  record.dtype = call.in_factor.scalar_type();
  const auto factors = arguments_of(call);
  for (size_t i = 0; i < factors.size(); ++i)
    if (factors[i].tensor.defined()) record.factors[i] = factor_record(factors[i].tensor);
  return record;
}

bool have_versions(at::ArrayRef<Tensor> factors) {
  return std::none_of(factors.begin(), factors.end(), [](const Tensor& factor) { return factor.is_inference(); });
}

// Raises unless these are factors of a valid call.
void check_factors(const OpCall& call) {
  check(call);
  for (const auto& [name, factor] : arguments_of(call)) {
    if (!factor.defined()) continue;
    TORCH_CHECK_VALUE(factor.layout() == at::kStrided, name_of(call.op), ": ", name,
                      " must be a dense tensor to be prepared, got ", factor.layout());
    TORCH_CHECK_VALUE(!factor.is_inference(), name_of(call.op), ": ", name,
                      " must be no inference tensor to be prepared, whose changes cannot be noticed; create it outside "
                      "inference_mode");
  }
}

// A contiguous copy with zeros behind the tensor's own values on each axis.
Tensor padded(const Tensor& tensor, at::IntArrayRef shape) {
  Tensor copy = at::zeros(shape, tensor.options());
  Tensor values = copy;
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) values = values.narrow(axis, 0, tensor.size(axis));
  values.copy_(tensor);
  return copy;
}

// Moves these contiguous tensors into one piece of memory, and returns its bytes.
Tensor join(const std::vector<Tensor*>& parts) {
  const auto bytes = [](const Tensor& part) { return round_up(int64_t(part.nbytes()), kAlignment); };
  int64_t end = 0;
  for (const Tensor* part : parts) end += bytes(*part);
  const Tensor memory = at::empty({end}, parts[0]->options().dtype(at::kByte));
  int64_t begin = 0;
  for (Tensor* part : parts) {
    Tensor place = memory.narrow(0, begin, int64_t(part->nbytes())).view(part->scalar_type()).view(part->sizes());
    place.copy_(*part);
    begin += bytes(*part);
    *part = std::move(place);
  }
  return memory;
}

// The copies of a call's factors, and the memory that they lie in.
std::unique_ptr<Context> copy_factors(const OpCall& call) {
  auto context = std::make_unique<Context>();
  PaddedFactors& copies = context->factors;
  const int64_t element = call.in_factor.element_size();
  const int64_t r1 = padded_rank(call.in_factor.size(0), element), r2 = padded_rank(call.out_factor.size(1), element);
  std::vector<Tensor*> parts;
  const auto add = [&](Tensor& copy, const Tensor& tensor, at::IntArrayRef shape) {
    copy = padded(tensor, shape);
    parts.push_back(&copy);
  };
  add(copies.in_factor, call.in_factor, {r1, call.in_factor.size(1)});
  if (call.op == Op::kTucker)
    add(copies.core, call.core.permute({0, 2, 3, 1}), {r2, call.core.size(2), call.core.size(3), r1});
  if (call.op == Op::kCP) {
    add(copies.height_factor, call.height_factor, {r1, call.height_factor.size(1)});
    add(copies.width_factor, call.width_factor, {r1, call.width_factor.size(1)});
    copies.taps = depthwise_taps(call.height_factor, call.width_factor);
    parts.push_back(&copies.taps);
  }
  add(copies.out_factor, call.out_factor, {call.out_factor.size(0), r2});
  context->memory = join(parts);
  if (call.op == Op::kTucker) copies.core = copies.core.permute({0, 3, 1, 2});
  return context;
}

}  // namespace

Tensor pad_factors(const OpCall& call) {
  const c10::AutoGradMode no_gradients(false);
  check_factors(call);
  std::unique_ptr<Context> context = copy_factors(call);
  context->record = record_of(call);
  const Tensor& memory = context->memory;
  void* const address = memory.data_ptr();
  const auto options = memory.options();
  const int64_t bytes = memory.numel();
  return at::for_blob(address, bytes)
      .context(context.release(), &release)
      .options(options)
      .target_device(options.device())
      .make_tensor();
}

const PaddedFactors* padded_factors_for(const Tensor& packed, const OpCall& call) {
  if (!packed.has_storage() || !have_versions(call.factors())) return nullptr;
  const Context* context = packed.storage().data_ptr().cast_context<Context>(&release);
  return context && context->record == record_of(call) ? &context->factors : nullptr;
}

OpCall with_factors(const OpCall& call, const PaddedFactors& factors) {
  return {.op = call.op,
          .input = call.input,
          .in_factor = factors.in_factor,
          .core = factors.core,
          .height_factor = factors.height_factor,
          .width_factor = factors.width_factor,
          .out_factor = factors.out_factor,
          .bias = call.bias,
          .window = call.window,
          .activation = call.activation};
}

}  // namespace lowrank_ops
