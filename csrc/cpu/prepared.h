// Weights packed once, by the user's explicit step `prepare_for_inference_`, instead of at every call.
//
// The panels of all factors of a block lie one behind the other in one uint8 tensor, behind a record of what they were
// made from: each factor's memory, version counter, sizes and strides, and the layout that the kernels want. A call
// whose factors and kernels are not those of the record packs anew, as any other call does. Changes that leave memory
// and version as they are (`.data` edits) do not show in the record: packing is the user's own step for that reason.
#pragma once

#include <algorithm>
#include <iterator>

#include "cpu/weights.h"
#include "ops/call.h"

namespace lowrank_ops {

// Panels packed before; nullptr: to be packed in the call.
struct Prepared {
  const char* in_factor = nullptr;
  const char* core = nullptr;    // Tucker
  const char* winograd[4] = {};  // Tucker, where that transform can be used (by Winograd)
  const char* out_factor = nullptr;

  // For a core whose axes are exchanged in the call.
  void forget_core() {
    core = nullptr;
    std::fill(std::begin(winograd), std::end(winograd), nullptr);
  }
  explicit operator bool() const { return in_factor != nullptr; }
};

// Packs the factors of a block; `core` [R2, R1, KH, KW] is a Tucker block's, `unit_window` says that stride and
// dilation are 1 along each axis with more than one tap, so that Winograd's transforms may run it too. Factors: on the
// CPU, of one dtype, no inference tensors (they have no version).
at::Tensor prepare(const at::Tensor& in_factor, const OptionalTensor& core, const at::Tensor& out_factor,
                   bool unit_window);

// The panels in `packed`, if they were packed from the factors of this call as they are now; otherwise none.
Prepared prepared_for(const at::Tensor& packed, const OpCall& call);

}  // namespace lowrank_ops
