#include "ops/call.h"

#include <c10/util/Exception.h>

#include <string>

namespace lowrank_ops {

const char* name_of(Activation activation) {
  for (const NamedActivation& known : kActivations)
    if (known.activation == activation) return known.name;
  return "";
}

Activation parse_activation(const char* op, std::string_view name) {
  std::string names;
  for (const NamedActivation& known : kActivations)
    if (name == known.name) return known.activation;
  for (const NamedActivation& known : kActivations) names += (names.empty() ? "" : ", ") + std::string(known.name);
  TORCH_CHECK_VALUE(false, op, ": activation must be one of ", names, ", got '", name, "'");
}

const at::Tensor& no_tensor() {
  static const at::Tensor none;
  return none;
}

c10::SmallVector<at::Tensor, 4> OpCall::factors() const {
  c10::SmallVector<at::Tensor, 4> found;
  for (const at::Tensor* factor : {&in_factor, &core, &height_factor, &width_factor, &out_factor})
    if (factor->defined()) found.push_back(*factor);
  return found;
}

}  // namespace lowrank_ops
