// The Python module `_C`: the ops, and the other functions that the package and its tests call.
#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/prepared.h"
#include "cpu/team.h"
#include "ops/policy.h"
#include "python/bind_ops.h"
#include "python/explain.h"
#include "version.h"
#ifdef LOWRANK_OPS_WITH_CUDA
#include "cuda/bind_cuda.h"
#endif

namespace lowrank_ops {
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
    // If Team::run had a mistake here, the shares would outlive the variables that they use.
    while (running > 0) std::this_thread::yield();
  });
  return after;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("build_info", &build_info);
  bind_ops(m);
  m.def("set_policy", [](const std::string& name) { set_policy(parse_policy(name)); });
  m.def("get_policy", [] { return std::string(name_of(policy())); });
  m.def("forget_measurements", &forget_measurements);
  m.def("set_cpu_isa", [](const std::string& isa) {
    set_cpu_isa(isa);
    forget_measurements();  // they were made with other kernels
  });
  m.def("set_cpu_winograd", [](const std::string& choice) {
    set_cpu_winograd(choice);
    forget_measurements();  // they were made with another algorithm
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
