// The ops as plain functions of the Python module `_C`: straight to the dispatcher. `torch.ops` parses its arguments
// against the schema: on one pixel a CP call takes 9.4 us there and 4.7 here with pairs, 5.1 and 2.7 with ints for the
// window (Zen 4). Tracers (torch.compile, torch.jit.trace, __torch_function__) have to see torch.ops:
// lowrank_ops/ops/extension.py chooses.
#include "python/bind_ops.h"

#include <torch/extension.h>

#include <array>
#include <tuple>
#include <type_traits>
#include <vector>

#include "ops/backward.h"
#include "ops/chain.h"
#include "ops/checks.h"
#include "ops/dispatch.h"
#include "ops/padded_factors.h"

namespace lowrank_ops {

// The numbers of a window: an int for both axes, or a sequence of ints (checks.h checks its length).
struct HeightWidth {
  c10::SmallVector<int64_t, 2> values;
  operator at::IntArrayRef() const { return values; }
};

}  // namespace lowrank_ops

namespace pybind11::detail {

template <>
struct type_caster<lowrank_ops::HeightWidth> {
  PYBIND11_TYPE_CASTER(lowrank_ops::HeightWidth, const_name("int | tuple[int, int]"));

  bool load(handle source, bool) {
    int64_t both = 0;
    if (as_int(source, both)) {
      value.values = {both, both};
      return true;
    }
    if (!PySequence_Check(source.ptr()) || PyUnicode_Check(source.ptr())) return false;
    const Py_ssize_t length = PySequence_Size(source.ptr());
    bool whole = length >= 0;
    for (Py_ssize_t i = 0; whole && i < length; ++i) {
      const object item = reinterpret_steal<object>(PySequence_GetItem(source.ptr(), i));
      value.values.push_back(0);
      whole = item && as_int(item, value.values.back());
    }
    if (!whole) PyErr_Clear();
    return whole;
  }

 private:
  static bool as_int(handle source, int64_t& number) {
    if (!PyIndex_Check(source.ptr())) return false;
    number = PyNumber_AsSsize_t(source.ptr(), PyExc_OverflowError);
    if (number != -1 || !PyErr_Occurred()) return true;
    PyErr_Clear();
    return false;
  }
};

}  // namespace pybind11::detail

namespace lowrank_ops {
namespace {

template <typename T>
using FromPython = std::conditional_t<std::is_same_v<T, at::IntArrayRef>, const HeightWidth&, T>;

// The kind of value that an argument of the schema requires, in words; empty where `value` is of that kind.
std::string requirement(const c10::Argument& argument, py::handle value) {
  const c10::TypePtr& type = argument.type();
  if (type->kind() == c10::TypeKind::TensorType) return THPVariable_Check(value.ptr()) ? "" : "a torch.Tensor";
  if (type->kind() == c10::TypeKind::OptionalType)
    return value.is_none() || THPVariable_Check(value.ptr()) ? "" : "a torch.Tensor or None";
  if (type->kind() == c10::TypeKind::StringType) return PyUnicode_Check(value.ptr()) ? "" : "a str";
  return py::detail::make_caster<HeightWidth>().load(value, false) ? "" : "an int or a pair of ints";
}

// Raises the TypeError for a call whose arguments are of other kinds than the schema's.
[[noreturn]] void refuse(const std::string& op, const c10::FunctionSchema& schema, const py::args& values) {
  const auto& arguments = schema.arguments();
  for (size_t i = 0; i < std::min(arguments.size(), values.size()); ++i) {
    const std::string required = requirement(arguments[i], values[i]);
    if (required.empty()) continue;
    const auto type = py::str(py::type::handle_of(values[i]).attr("__name__")).cast<std::string>();
    const bool is_short =
        values[i].is_none() || py::isinstance<py::str>(values[i]) || py::isinstance<py::float_>(values[i]);
    throw py::type_error(op + ": " + arguments[i].name() + " must be " + required + ", got " +
                         (is_short ? py::repr(values[i]).cast<std::string>() : type));
  }
  throw py::type_error(op + ": takes " + std::to_string(arguments.size()) + " arguments, got " +
                       std::to_string(values.size()));
}

template <typename Handle, typename... Arguments>
void bind_op(py::module_& m, const char* name, const Handle& handle, at::Tensor (*)(Arguments...)) {
  m.def(name, torch::wrap_pybind_function_no_gil(
                  [handle](FromPython<Arguments>... arguments) { return handle().call(arguments...); }));
  // Tried where the arguments do not fit the first: pybind11's own message would print whole tensors.
  m.def(name, [handle, op = std::string(name)](const py::args& values) -> at::Tensor {
    refuse(op, handle().schema(), values);
  });
}

// The two functions that GPUs run for CP instead of the chain and of its gradients, on any device: for tests.
template <typename Forward = CPOp::Forward>
struct MergedCP;
template <typename... Arguments>
struct MergedCP<at::Tensor(Arguments...)> {
  static at::Tensor chain(FromPython<Arguments>... arguments) {
    const OpCall call = call_of(arguments...);
    check(call);
    return merged_cp_chain(call);
  }
  static Gradients<CPOp::gradients> backward(const at::Tensor& grad_output, FromPython<Arguments>... arguments,
                                             const std::array<bool, CPOp::gradients>& output_mask) {
    return BackwardKernel<merged_cp_backward, CPOp>::call(grad_output, arguments..., output_mask);
  }
};

// The factors of an op in this order: in_factor, Tucker's core, CP's height_factor and width_factor, out_factor.
using FromTuple = std::tuple<at::Tensor, OptionalTensor, OptionalTensor, OptionalTensor, at::Tensor>;

// `run`, a function of an OpCall, with a call of these factors for no images.
template <typename Run>
auto with_factors_alone(const FromTuple& given, const Run& run) {
  const auto& [in_factor, core, height_factor, width_factor, out_factor] = given;
  const at::Tensor no;
  const Factors factors{in_factor, core.value_or(no), height_factor.value_or(no), width_factor.value_or(no),
                        out_factor};
  const OptionalTensor none;
  const Op op = core ? Op::kTucker : height_factor ? Op::kCP : Op::kLinear;
  std::vector<int64_t> sizes{0, in_factor.dim() == 2 ? in_factor.size(1) : 1};
  if (op != Op::kLinear) sizes.insert(sizes.end(), {1, 1});
  constexpr int64_t kMostTaps = 1 << 20;  // the padding, in which every window has room
  const std::array<int64_t, 2> one{1, 1}, padding{kMostTaps, kMostTaps};
  const at::Tensor input = at::empty(sizes, in_factor.options().layout(at::kStrided));
  return run(call_on(op, input, factors, none, {one, padding, one}, Activation::kNone));
}

// The copies that a call of these factors would use, by their names; None: it would use none. For tests.
py::object padded_factors(const at::Tensor& packed, const FromTuple& factors) {
  const PaddedFactors* const found =
      with_factors_alone(factors, [&](const OpCall& call) { return padded_factors_for(packed, call); });
  if (!found) return py::none();
  py::dict result;
  const auto add = [&](const char* name, const at::Tensor& tensor) {
    if (tensor.defined()) result[name] = tensor;
  };
  add("in_factor", found->in_factor);
  add("core", found->core);
  add("height_factor", found->height_factor);
  add("width_factor", found->width_factor);
  add("out_factor", found->out_factor);
  add("taps", found->taps);
  return result;
}

}  // namespace

void bind_ops(py::module_& m) {
  for_each_op([&m](auto op) {
    using O = decltype(op);
    using Forward = typename O::Forward;
    using Prepared = typename Signatures<Forward, O::gradients>::Prepared;
    bind_op(m, O::name, [] { return forward_op<O>(); }, static_cast<Forward*>(nullptr));
    bind_op(m, O::prepared_name, [] { return prepared_op<O>(); }, static_cast<Prepared*>(nullptr));
  });
  m.def("merged_cp_chain", &MergedCP<>::chain);
  m.def("merged_cp_backward", &MergedCP<>::backward);
  m.def("pad_factors", [](const FromTuple& factors) { return with_factors_alone(factors, pad_factors); });
  m.def("padded_factors", &padded_factors);
  m.def("activations", [] {
    std::vector<std::string> names;
    for (const NamedActivation& known : kActivations) names.emplace_back(known.name);
    return names;
  });
}

}  // namespace lowrank_ops
