// How the persistent CTAs of the sm90a kernels walk over the tiles of the output and over the slots of a ring buffer.
#pragma once

#include "cuda/kernels/hopper.cuh"
#include "plan/geometry.h"

namespace lowrank_ops::hopper {

// The first output pixel of a tile, and its image.
struct TilePlace {
  int x, y, n;
};

// A tile's residue class of the output (plan/geometry.h), and its place among the outputs of this class.
struct ClassPlace {
  TilePlace at;
  int class_y, class_x;
  int residue;  // the class's number: class_y * classes of the width + class_x
};

// All tiles of the output, numbered image by image, and line by line within an image.
struct Tiles {
  Divider across, of_image;      // divide by the tiles per line, per image
  Divider classes_h, classes_w;  // divide by the residue classes of an axis
  int count, height, width;      // tiles of all images; pixels per tile

  int classes() const { return classes_h.divisor * classes_w.divisor; }

  // `one_class`: the call has one class.
  template <bool one_class>
  LOWRANK_OPS_HOPPER ClassPlace place(int tile) const {
    const int n = of_image.quotient(tile), rest = tile - n * of_image.divisor;
    const int row = across.quotient(rest), column = rest - row * across.divisor;
    if constexpr (one_class) return {{column * width, row * height, n}, 0, 0, 0};
    const int row_of_class = classes_h.quotient(row), column_of_class = classes_w.quotient(column);
    const int y = row - row_of_class * classes_h.divisor, x = column - column_of_class * classes_w.divisor;
    return {{column_of_class * width, row_of_class * height, n}, y, x, y * classes_w.divisor + x};
  }
};
inline Tiles tiles_of(const Geometry& g) {
  return {Divider(g.columns.tiles()),
          Divider(g.columns.tiles() * g.rows.tiles()),
          Divider(g.rows.lattice),
          Divider(g.columns.lattice),
          int(g.tiles()),
          g.rows.tile,
          g.columns.tile};
}

// A slot of the ring, and the parity of the present round: 0 in the first round, 1 in the second, and so on
// alternately.
struct RingPlace {
  int slot = 0;
  uint32_t parity = 0;

  LOWRANK_OPS_HOPPER void next(int slots) {
    if (++slot == slots) slot = 0, parity ^= 1;
  }
};

// A ring buffer: its slots in shared memory, and the addresses of their barriers.
struct Ring {
  uint32_t barriers, data;
  int slots, slot_bytes;

  LOWRANK_OPS_HOPPER uint32_t full(int slot) const { return barriers + slot * 16; }
  LOWRANK_OPS_HOPPER uint32_t empty(int slot) const { return barriers + slot * 16 + 8; }
  LOWRANK_OPS_HOPPER uint32_t at(int slot) const { return data + slot * slot_bytes; }

  // `readers`: warps that give slots back, of all CTAs of a cluster.
  LOWRANK_OPS_HOPPER void init(int readers) const {
    for (int slot = 0; slot < slots; ++slot) {
      barrier_init(full(slot), 1);
      barrier_init(empty(slot), readers);
    }
  }
};

// Waits until the slot is empty, and announces `bytes` bytes to its `full` barrier.
LOWRANK_OPS_HOPPER void open_slot(const Ring& ring, const RingPlace& place, int bytes) {
  wait_phase(ring.empty(place.slot), place.parity ^ 1);
  barrier_expect(ring.full(place.slot), uint32_t(bytes));
}

// Tells the CTAs of a cluster that a warp is done with a slot: one lane for each.
LOWRANK_OPS_HOPPER void release_to(int ctas, uint32_t empty, int lane) {
  if (lane < ctas) barrier_arrive(empty, lane);
}

// A warp's place in a ring that it reads. Slots are given back in the order in which they were waited for.
struct RingReader {
  Ring ring;
  RingPlace next, oldest;  // the next slot to wait for; the oldest that is not given back yet

  LOWRANK_OPS_HOPPER uint32_t wait() {
    const uint32_t at = ring.at(next.slot);
    wait_phase(ring.full(next.slot), next.parity);
    __syncwarp();
    next.next(ring.slots);
    return at;
  }
  LOWRANK_OPS_HOPPER void release(int lane) {
    if (lane == 0) barrier_arrive(ring.empty(oldest.slot));
    oldest.next(ring.slots);
  }
  // The same in a ring that the CTAs of a cluster fill together.
  LOWRANK_OPS_HOPPER void release(int lane, int ctas) {
    release_to(ctas, ring.empty(oldest.slot), lane);
    oldest.next(ring.slots);
  }
};

// ---- Clusters of CTAs, which work on neighbouring tiles and need the same parts of the factors at the same time. Each
// CTA loads its share of a part's rows into the shared memory of all. So a slot holds what all have loaded, and may be
// overwritten when the readers of all CTAs have given it back to all.

// A CTA's place in its cluster, of two CTAs. Without clusters: 0 of 1.
struct ClusterPlace {
  int rank, ctas;

  // The first row of this CTA's share.
  LOWRANK_OPS_HOPPER int first_of(int rows) const { return rank * (rows / 2); }
  // Loads a box of this CTA's share: `coordinates` are the share's. Its place in shared memory and `full` are those of
  // every CTA.
  template <typename... Coordinates>
  LOWRANK_OPS_HOPPER void load(uint32_t to, const CUtensorMap* map, uint32_t full, Coordinates... coordinates) const {
    if (ctas == 1)
      load_box(to, map, full, coordinates...);
    else
      multicast_box(to, map, full, uint16_t((1 << ctas) - 1), coordinates...);
  }
};

}  // namespace lowrank_ops::hopper
