// The GPUs that plans can be made for without having one. The figures are from NVIDIA's data sheets and architecture
// whitepapers (A100, GA102, Ada, H100, H200, B200): rates without sparsity at boost clock, fp32 accumulation.
#include <algorithm>
#include <cctype>

#include "plan/gpu/planner.h"

namespace lowrank_ops {
namespace {

constexpr int64_t kKiB = 1024, kMiB = 1024 * kKiB;

// The rate of mma.sync on Hopper, as a share of the data sheet's rate, which is that of wgmma. Measured on an H200: an
// m16n8k16 takes 1.50 clocks of a multiprocessor, where wgmma takes 1.00 for as much (benchmarks/gpu/hopper,
// h200_hopper.jsonl).
constexpr double kHopperMmaSync = 0.66;

// Operations per multiprocessor and clock.
struct Rates {
  int architecture;
  double fp32, fp64, tf32, fp16;      // FMA units; tensor cores through mma.sync
  double library_tf32, library_fp16;  // tensor cores at their best
};
// Consumer chips of Ampere and Ada run products with fp32 accumulation at half rate. Blackwell's data-center chips have
// mma.sync for compatibility only: its rate here is Ampere's, an estimate that no data sheet gives.
constexpr Rates kRates[] = {
    {75, 128, 4, 0, 512, 0, 512},
    {80, 128, 64, 1024, 2048, 1024, 2048},
    {86, 256, 4, 256, 512, 256, 512},
    {89, 256, 4, 256, 512, 256, 512},
    {90, 256, 128, 2048 * kHopperMmaSync, 4096 * kHopperMmaSync, 2048, 4096},
    {100, 256, 128, 1024, 2048, 4096, 8192},
    {120, 256, 4, 256, 512, 256, 512},
};

GpuCaps gpu(const char* name, int architecture, int multiprocessors, int64_t shared_kib, double l2_mib,
            double gigabytes, double fp32, double fp64, double library_tf32, double library_fp16, double tf32,
            double fp16) {
  GpuCaps caps;
  caps.name = name;
  caps.architecture = architecture;
  caps.multiprocessors = multiprocessors;
  caps.shared_bytes_cta = (shared_kib - 1) * kKiB;  // the system keeps 1 KiB per CTA
  caps.shared_bytes_multiprocessor = shared_kib * kKiB;
  caps.l2_bytes = int64_t(l2_mib * kMiB);
  caps.memory_bytes_per_second = gigabytes * 1e9;
  caps.fp32_flops = fp32 * 1e12;
  caps.fp64_flops = fp64 * 1e12;
  caps.library_tf32_flops = library_tf32 * 1e12;
  caps.library_fp16_flops = library_fp16 * 1e12;
  caps.tf32_flops = tf32 * 1e12;
  caps.fp16_flops = fp16 * 1e12;
  return caps;
}

std::string plain(const std::string& name) {
  std::string result;
  for (const unsigned char letter : name)
    if (std::isalnum(letter)) result += char(std::toupper(letter));
  return result;
}

}  // namespace

const std::vector<GpuCaps>& named_gpus() {
  constexpr double kHopper = kHopperMmaSync;
  // name, architecture, SMs, shared KiB per SM, L2 MiB, GB/s; TFLOP/s: fp32, fp64, tensor cores tf32, fp16, mma.sync
  // tf32, fp16
  static const std::vector<GpuCaps> gpus = {
      gpu("A100", 80, 108, 164, 40, 2039, 19.5, 9.7, 156, 312, 156, 312),  // SXM, 80 GB
      gpu("RTX 3090", 86, 82, 100, 6, 936, 35.6, 0.556, 35.6, 71.2, 35.6, 71.2),
      gpu("RTX 4090", 89, 128, 100, 72, 1008, 82.6, 1.29, 82.6, 165.2, 82.6, 165.2),
      gpu("H100", 90, 132, 228, 50, 3350, 66.9, 33.5, 494.7, 989.4, 494.7 * kHopper, 989.4 * kHopper),  // SXM
      gpu("H200", 90, 132, 228, 50, 4800, 66.9, 33.5, 494.7, 989.4, 494.7 * kHopper, 989.4 * kHopper),
      gpu("B200", 100, 148, 228, 126, 7700, 75, 37, 1100, 2200, 280, 560),  // mma.sync: an estimate, see kRates
  };
  return gpus;
}

const GpuCaps* find_gpu(const std::string& name) {
  for (const GpuCaps& caps : named_gpus())
    if (plain(caps.name) == plain(name)) return &caps;
  return nullptr;
}

void fill_rates(GpuCaps& caps, double clock) {
  // A driver may not report these (virtual GPUs). Figures of a middling GPU prevent a division by zero.
  constexpr double kUnknownClock = 1.5e9, kUnknownBandwidth = 1e12;
  if (clock <= 0) clock = kUnknownClock;
  if (caps.memory_bytes_per_second <= 0) caps.memory_bytes_per_second = kUnknownBandwidth;
  for (const GpuCaps& known : named_gpus()) {
    if (plain(caps.name).find(plain(known.name)) == std::string::npos ||
        caps.multiprocessors !=
            known.multiprocessors)  // another board of the same name has another number of multiprocessors
      continue;
    caps.memory_bytes_per_second = known.memory_bytes_per_second;
    caps.fp32_flops = known.fp32_flops;
    caps.fp64_flops = known.fp64_flops;
    caps.tf32_flops = known.tf32_flops;
    caps.fp16_flops = known.fp16_flops;
    caps.library_tf32_flops = known.library_tf32_flops;
    caps.library_fp16_flops = known.library_fp16_flops;
    return;
  }
  const Rates* rates = &kRates[0];  // of the newest listed architecture that is not newer than this one
  for (const Rates& known : kRates)
    if (known.architecture <= caps.architecture) rates = &known;
  const double clocks = clock * caps.multiprocessors;
  caps.fp32_flops = rates->fp32 * clocks;
  caps.fp64_flops = rates->fp64 * clocks;
  caps.tf32_flops = rates->tf32 * clocks;
  caps.fp16_flops = rates->fp16 * clocks;
  caps.library_tf32_flops = rates->library_tf32 * clocks;
  caps.library_fp16_flops = rates->library_fp16 * clocks;
}

}  // namespace lowrank_ops
