// How the persistent CTAs of the sm90a kernels walk over the tiles of the output and over the slots of a ring buffer.
#pragma once

#include "cuda/kernels/hopper.cuh"
#include "plan/geometry.h"

namespace lowrank_ops::hopper {

// The first output pixel of a tile, and its image.
struct TilePlace {
  int x, y, n;
};

// All tiles of the output, numbered image by image, and line by line within an image.
struct Tiles {
  Divider across, of_image;  // divide by the tiles per line, per image
  int count, height, width;  // tiles of all images; pixels per tile

  LOWRANK_OPS_HOPPER TilePlace place(int tile) const {
    const int n = of_image.quotient(tile), rest = tile - n * of_image.divisor, row = across.quotient(rest);
    return {(rest - row * across.divisor) * width, row * height, n};
  }
};
inline Tiles tiles_of(const Geometry& g) {
  return {Divider(g.columns.tiles()), Divider(g.columns.tiles() * g.rows.tiles()), int(g.tiles()), g.rows.tile,
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

}  // namespace lowrank_ops::hopper
