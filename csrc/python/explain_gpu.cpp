// The GPU planner's parts one by one, for tests and tools: the kernel table, one kernel's plan, how tiles lie.
#include <algorithm>

#include "ops/call.h"
#include "ops/policy.h"
#include "plan/gpu/cost.h"
#include "plan/gpu/planner.h"
#include "plan/gpu/sm90a.h"
#include "python/explain.h"

namespace lowrank_ops {
namespace {

const GpuCaps& gpu_named(const char* caller, const std::string& name) {
  const GpuCaps* caps = find_gpu(name);
  std::string known;
  for (const GpuCaps& gpu : named_gpus()) known += (known.empty() ? "" : ", ") + gpu.name;
  TORCH_CHECK_VALUE(caps, caller, ": gpu must be one of ", known, ", got '", name, "'");
  return *caps;
}

const GpuKernel& kernel_named(const char* caller, const std::string& name) {
  const int index = gpu_kernel_index(name);
  std::string known;
  for (const GpuKernel& kernel : gpu_kernels()) known += (known.empty() ? "" : ", ") + std::string(kernel.name);
  TORCH_CHECK_VALUE(index >= 0, caller, ": kernel must be one of ", known, ", got '", name, "'");
  return gpu_kernels()[size_t(index)];
}

// A cut as numbers: images, height and width of a tile, then in some functions stages, splits and CTAs of a cluster.
template <size_t count>
void check_cut(const char* caller, const std::array<int, count>& cut) {
  TORCH_CHECK_VALUE(*std::min_element(cut.begin(), cut.end()) >= 1, caller,
                    ": each number of the cut must be at least 1, got ", c10::ArrayRef<int>(cut));
}

void check_op(const char* caller, const GpuKernel& kernel, const Problem& p) {
  TORCH_CHECK_VALUE(kernel.op == p.op, caller, ": the kernel must be one of ", name_of(p.op), ", got ", kernel.name);
}

// Geometry counts in 32 bits.
void check_sizes(const char* caller, const Problem& p) {
  const std::string reason = size_reason(p);
  TORCH_CHECK_VALUE(reason.empty(), caller, ": ", reason);
}

py::list kernel_table() {
  py::list table;
  for (const GpuKernel& kernel : gpu_kernels()) {
    py::dict line;
    line["name"] = kernel.name;
    line["op"] = name_of(kernel.op);
    line["family"] = name_of(kernel.family);
    line["config"] = kernel.config;
    line["pixels"] = kernel.shape.pixels();
    line["columns"] = kernel.shape.columns();
    line["threads"] = threads_of(kernel);
    line["first_architecture"] = kernel.first_architecture;
    line["verified_on"] = kernel.verified_on;
    line["measured_on"] = kernel.measured_on;
    table.append(line);
  }
  return table;
}

py::list gpu_list() {
  py::list gpus;
  for (const GpuCaps& caps : named_gpus()) {
    py::dict gpu;
    gpu["name"] = caps.name;
    gpu["architecture"] = caps.architecture;
    gpu["multiprocessors"] = caps.multiprocessors;
    gpu["shared_bytes_cta"] = caps.shared_bytes_cta;
    gpu["shared_bytes_multiprocessor"] = caps.shared_bytes_multiprocessor;
    gpu["l2_bytes"] = caps.l2_bytes;
    gpu["memory_bytes_per_second"] = caps.memory_bytes_per_second;
    gpu["fp32_flops"] = caps.fp32_flops;
    gpu["fp16_flops"] = caps.fp16_flops;
    gpu["library_fp16_flops"] = caps.library_fp16_flops;
    gpu["clock"] = clock_of(caps);
    gpus.append(gpu);
  }
  return gpus;
}

// A problem as Python describes it, in one argument: (op, dtype, channels_last, sizes, window, tf32).
using Described = std::tuple<std::string, std::string, bool, std::array<int64_t, 9>, std::array<int64_t, 6>, bool>;
Problem problem_of(const Described& described) {
  const auto& [op, dtype, channels_last, sizes, window, tf32] = described;
  Problem p =
      described_problem({.op = op, .dtype = dtype, .channels_last = channels_last, .sizes = sizes, .window = window});
  p.tf32 = tf32;
  return p;
}

// One kernel's plan for a named GPU, or {"reason": why not}; `built_for` and `built_ptx` as in GpuCaps, `architecture`
// (0: its own) for GPUs that are not in the list.
py::dict plan_gpu_kernel(const Described& described, const std::string& kernel, const std::string& gpu,
                         const std::vector<int>& built_for, int built_ptx, int architecture) {
  GpuCaps caps = gpu_named("plan_gpu_kernel", gpu);
  caps.built_for = built_for;
  caps.built_ptx = built_ptx;
  if (architecture) caps.architecture = architecture;
  const Problem p = problem_of(described);
  const GpuKernel& wanted = kernel_named("plan_gpu_kernel", kernel);
  check_op("plan_gpu_kernel", wanted, p);
  const GpuCandidate candidate = plan_kernel(p, wanted, caps);
  py::dict result = candidate.reason.empty() ? describe(candidate.plan, p.op) : py::dict();
  result["reason"] = candidate.reason;
  result["no_code"] = candidate.no_code;
  return result;
}

// The counts of the cost model for a kernel with a given cut (tile_n, tile_h, tile_w, stages, splits, cluster), and
// whether its lean variant runs. chain_gpu_features() has the counts for the chain.
std::pair<std::vector<double>, bool> fused_gpu_features(const Described& described, const std::string& kernel_name,
                                                        std::array<int, 6> cut, const std::string& gpu) {
  const Problem p = problem_of(described);
  const GpuKernel& kernel = kernel_named("fused_gpu_features", kernel_name);
  check_op("fused_gpu_features", kernel, p);
  check_sizes("fused_gpu_features", p);
  check_cut("fused_gpu_features", cut);
  const GpuCaps& caps = gpu_named("fused_gpu_features", gpu);
  const Geometry g = geometry_of(p, cut[0], cut[1], cut[2], cut[3], cut[4], cut[5]);
  const int most = sm90a_most_cluster(kernel, g.tiles(), caps);
  TORCH_CHECK_VALUE(g.cluster <= most, "fused_gpu_features: ", kernel.name, " forms clusters of at most ", most,
                    " CTAs here, got ", g.cluster);
  TORCH_CHECK_VALUE(g.splits == 1 || !kernel.shape.persistent, "fused_gpu_features: ", kernel.name,
                    " has no splits, got ", g.splits);
  const FusedFeatures found = fused_features(p, kernel, g, layout_of(p, kernel, g), caps);
  return {{found.begin(), found.end()}, is_lean(p, kernel)};
}

std::vector<double> chain_gpu_features(const Described& described, const std::string& gpu) {
  const ChainFeatures found = chain_features(problem_of(described), gpu_named("chain_gpu_features", gpu));
  return {found.begin(), found.end()};
}

// Where tiles of this size lie on an axis: the outputs of each tile, and the input coordinate of each halo position.
py::dict axis_tiles(const TileAxis& axis) {
  py::list outputs, inputs;
  for (int tile = 0; tile < axis.tiles(); ++tile) {
    py::list tile_outputs, tile_inputs;
    for (int position = 0; position < axis.tile; ++position) tile_outputs.append(axis.output(tile, position));
    for (int position = 0; position < axis.halo(); ++position) tile_inputs.append(axis.input(tile, position));
    outputs.append(tile_outputs);
    inputs.append(tile_inputs);
  }
  py::dict result;
  result["outputs"] = outputs;
  result["inputs"] = inputs;
  result["stride"] = axis.stride;
  result["kernel"] = axis.kernel;
  return result;
}

py::tuple gpu_tiles(const Described& described, std::array<int, 3> tile) {
  const Problem p = problem_of(described);
  check_sizes("gpu_tiles", p);
  check_cut("gpu_tiles", tile);
  const Geometry g = geometry_of(p, tile[0], tile[1], tile[2], 2, 1);
  return py::make_tuple(axis_tiles(g.rows), axis_tiles(g.columns), g.tiles());
}

// The plan of plan_gpu behind its cache, and how many plans were searched for so far.
py::tuple cached_gpu_plan(const Described& described, const std::string& gpu, int device, bool prepared) {
  Problem p = problem_of(described);
  p.prepared = prepared;
  const auto decision = cached_plan_gpu(p, gpu_named("cached_gpu_plan", gpu), device, policy());
  return py::make_tuple(describe(decision->chosen, p.op), gpu_plans_made());
}

}  // namespace

void bind_gpu_planning(py::module_& m) {
  m.def("gpu_kernels", &kernel_table);
  m.def("named_gpus", &gpu_list);
  m.def("plan_gpu_kernel", &plan_gpu_kernel, py::arg("problem"), py::arg("kernel"), py::arg("gpu"),
        py::arg("built_for") = std::vector<int>(), py::arg("built_ptx") = 0, py::arg("architecture") = 0);
  m.def("gpu_tiles", &gpu_tiles);
  m.def("fused_gpu_features", &fused_gpu_features);
  m.def("chain_gpu_features", &chain_gpu_features);
  m.attr("library_call_seconds") = kLibraryCall;
  m.attr("factor_product_seconds") = kFactorProduct;
  m.def("merges_depthwise", [](const Described& described) { return merges_depthwise(problem_of(described)); });
  m.def("cached_gpu_plan", &cached_gpu_plan, py::arg("problem"), py::arg("gpu"), py::arg("device"),
        py::arg("prepared") = false);
  m.def("force_gpu_kernel", [](const std::string& name) {
    if (!name.empty()) kernel_named("force_gpu_kernel", name);
    force_gpu_kernel(name);
  });
  m.def("forced_gpu_kernel", &forced_gpu_kernel);
  m.def("refuse_gpu_kernel", [](int device, const std::string& kernel, const std::string& reason) {
    kernel_named("refuse_gpu_kernel", kernel);
    refuse_gpu_kernel(device, gpu_kernel_index(kernel), reason);
  });
  // The choice of "measure" among candidates whose times are given: name and seconds each.
  m.def("measured_choice", [](const std::string& key, const std::vector<std::pair<std::string, double>>& times) {
    std::vector<Candidate> candidates;
    for (const auto& [name, seconds] : times) candidates.push_back({name, [seconds = seconds] { return seconds; }});
    return measured_choice(key, candidates);
  });
}

}  // namespace lowrank_ops
