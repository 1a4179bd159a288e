// How the persistent CTAs of the sm90a kernels walk over tiles and over the slots of a ring.
#pragma once

#include "cuda/kernels/hopper.cuh"
#include "plan/gpu/geometry.h"

namespace lowrank_ops::hopper {

// The first output pixel of a tile, and its image.
struct TilePlace {
  int x, y, n;
};

// Tiles of the output, those of an image line by line.
struct Tiles {
  Divider across, of_image;  // tiles of a line, of an image
  int count, height, width;  // of all images; pixels of a tile

  LOWRANK_OPS_HOPPER TilePlace place(int tile) const {
    const int n = of_image.quotient(tile), rest = tile - n * of_image.divisor, row = across.quotient(rest);
    return {(rest - row * across.divisor) * width, row * height, n};
  }
};
inline Tiles tiles_of(const Geometry& g) {
  return {Divider(g.columns.tiles()), Divider(g.columns.tiles() * g.rows.tiles()), int(g.tiles()), g.rows.tile,
          g.columns.tile};
}

// A slot, and the parity of its use: 0 on the first way around the ring, 1 on the second, and so on.
struct RingPlace {
  int slot = 0;
  uint32_t parity = 0;

  LOWRANK_OPS_HOPPER void next(int slots) {
    if (++slot == slots) slot = 0, parity ^= 1;
  }
};

}  // namespace lowrank_ops::hopper
