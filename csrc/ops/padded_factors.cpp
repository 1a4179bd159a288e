#include "ops/padded_factors.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <c10/util/accumulate.h>

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

// Values to be copied, and the shape that zeros behind them make on each axis.
struct Part {
  Tensor* copy;
  Tensor values;
  std::vector<int64_t> shape;

  int64_t bytes() const { return c10::multiply_integers(shape) * values.element_size(); }
};

// Makes the copy of each part, all in one piece of memory, whose bytes it returns.
Tensor copy_parts(const std::vector<Part>& parts) {
  int64_t end = 0;
  for (const Part& part : parts) end += round_up(part.bytes(), kAlignment);
  const Tensor memory = at::zeros({end}, parts[0].values.options().dtype(at::kByte));
  int64_t begin = 0;
  for (const Part& part : parts) {
    *part.copy = memory.narrow(0, begin, part.bytes()).view(part.values.scalar_type()).view(part.shape);
    Tensor place = *part.copy;
    for (int64_t axis = 0; axis < place.dim(); ++axis) place = place.narrow(axis, 0, part.values.size(axis));
    place.copy_(part.values);
    begin += round_up(part.bytes(), kAlignment);
  }
  return memory;
}

// The copies of a call's factors, and the memory that they lie in.
std::unique_ptr<Context> copy_factors(const OpCall& call) {
  auto context = std::make_unique<Context>();
  PaddedFactors& copies = context->factors;
  const int64_t element = call.in_factor.element_size();
  const int64_t r1 = padded_rank(call.in_factor.size(0), element), r2 = padded_rank(call.out_factor.size(1), element);
  std::vector<Part> parts{{&copies.in_factor, call.in_factor, {r1, call.in_factor.size(1)}}};
  if (call.op == Op::kTucker)
    parts.push_back({&copies.core, call.core.permute({0, 2, 3, 1}), {r2, call.core.size(2), call.core.size(3), r1}});
  if (call.op == Op::kCP) {
    parts.push_back({&copies.height_factor, call.height_factor, {r1, call.height_factor.size(1)}});
    parts.push_back({&copies.width_factor, call.width_factor, {r1, call.width_factor.size(1)}});
    const Tensor taps = depthwise_taps(call.height_factor, call.width_factor);
    parts.push_back({&copies.taps, taps, taps.sizes().vec()});
  }
  parts.push_back({&copies.out_factor, call.out_factor, {call.out_factor.size(0), r2}});
  context->memory = copy_parts(parts);
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

}  // namespace lowrank_ops
