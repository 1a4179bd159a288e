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

struct Choice {
  std::string isa;
  const KernelTable* table;
  bool brgemm_bfloat16 = false, brgemm_float = false;
};

// From the plainest to the best; those that this CPU can run.
std::vector<Choice> choices() {
  std::vector<Choice> found = {{"generic", &kernels_generic()}};
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

Choice choose(const std::string& isa) {
  const std::vector<Choice> found = choices();
  if (isa.empty()) return found.back();
  if (isa == "brgemm") {
    Choice choice = found.back();
    TORCH_CHECK_VALUE(choice.table->compute_float->lanes == 16, "set_cpu_isa: brgemm needs a CPU with AVX-512");
    choice.isa = "brgemm";
    choice.brgemm_float = true;
    return choice;
  }
  std::string known;
  for (const Choice& choice : found) {
    if (choice.isa == isa) return choice;
    known += (known.empty() ? "" : ", ") + choice.isa;
  }
  TORCH_CHECK_VALUE(false, "lowrank_ops: the CPU instruction set must be one of ", known,
                    " on this machine (LOWRANK_OPS_CPU_ISA or set_cpu_isa), got '", isa, "'");
}

std::string environment(const char* name, const char* otherwise) {
  const char* wanted = std::getenv(name);
  return wanted ? wanted : otherwise;
}

// What the environment asks for, or "": the widest that runs here.
Choice from_environment() {
  return choose(environment("LOWRANK_OPS_CPU_ISA", ""));
}
Choice& current() {
  static Choice choice = from_environment();
  return choice;
}

struct WinogradChoice {
  bool automatic;
  Winograd winograd;
};

WinogradChoice parse_winograd(const std::string& choice) {
  if (choice == "auto") return {true, Winograd::kNone};
  std::string known = "auto";
  for (const Winograd winograd : {Winograd::kNone, Winograd::k2x2, Winograd::k4x4, Winograd::kLine}) {
    if (choice == patch_of(winograd).name) return {false, winograd};
    known += std::string(", ") + patch_of(winograd).name;
  }
  TORCH_CHECK_VALUE(false, "lowrank_ops: Winograd must be one of ", known,
                    " (LOWRANK_OPS_CPU_WINOGRAD or set_cpu_winograd), got '", choice, "'");
}

WinogradChoice& current_winograd() {
  static WinogradChoice choice = parse_winograd(environment("LOWRANK_OPS_CPU_WINOGRAD", "auto"));
  return choice;
}

Teams parse_teams(const std::string& choice) {
  if (choice == "auto") return Teams::kAuto;
  if (choice == "always") return Teams::kAlways;
  if (choice == "never") return Teams::kNever;
  TORCH_CHECK_VALUE(false, "lowrank_ops: teams must be one of auto, always, never (LOWRANK_OPS_CPU_TEAMS or ",
                    "set_cpu_teams), got '", choice, "'");
}

Teams& current_teams() {
  static Teams choice = parse_teams(environment("LOWRANK_OPS_CPU_TEAMS", "auto"));
  return choice;
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

Engine engine_for(DType dtype) {
  const Choice& choice = current();
  const KernelTable& table = *choice.table;
  const ComputeKernels* sums = dtype == DType::kDouble ? table.compute_double : table.compute_float;
  if (dtype == DType::kBFloat16 && choice.brgemm_bfloat16) return {table.compute_bfloat16, &gemm_brgemm_bfloat16, sums};
  if (dtype == DType::kBFloat16 && table.compute_bfloat16->gemm)
    return {table.compute_bfloat16, table.compute_bfloat16->gemm, sums};
  if (dtype != DType::kDouble && choice.brgemm_float) return {sums, &gemm_brgemm_float, sums};
  return {sums, sums->gemm, sums};
}

CpuCaps cpu_caps() {
  static const std::string name = cpu_name();
  static const int64_t l2 = cache_bytes(2, 1 << 20), l3 = cache_bytes(3, 0);
  const Choice& choice = current();
  CpuCaps caps;
  caps.isa = choice.isa;
  caps.name = name;
  caps.l2_bytes = l2;
  caps.l3_bytes = l3;
  caps.threads = at::get_num_threads();
  caps.amx = choice.brgemm_bfloat16;
  caps.bfloat16_dot = choice.brgemm_bfloat16 || choice.table->compute_bfloat16->gemm != nullptr;
  caps.winograd_auto = current_winograd().automatic;
  caps.winograd = current_winograd().winograd;
  caps.teams = current_teams();
  return caps;
}

void set_cpu_winograd(const std::string& choice) {
  current_winograd() = parse_winograd(choice);
}

void set_cpu_teams(const std::string& choice) {
  current_teams() = parse_teams(choice);
}

void set_cpu_isa(const std::string& isa) {
  current() = isa.empty() ? from_environment() : choose(isa);
}

}  // namespace lowrank_ops
