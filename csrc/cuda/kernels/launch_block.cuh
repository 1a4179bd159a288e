// The kernels of the simt and sm80 families, and how a call's parameters become theirs.
#pragma once

#include "cuda/kernels/block_persistent.cuh"

namespace lowrank_ops {

// CTAs per multiprocessor that the compiler has to fit into the registers. Kernels of the simt family hold widened
// elements beside the sums; in fp64, bf16 and fp16 these take the registers of a third CTA.
template <typename Kernel, Family family>
constexpr int resident_ctas() {
  // The lean kernel's shared memory is small enough for three CTAs where elements have 2 bytes.
  const int ctas = Kernel::config.resident(Kernel::lean && Kernel::element == 2);
  return family == Family::kSimt && Kernel::element != 4 ? least(ctas, 2) : ctas;
}

template <Op op, typename Engine, Family family, int index, bool lean>
LOWRANK_OPS_KERNEL((Instance<op, Engine, family, index, lean>::threads),
                   (resident_ctas<Instance<op, Engine, family, index, lean>, family>()))
block_kernel(const KernelParams params) {
  using Kernel = Instance<op, Engine, family, index, lean>;
  if constexpr (Kernel::persistent)
    PersistentBlock<Kernel>(params).run();
  else
    Block<Kernel>(params).run();
}

inline KernelParams kernel_params(const BlockParams& block, const Config& config) {
  const Geometry& g = block.geometry;
  KernelParams params{};
  params.block = block;
  params.splits = Divider(g.splits);
  params.row_tiles = Divider(g.rows.tiles());
  params.column_tiles = Divider(g.columns.tiles());
  params.row_lattice = Divider(g.rows.lattice);
  params.column_lattice = Divider(g.columns.lattice);
  params.halo_h = Divider(g.rows.halo());
  params.halo_w = Divider(g.columns.halo());
  params.tile_h = Divider(g.rows.tile);
  params.tile_w = Divider(g.columns.tile);
  const int passes = int(ceil_div(g.t, config.columns()));
  params.split_passes = passes / g.splits;
  params.longer_splits = passes % g.splits;
  params.tiles = int(g.tiles());
  return params;
}

// Launches the lean kernel. A persistent one gets the CTAs that the GPU holds at a time.
template <Op op, typename Engine, Family family, int index>
cudaError_t launch_lean(const BlockParams& block, cudaStream_t stream) {
  using Kernel = Instance<op, Engine, family, index, true>;
  constexpr Config config = Kernel::config;
  const auto kernel = block_kernel<op, Engine, family, index, true>;
  const Geometry& g = block.geometry;
  KernelParams params = kernel_params(block, config);
  params.layout = shared_layout(g, config, Kernel::element, Kernel::has_core, /*lean=*/true);
  params.lean = lean_params(block, params.layout, config, Kernel::has_core, Kernel::element);
  int64_t ctas = g.ctas();
  if constexpr (config.persistent) {
    static std::atomic<uint64_t> last{0};
    int held = 0;
    const cudaError_t error = held_ctas(kernel, config.threads(), params.layout.bytes, last, held);
    if (error != cudaSuccess) return error;
    ctas = least(params.tiles, g.most_ctas > 0 ? least(g.most_ctas, held) : held);
  }
  return launch(kernel, ctas, config.threads(), params.layout.bytes, stream, params);
}

template <Op op, typename Engine, Family family, int index>
cudaError_t launch_block(const BlockParams& block, cudaStream_t stream) {
  using Kernel = Instance<op, Engine, family, index, false>;
  constexpr Config config = Kernel::config;
  const bool common = is_common_case(block, Kernel::has_core, Kernel::element);
  if constexpr (config.persistent) {
    if (common && block.geometry.splits == 1) return launch_lean<op, Engine, family, index>(block, stream);
    return launch_block<op, Engine, family, config.one_tile>(block, stream);
  } else {
    if constexpr (family == Family::kSm80)
      if (common) return launch_lean<op, Engine, family, index>(block, stream);
    KernelParams params = kernel_params(block, config);
    params.layout = shared_layout(block.geometry, config, Kernel::element, Kernel::has_core);
    return launch(block_kernel<op, Engine, family, index, false>, block.geometry.ctas(), config.threads(),
                  params.layout.bytes, stream, params);
  }
}

}  // namespace lowrank_ops
