// Tucker's block (block.cuh) with small factors, in the common case: CTAs keep all factors in shared memory and take
// tile after tile.
//
// A launch has as many CTAs as the GPU holds at a time; a CTA takes the tiles block_index(), block_index() +
// block_count(), ... Only the input goes through the ring. Stages 2 and 3 wait for no copies and have no barriers
// between chunks. While stage 3 of a tile multiplies and writes the output, the first chunks of the next tile's input
// are copied:
//
//   factors  copied once
//   input    tile 0 ....... | first chunks of tile 1                          | rest of tile 1 .... | ...
//   stages   (1) of tile 0  | tables, (2) of tile 0 | (3) of tile 0, output   | (1) of tile 1       | ...
//
// The tables: pixel tables are those of the present tile, the halo table is that of the tile whose input is copied.
// Both are written behind stage 1, before the barrier in front of stage 2, which reads a pixel table. By then all
// threads have left stage 3 of the tile before, and the copies of stage 1, which read the halo table, have all been
// started.
#pragma once

#include "cuda/kernels/block.cuh"

namespace lowrank_ops {

template <typename Kernel>
class PersistentBlock : Block<Kernel> {
  using Base = Block<Kernel>;
  using Base::params, Base::l, Base::stream, Base::ring, Base::ring_end, Base::slot;
  using typename Base::Address, typename Base::Tile;
  static_assert(Kernel::op == Op::kTucker, "CP and linear layers have no such kernel");

 public:
  LOWRANK_OPS_DEVICE explicit PersistentBlock(const KernelParams& params) : Base(params) {}

  LOWRANK_OPS_DEVICE void run() {
    int index = int(block_index());
    Tile tile = Base::locate(index);
    Base::write_halo_table(tile);
    barrier<Barrier::kTables>();
    stream.load_factors();
    begin_input(tile);
    for (;;) {
      Base::in_stage();
      index += block_count();
      const bool more = index < params.tiles;
      const Tile next = more ? Base::locate(index) : tile;
      Base::write_pixel_tables(tile);
      if (more) Base::write_halo_table(next);
      barrier<Barrier::kHiddenWritten>();
      Base::core_stage();
      barrier<Barrier::kSecondWritten>();
      if (more) begin_input(next);
      Base::out_stage(tile);
      if (!more) return;
      tile = next;
    }
  }

 private:
  // Starts the first copies of a tile's input. All slots are free.
  LOWRANK_OPS_DEVICE void begin_input(const Tile& tile) {
    stream.begin(Base::input_of(tile));
    slot = ring_end - l.slot;
    for (Address first = ring; first != slot; first += l.slot) stream.template start<1>(first);
  }
};

}  // namespace lowrank_ops
