// The op schemas, the kernel of every device that has none of its own, and the Python module `_C`.
#include "ops/ops.h"

#include <ATen/Parallel.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>
#include <vector>

#include "python/bind_ops.h"
#include "ops/checks.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/prepared.h"
#include "cpu/team.h"
#ifdef LOWRANK_OPS_WITH_CUDA
#include "cuda/bind_cuda.h"
#endif
#include "python/explain.h"
#include "ops/policy.h"
#include "version.h"

namespace lowrank_ops {
using c10::IntArrayRef;
using c10::string_view;

at::Tensor tucker_by_chain(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& core,
                           const at::Tensor& out_factor, const OptionalTensor& bias, IntArrayRef stride,
                           IntArrayRef padding, IntArrayRef dilation, string_view activation) {
  const Window window{stride, padding, dilation};
  check_tucker(input, in_factor, core, out_factor, bias, window);
  return tucker_chain(input, in_factor, core, out_factor, bias, window, parse_activation("tucker_conv2d", activation));
}

at::Tensor cp_by_chain(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& height_factor,
                       const at::Tensor& width_factor, const at::Tensor& out_factor, const OptionalTensor& bias,
                       IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, string_view activation) {
  const Window window{stride, padding, dilation};
  check_cp(input, in_factor, height_factor, width_factor, out_factor, bias, window);
  return cp_chain(input, in_factor, height_factor, width_factor, out_factor, bias, window,
                  parse_activation("cp_conv2d", activation));
}

at::Tensor linear_by_chain(const at::Tensor& input, const at::Tensor& in_factor, const at::Tensor& out_factor,
                           const OptionalTensor& bias, string_view activation) {
  check_linear(input, in_factor, out_factor, bias);
  return linear_chain(input, in_factor, out_factor, bias, parse_activation("lowrank_linear", activation));
}

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = LOWRANK_OPS_VERSION;
  info["git_sha"] = LOWRANK_OPS_GIT_SHA;
  info["torch"] = LOWRANK_OPS_TORCH_VERSION;
  info["compiler"] = __VERSION__;
#ifdef LOWRANK_OPS_WITH_CUDA
  py::dict cuda;
  cuda["toolkit"] = LOWRANK_OPS_CUDA_TOOLKIT;
  cuda["architectures"] = std::vector<int>{LOWRANK_OPS_CUDA_ARCHITECTURES};
  cuda["ptx"] = LOWRANK_OPS_CUDA_PTX;  // 0: none
  info["cuda"] = cuda;
#else
  info["cuda"] = py::none();
#endif
#if defined(_OPENMP)
  info["parallel"] = "OpenMP";
#else
  info["parallel"] = "none";
#endif
  return info;
}

// How many threads at::parallel_for gives to `tasks` tasks in this extension.
int64_t parallel_threads(int64_t tasks) {
  std::atomic<int64_t> threads{0};
  at::parallel_for(0, tasks, 1, [&](int64_t, int64_t) { ++threads; });
  return threads;
}

// How many threads of a team of `threads` run shares of a stage at once: each share waits, for some seconds at most,
// until all have begun.
int64_t team_threads(int64_t threads) {
  using Clock = std::chrono::steady_clock;
  const auto patience = Clock::now() + std::chrono::seconds(10);
  std::atomic<int64_t> begun{0}, together{0};
  Team team(threads);
  team.call([&] {
    team.run([&](const Share&) {
      ++begun;
      while (begun < threads && Clock::now() < patience) std::this_thread::yield();
      together += begun == threads && Clock::now() < patience;
    });
  });
  return together;
}

// How many shares of a stage still run when the exception of the leader's share leaves Team::run: none may, because
// they use the stage. The other shares take some milliseconds longer than the leader's.
int64_t team_shares_after_error(int64_t threads) {
  using Clock = std::chrono::steady_clock;
  const auto patience = Clock::now() + std::chrono::seconds(10);
  std::atomic<int64_t> begun{0}, running{0};
  int64_t after = -1;
  Team team(threads);
  team.call([&] {
    const auto leader = std::this_thread::get_id();
    try {
      team.run([&](const Share&) {
        ++running;
        ++begun;
        while (begun < threads && Clock::now() < patience) std::this_thread::yield();
        if (std::this_thread::get_id() != leader) std::this_thread::sleep_for(std::chrono::milliseconds(20));
        --running;
        if (std::this_thread::get_id() == leader) throw std::runtime_error("the leader's share");
      });
    } catch (const std::runtime_error&) {
      after = running;
    }
    // Without this a mistake would let shares outlive what they use.
    while (running > 0) std::this_thread::yield();
  });
  return after;
}

}  // namespace

TORCH_LIBRARY(lowrank_ops, m) {
  m.def(
      "tucker_conv2d(Tensor input, Tensor in_factor, Tensor core, Tensor out_factor, Tensor? bias=None, "
      "int[2] stride=1, int[2] padding=0, int[2] dilation=1, str activation=\"none\") -> Tensor");
  m.def(
      "cp_conv2d(Tensor input, Tensor in_factor, Tensor height_factor, Tensor width_factor, Tensor out_factor, "
      "Tensor? bias=None, int[2] stride=1, int[2] padding=0, int[2] dilation=1, str activation=\"none\") -> Tensor");
  m.def(
      "lowrank_linear(Tensor input, Tensor in_factor, Tensor out_factor, Tensor? bias=None, "
      "str activation=\"none\") -> Tensor");
  // The same with weights packed before (cpu/prepared.h). Where `packed` does not fit the factors, the device, autocast
  // or gradients, these are the ops above.
  m.def(
      "tucker_conv2d_prepared(Tensor input, Tensor in_factor, Tensor core, Tensor out_factor, Tensor? bias, "
      "int[2] stride, int[2] padding, int[2] dilation, str activation, Tensor packed) -> Tensor");
  m.def(
      "cp_conv2d_prepared(Tensor input, Tensor in_factor, Tensor height_factor, Tensor width_factor, "
      "Tensor out_factor, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, str activation, "
      "Tensor packed) -> Tensor");
  m.def(
      "lowrank_linear_prepared(Tensor input, Tensor in_factor, Tensor out_factor, Tensor? bias, str activation, "
      "Tensor packed) -> Tensor");
  // Gradients in the order of the arguments, undefined (None) where output_mask is false; see backward.h.
  m.def(
      "tucker_conv2d_backward(Tensor grad_output, Tensor input, Tensor in_factor, Tensor core, Tensor out_factor, "
      "Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, str activation, bool[5] output_mask) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cp_conv2d_backward(Tensor grad_output, Tensor input, Tensor in_factor, Tensor height_factor, "
      "Tensor width_factor, Tensor out_factor, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, "
      "str activation, bool[6] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "lowrank_linear_backward(Tensor grad_output, Tensor input, Tensor in_factor, Tensor out_factor, Tensor? bias, "
      "str activation, bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(lowrank_ops, CompositeExplicitAutograd, m) {
  m.impl("tucker_conv2d", &tucker_by_chain);
  m.impl("cp_conv2d", &cp_by_chain);
  m.impl("lowrank_linear", &linear_by_chain);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("build_info", &build_info);
  bind_ops(m);
  m.def("set_policy", [](const std::string& name) { set_policy(parse_policy(name)); });
  m.def("get_policy", [] { return std::string(name_of(policy())); });
  m.def("forget_measurements", &forget_measurements);
  m.def("set_cpu_isa", [](const std::string& isa) {
    set_cpu_isa(isa);
    forget_measurements();  // of other kernels
  });
  m.def("set_cpu_winograd", [](const std::string& choice) {
    set_cpu_winograd(choice);
    forget_measurements();  // of another algorithm
  });
  m.def("set_cpu_teams", &set_cpu_teams);
  bind_explain(m);
#ifdef LOWRANK_OPS_WITH_CUDA
  bind_cuda(m);
#endif
  m.def("parallel_threads", &parallel_threads);
  m.def("team_threads", &team_threads);
  m.def("team_shares_after_error", &team_shares_after_error);
  m.def("cpu_plans_made", &cpu_plans_made);
  m.def("kept_memory", &kept_memory);
  m.def("release_memory", &release_memory, py::call_guard<py::gil_scoped_release>());
  m.def("cpu_isa", [] { return cpu_caps().isa; });
  m.def("prepare", &prepare);
}

}  // namespace lowrank_ops
