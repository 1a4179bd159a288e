// The copies of a persistent kernel (block_persistent.cuh): all factors once, then the input of tile after tile.
#pragma once

#include "cuda/kernels/stream_lean.cuh"

namespace lowrank_ops {

template <typename Kernel>
class PersistentStream : LeanCopies<Kernel> {
  using Copies = LeanCopies<Kernel>;
  using Copies::params, Copies::halo_pass, Copies::pass, Copies::byte;

 public:
  LOWRANK_OPS_DEVICE PersistentStream(const KernelParams& params, unsigned char* shared, int thread, Passes)
      : Copies(params, shared, thread) {}

  // Starts the copies of all factors. They belong to the group of the first chunk of the input.
  LOWRANK_OPS_DEVICE void load_factors() {
    load(params.lean.in_factor, params.layout.in_factor);
    load(params.lean.core, params.layout.core);
    load(params.lean.out_factor, params.layout.out_factor);
  }

  // `tile`: the address that the table's offsets count from.
  LOWRANK_OPS_DEVICE void begin(const unsigned char* tile) {
    constexpr int vectors = Copies::vectors;
    const int thread = Copies::thread;
    const int row = spread_rows(thread / vectors, Copies::log2(vectors));
    Copies::vector_byte = thread % vectors * kVectorBytes;
    Copies::place = row * Kernel::input_stride + Copies::vector_byte;
    Copies::input = tile + Copies::vector_byte;
    halo_pass = pass = byte = 0;
    Copies::begin_halo_pass();
  }

  // Starts the copies of the next chunk of the input into `slot` and closes their group, which is empty behind the
  // tile's last chunk.
  template <int stage>
  LOWRANK_OPS_DEVICE void start(SharedAddress slot) {
    static_assert(stage == 1, "only stage 1 reads the ring");
    if (halo_pass < params.layout.halo_passes) {
      Copies::copy_input(slot);
      next_chunk();
    }
    commit_copies();
  }

 private:
  // Moves on by one chunk: along the channels, then to the next pass of ranks, then to the next pass of the halo.
  LOWRANK_OPS_DEVICE void next_chunk() {
    byte += kInputChunkBytes;
    if (byte < params.lean.in_factor.row_bytes) return;
    byte = 0;
    if (++pass < params.layout.r1_passes) return;
    pass = 0;
    if (++halo_pass < params.layout.halo_passes) Copies::begin_halo_pass();
  }

  // The chunks of a factor lie in the order of their use.
  LOWRANK_OPS_DEVICE void load(const FactorStream& f, int offset) {
    SharedAddress to = shared_address(Copies::shared) + offset;
    Copies::begin_factor(f, 0);
#pragma unroll 1
    for (bool last = false; !last; to += Copies::columns * (f.chunk + kVectorBytes)) {
      Copies::copy_factor(to, f);
      last = Copies::next_chunk(f) && Copies::template next_row<true>(f);
    }
  }
};

}  // namespace lowrank_ops
