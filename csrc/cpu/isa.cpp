#include "cpu/isa.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <vector>

#include "cpu/brgemm.h"

namespace lowrank_ops {
namespace {

// An instruction set's kernels, and whether oneDNN's GEMM takes their place.
struct InstructionSet {
  std::string isa;
  const KernelTable* table;
  bool brgemm_bfloat16 = false, brgemm_float = false;
};

// Those that this CPU can run, from the plainest to the best.
std::vector<InstructionSet> available() {
  std::vector<InstructionSet> found = {{"generic", &kernels_generic()}};
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx2) found.push_back({"avx2", &kernels_avx2()});
  if (avx512) found.push_back({"avx512", &kernels_avx512()});
  if (avx512 && __builtin_cpu_supports("avx512bf16")) {
    found.push_back({"avx512bf16", &kernels_avx512bf16()});
    if (has_amx_brgemm()) found.push_back({"amx", &kernels_avx512bf16(), /*brgemm_bfloat16=*/true});
  }
#endif
  return found;
}

InstructionSet named(const std::string& isa) {
  const std::vector<InstructionSet> found = available();
  if (isa.empty()) return found.back();
  if (isa == "brgemm") {
    InstructionSet best = found.back();
    TORCH_CHECK_VALUE(best.table->compute_float->lanes == 16, "set_cpu_isa: brgemm needs a CPU with AVX-512");
    best.isa = "brgemm";
    best.brgemm_float = true;
    return best;
  }
  std::string known;
  for (const InstructionSet& one : found) {
    if (one.isa == isa) return one;
    known += (known.empty() ? "" : ", ") + one.isa;
  }
  TORCH_CHECK_VALUE(false, "lowrank_ops: the CPU instruction set must be one of ", known,
                    " on this machine (LOWRANK_OPS_CPU_ISA or set_cpu_isa), got '", isa, "'");
}

std::string environment(const char* name, const char* otherwise) {
  const char* wanted = std::getenv(name);
  return wanted ? wanted : otherwise;
}

// The one that the environment names, or the widest that runs here.
InstructionSet from_environment() {
  return named(environment("LOWRANK_OPS_CPU_ISA", ""));
}
InstructionSet& current() {
  static InstructionSet instance = from_environment();
  return instance;
}

struct WinogradSetting {
  bool automatic;
  Winograd winograd;
};

WinogradSetting parse_winograd(const std::string& setting) {
  if (setting == "auto") return {true, Winograd::kNone};
  std::string known = "auto";
  for (const Winograd winograd : {Winograd::kNone, Winograd::k2x2, Winograd::k4x4, Winograd::kLine}) {
    if (setting == patch_of(winograd).name) return {false, winograd};
    known += std::string(", ") + patch_of(winograd).name;
  }
  TORCH_CHECK_VALUE(false, "lowrank_ops: Winograd must be one of ", known,
                    " (LOWRANK_OPS_CPU_WINOGRAD or set_cpu_winograd), got '", setting, "'");
}

WinogradSetting& current_winograd() {
  static WinogradSetting setting = parse_winograd(environment("LOWRANK_OPS_CPU_WINOGRAD", "auto"));
  return setting;
}

Teams parse_teams(const std::string& setting) {
  if (setting == "auto") return Teams::kAuto;
  if (setting == "always") return Teams::kAlways;
  if (setting == "never") return Teams::kNever;
  TORCH_CHECK_VALUE(false, "lowrank_ops: teams must be one of auto, always, never (LOWRANK_OPS_CPU_TEAMS or ",
                    "set_cpu_teams), got '", setting, "'");
}

Teams& current_teams() {
  static Teams setting = parse_teams(environment("LOWRANK_OPS_CPU_TEAMS", "auto"));
  return setting;
}

std::string cpu_name() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);)
    if (const size_t colon = line.find(": "); line.rfind("model name", 0) == 0 && colon != std::string::npos)
      return line.substr(colon + 2);
  return "unknown CPU";
}

int64_t cache_bytes(int level, int64_t unknown) {
#if defined(_SC_LEVEL2_CACHE_SIZE) && defined(_SC_LEVEL3_CACHE_SIZE)
  const long bytes = sysconf(level == 2 ? _SC_LEVEL2_CACHE_SIZE : _SC_LEVEL3_CACHE_SIZE);
  if (bytes > 0) return int64_t(bytes);
#endif
  return unknown;
}

void gemm_brgemm_bfloat16(const GemmCall& call) {
  brgemm_call<at::BFloat16>(call, current().table->compute_float->finish);
}
void gemm_brgemm_float(const GemmCall& call) {
  brgemm_call<float>(call, current().table->compute_float->finish);
}

}  // namespace

KernelSet kernel_set_for(DType dtype) {
  const InstructionSet& isa = current();
  const KernelTable& table = *isa.table;
  const ComputeKernels* sums = dtype == DType::kDouble ? table.compute_double : table.compute_float;
  if (dtype == DType::kBFloat16 && isa.brgemm_bfloat16) return {table.compute_bfloat16, &gemm_brgemm_bfloat16, sums};
  if (dtype == DType::kBFloat16 && table.compute_bfloat16->gemm)
    return {table.compute_bfloat16, table.compute_bfloat16->gemm, sums};
  if (dtype != DType::kDouble && isa.brgemm_float) return {sums, &gemm_brgemm_float, sums};
  return {sums, sums->gemm, sums};
}

CpuCaps cpu_caps() {
  static const std::string name = cpu_name();
  static const int64_t l2 = cache_bytes(2, 1 << 20), l3 = cache_bytes(3, 0);
  const InstructionSet& isa = current();
  CpuCaps caps;
  caps.isa = isa.isa;
  caps.name = name;
  caps.l2_bytes = l2;
  caps.l3_bytes = l3;
  caps.threads = at::get_num_threads();
  caps.amx = isa.brgemm_bfloat16;
  caps.bfloat16_dot = isa.brgemm_bfloat16 || isa.table->compute_bfloat16->gemm != nullptr;
  caps.winograd_auto = current_winograd().automatic;
  caps.winograd = current_winograd().winograd;
  caps.teams = current_teams();
  return caps;
}

void set_cpu_winograd(const std::string& setting) {
  current_winograd() = parse_winograd(setting);
}

void set_cpu_teams(const std::string& setting) {
  current_teams() = parse_teams(setting);
}

void set_cpu_isa(const std::string& isa) {
  current() = isa.empty() ? from_environment() : named(isa);
}

}  // namespace lowrank_ops
