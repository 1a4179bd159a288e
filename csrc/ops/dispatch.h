// The registered ops as typed functions of C++: `name_op().call(...)` goes through torch's dispatcher (gradients,
// autocast, fake tensors, the kernels of the input's device).
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include "ops/backward.h"
#include "ops/ops.h"

namespace lowrank_ops {

using TuckerForward = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                 const OptionalTensor&, at::IntArrayRef, at::IntArrayRef, at::IntArrayRef,
                                 std::string_view);
using CPForward = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                             const at::Tensor&, const OptionalTensor&, at::IntArrayRef, at::IntArrayRef,
                             at::IntArrayRef, std::string_view);
using LinearForward = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                                 std::string_view);
// The same with the packed weights behind.
template <typename Signature>
struct WithPacked;
template <typename... Arguments>
struct WithPacked<at::Tensor(Arguments...)> {
  using Type = at::Tensor(Arguments..., const at::Tensor&);
};
using TuckerPrepared = WithPacked<TuckerForward>::Type;
using CPPrepared = WithPacked<CPForward>::Type;
using LinearPrepared = WithPacked<LinearForward>::Type;
using TuckerBackward = decltype(tucker_conv2d_backward);
using CPBackward = decltype(cp_conv2d_backward);
using LinearBackward = decltype(lowrank_linear_backward);

// The registered op, looked up once.
#define LOWRANK_OPS_HANDLE(name, Signature)                                                           \
  inline const auto& name##_op() {                                                                    \
    static const auto op =                                                                            \
        c10::Dispatcher::singleton().findSchemaOrThrow("lowrank_ops::" #name, "").typed<Signature>(); \
    return op;                                                                                        \
  }
LOWRANK_OPS_HANDLE(tucker_conv2d, TuckerForward)
LOWRANK_OPS_HANDLE(cp_conv2d, CPForward)
LOWRANK_OPS_HANDLE(lowrank_linear, LinearForward)
LOWRANK_OPS_HANDLE(tucker_conv2d_prepared, TuckerPrepared)
LOWRANK_OPS_HANDLE(cp_conv2d_prepared, CPPrepared)
LOWRANK_OPS_HANDLE(lowrank_linear_prepared, LinearPrepared)
LOWRANK_OPS_HANDLE(tucker_conv2d_backward, TuckerBackward)
LOWRANK_OPS_HANDLE(cp_conv2d_backward, CPBackward)
LOWRANK_OPS_HANDLE(lowrank_linear_backward, LinearBackward)
#undef LOWRANK_OPS_HANDLE

}  // namespace lowrank_ops
