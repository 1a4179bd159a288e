// The ops as plain functions of the Python module `_C`: straight to the dispatcher. `torch.ops` parses its arguments
// against the schema: on one pixel a CP call takes 9.4 us there and 4.7 here with pairs, 5.1 and 2.7 with ints for the
// window (Zen 4). What traces calls (torch.compile, torch.jit.trace, __torch_function__) has to see torch.ops:
// lowrank_ops/_ops.py chooses.
#include "bind_ops.h"

#include <torch/extension.h>

#include <type_traits>

#include "dispatch.h"

namespace lowrank_ops {

// A window's numbers: an int for both axes, or a sequence of them (its length is checked with the other arguments).
struct Pair {
  c10::SmallVector<int64_t, 2> values;
  operator at::IntArrayRef() const { return values; }
};

}  // namespace lowrank_ops

namespace pybind11::detail {

template <>
struct type_caster<lowrank_ops::Pair> {
  PYBIND11_TYPE_CASTER(lowrank_ops::Pair, const_name("int | tuple[int, int]"));

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
using FromPython = std::conditional_t<std::is_same_v<T, at::IntArrayRef>, const Pair&, T>;

template <typename Handle, typename... Arguments>
void bind_op(py::module_& m, const char* name, const Handle& handle, at::Tensor (*)(Arguments...)) {
  m.def(name, torch::wrap_pybind_function_no_gil(
                  [handle](FromPython<Arguments>... arguments) { return handle().call(arguments...); }));
}

}  // namespace

void bind_ops(py::module_& m) {
#define LOWRANK_OPS_BIND(name, Signature) \
  bind_op(m, #name, [] { return name##_op(); }, static_cast<Signature*>(nullptr))
  LOWRANK_OPS_BIND(tucker_conv2d, TuckerForward);
  LOWRANK_OPS_BIND(cp_conv2d, CPForward);
  LOWRANK_OPS_BIND(lowrank_linear, LinearForward);
  LOWRANK_OPS_BIND(tucker_conv2d_prepared, TuckerPrepared);
  LOWRANK_OPS_BIND(cp_conv2d_prepared, CPPrepared);
  LOWRANK_OPS_BIND(lowrank_linear_prepared, LinearPrepared);
#undef LOWRANK_OPS_BIND
}

}  // namespace lowrank_ops
