// How a fused CUDA kernel cuts a block: what the planner chooses, the kernels obey and the tests check. Plain C++17,
// no CUDA headers: the planner includes it too.
//
// One CTA computes a tile of `tile_n` images x `tile_h` x `tile_w` output pixels. Along an axis with stride s and
// dilation d the tile's outputs are `lattice` = d / gcd(s, d) apart, so that every tap of every output falls on input
// positions `unit` = d apart, and a halo of `(tile - 1) * stride + kernel` positions, stride = s / gcd(s, d), holds all
// of them: a dilated convolution has the halo of an undilated one. There are `lattice` residue classes of outputs, each
// with tiles of its own.
#pragma once

#include <cstdint>

#include "plan/integers.h"

namespace lowrank_ops {

constexpr int kMaxStages = 4;         // slots of the ring buffer that chunks stream through
constexpr int kVectorBytes = 16;      // the widest access, and the padding of a row: rows an odd multiple of 16 bytes
                                      // apart put eight consecutive ones into different shared-memory banks
constexpr int kStepBytes = 32;        // a step of the inner product: 16 bf16, 8 tf32, 8 fp32, 4 fp64
constexpr int kInputChunkBytes = 64;  // of a pixel's input channels in a chunk of the first stage
constexpr int kMaxChunkBytes = 256;   // of a row in a chunk of the other stages
constexpr int kStagedColumns = 32;    // channels of the output that a warp stages at a time, as sums
constexpr int kStagedStride = 40;     // sums between two rows of them

// Division by a number that the host knows, for kernels: a multiplication and a shift. Exact for 0 <= n < 2^31: with
// 2^shift >= divisor, factor is by no more than one above 2^(31 + shift) / divisor.
struct Divider {
  uint32_t factor = 0;
  int shift = 0, divisor = 1;

  Divider() = default;
  explicit Divider(int by) : divisor(by) {
    while ((int64_t(1) << shift) < by) ++shift;
    factor = uint32_t((uint64_t(1) << (31 + shift)) / uint64_t(by) + 1);
  }
  LOWRANK_OPS_BOTH constexpr int quotient(int n) const {
    return int(uint32_t(uint64_t(2 * uint32_t(n)) * factor >> 32) >> shift);
  }
  LOWRANK_OPS_BOTH constexpr int remainder(int n) const { return n - quotient(n) * divisor; }
};

// What is fixed when a kernel is compiled. Warps form a grid of warps_m x warps_n; in the first stage a warp owns
// 16 * halo_tiles halo pixels, afterwards 16 * pixel_tiles output pixels, in all stages 8 * rank_tiles columns.
struct Config {
  int warps_m, warps_n, halo_tiles, pixel_tiles, rank_tiles;

  LOWRANK_OPS_BOTH constexpr int threads() const { return 32 * warps_m * warps_n; }
  // How many CTAs the registers of a multiprocessor shall hold: what the compiler is told. Of the lean kernel of 2-byte
  // elements one more where a thread has at most 96 sums.
  LOWRANK_OPS_BOTH constexpr int resident(bool lean_halves = false) const {
    if (threads() > 128) return 1;
    return rank_tiles > 4 && !(lean_halves && halo_tiles <= 3) ? 2 : 3;
  }
  LOWRANK_OPS_BOTH constexpr int halo_rows() const { return 16 * warps_m * halo_tiles; }  // of a pass of stage 1
  LOWRANK_OPS_BOTH constexpr int pixels() const { return 16 * warps_m * pixel_tiles; }    // a tile has at most these
  LOWRANK_OPS_BOTH constexpr int columns() const { return 8 * warps_n * rank_tiles; }     // of a pass of any stage
};

// The configurations of each family of kernels. The warp tile is 32 pixels x 64 or 32 columns.
constexpr Config kSm80Configs[] = {
    {4, 1, 3, 2, 4},  // 128 pixels, ranks up to 32 in one pass
    {4, 1, 3, 2, 8},  // 128 pixels, ranks up to 64
    {4, 2, 3, 2, 8},  // 128 pixels, ranks up to 128
    {2, 2, 4, 2, 8},  // 64 pixels, ranks up to 128: large hidden tiles
    {2, 2, 4, 2, 4},  // 64 pixels, ranks up to 64: small problems
};
constexpr Config kSimtConfigs[] = {
    {4, 1, 3, 2, 8},  // 128 pixels, ranks up to 64
    {2, 2, 4, 2, 4},  // 64 pixels: small problems, large hidden tiles; the one for fp64
};
// Pixels and columns alone; <op>_sm90a.h has what these kernels are really made of.
constexpr Config kSm90aConfigs[] = {
    {4, 1, 2, 1, 8},   // Tucker: 8x8 pixels
    {7, 1, 2, 1, 8},   // CP: 14x8 pixels
    {4, 1, 2, 1, 16},  // Tucker, ranks up to 128: 8x8 pixels
};
constexpr int kSm90aTuckerConfig = 0, kSm90aCpConfig = 1, kSm90aWideConfig = 2;
constexpr int kNumSm80Configs = sizeof(kSm80Configs) / sizeof(Config);
constexpr int kNumSimtConfigs = sizeof(kSimtConfigs) / sizeof(Config);
constexpr int kNumSm90aConfigs = sizeof(kSm90aConfigs) / sizeof(Config);

enum class Family { kSimt, kSm80, kSm90a };
// Linear layers have no halo: their first stage has as many rows as the others.
constexpr Config config_of(Family family, int index, bool has_halo) {
  Config config = family == Family::kSimt   ? kSimtConfigs[index]
                  : family == Family::kSm80 ? kSm80Configs[index]
                                            : kSm90aConfigs[index];
  if (!has_halo) config.halo_tiles = config.pixel_tiles;
  return config;
}

// One axis (height or width), in the terms of the comment above.
struct TileAxis {
  int in = 1, out = 1, kernel = 1, padding = 0;
  int lattice = 1, unit = 1, stride = 1;  // stride of the lattice
  int original_stride = 1;
  int tile = 1;  // outputs of a tile

  LOWRANK_OPS_BOTH constexpr int halo() const { return (tile - 1) * stride + kernel; }
  LOWRANK_OPS_BOTH constexpr int class_outputs() const { return int(ceil_div(out, lattice)); }
  LOWRANK_OPS_BOTH constexpr int tiles() const { return lattice * int(ceil_div(class_outputs(), tile)); }
  // Tile number `index` -> its first output, and an output of the tile -> the output of the axis. May lie outside.
  LOWRANK_OPS_BOTH constexpr int output(int index, int position) const {
    return index % lattice + (index / lattice * tile + position) * lattice;
  }
  // Tile number `index` -> the input coordinate of a halo position. May lie outside.
  LOWRANK_OPS_BOTH constexpr int input(int index, int position) const {
    return output(index, 0) * original_stride - padding + position * unit;
  }
};

// A problem cut into tiles.
struct Geometry {
  TileAxis rows, columns;  // height, width
  int n = 0, tile_n = 1;   // images, images of a tile
  int s = 0, t = 0, r1 = 0, r2 = 0;
  int stages = 2;  // of the ring buffer, 2 to kMaxStages (sm90a: as its kernels say)
  int splits = 1;  // CTAs that share a tile's pixels, each with T / splits output channels

  LOWRANK_OPS_BOTH constexpr int halo() const { return tile_n * rows.halo() * columns.halo(); }
  LOWRANK_OPS_BOTH constexpr int pixels() const { return tile_n * rows.tile * columns.tile; }
  LOWRANK_OPS_BOTH constexpr int taps() const { return rows.kernel * columns.kernel; }
  LOWRANK_OPS_BOTH constexpr int64_t tiles() const { return ceil_div(n, tile_n) * rows.tiles() * columns.tiles(); }
  LOWRANK_OPS_BOTH constexpr int64_t ctas() const { return tiles() * splits; }
};

// Where things lie in a CTA's shared memory, in bytes, and how the three streams of chunks are cut. `fused_core` is
// Tucker's core stage; CP and linear have none. A row of `bytes` payload occupies bytes + kVectorBytes.
struct SharedLayout {
  int halo_rows = 0;                  // of the hidden tile: a multiple of 16
  int hidden_row = 0, hidden = 0;     // stride of a row of the first hidden tile [halo_rows, R1]; its offset
  int second_row = 0, second = 0;     // Tucker: of the second hidden tile [pixels, R2], over the first where it can be
  int slots = 0, slot = 0;            // offset of the ring buffer, bytes of a slot
  int core_chunk = 0, out_chunk = 0;  // bytes of a row in a chunk of core / of out_factor (chunk_bytes)
  int staging = 0, staging_warp = 0;  // offset of the output staging, bytes of a warp's part: 16 rows
  int halo_offset = 0, pixel_offset = 0, pixel_row = 0;  // offsets of the tables: of whole passes, and of the pixels
  int bytes = 0;

  // Passes over the columns of a stage; over the halo rows of the first.
  int halo_passes = 1, r1_passes = 1, r2_passes = 1;
};

LOWRANK_OPS_BOTH constexpr int least(int a, int b) {
  return a < b ? a : b;
}
LOWRANK_OPS_BOTH constexpr int most(int a, int b) {
  return a > b ? a : b;
}

// Bytes of a row in a chunk: a power of two (so that threads find their part by shifting) of at least one step, so that
// `rows` of them fit into `slot` bytes, and no more than the row needs.
LOWRANK_OPS_BOTH constexpr int chunk_bytes(int rows, int slot, int row_bytes) {
  int bytes = kStepBytes;
  while (bytes < row_bytes && 2 * bytes <= kMaxChunkBytes && rows * (2 * bytes + kVectorBytes) <= slot) bytes *= 2;
  return bytes;
}

// Of a warp of the lean kernel: 16 rows of elements of 2 bytes and all of its columns, or of 16 sums 96 bytes apart. Of
// 4 bytes: as in the general kernel.
constexpr int kLeanStagedColumns = 16, kLeanStagedStride = 24;  // sums
LOWRANK_OPS_BOTH constexpr int lean_staging(const Config& c, int element) {
  if (element != 2) return 16 * kStagedStride * 4;
  return 16 * most(8 * c.rank_tiles * element + kVectorBytes, kLeanStagedStride * 4);
}

// `lean`: of the lean kernel (common_case.h), whose tables have entries of 32 bits, and which stages elements of 2
// bytes. The planner counts on what the general kernel takes.
LOWRANK_OPS_BOTH constexpr SharedLayout shared_layout(const Geometry& g, const Config& c, int element, bool tucker,
                                                      bool lean = false) {
  SharedLayout l;
  const int r1_bytes = int(round_up(int64_t(g.r1) * element, kStepBytes));
  const int r2_bytes = int(round_up(int64_t(g.r2) * element, kStepBytes));
  l.halo_passes = int(ceil_div(g.halo(), c.halo_rows()));
  l.r1_passes = int(ceil_div(g.r1, c.columns()));
  l.r2_passes = tucker ? int(ceil_div(g.r2, c.columns())) : 1;
  l.halo_rows = int(round_up(g.halo(), 16));

  const int first_slot = (c.halo_rows() + c.columns()) * (kInputChunkBytes + kVectorBytes);
  l.slot = most(first_slot, c.columns() * (kStepBytes + kVectorBytes));
  l.core_chunk = chunk_bytes(c.columns(), l.slot, r1_bytes);
  l.out_chunk = chunk_bytes(c.columns(), l.slot, r2_bytes);

  const int halo_table = l.halo_passes * c.halo_rows() * (lean ? 4 : 8);
  int offset = lean ? 0 : halo_table;
  l.pixel_offset = offset;
  offset += c.pixels() * (lean ? 4 : 8);
  l.pixel_row = offset;
  offset += c.pixels() * 4;
  offset = int(round_up(offset, 128));
  l.hidden_row = r1_bytes + kVectorBytes;
  l.hidden = offset;
  const int hidden = l.halo_rows * l.hidden_row;
  if (tucker) {
    l.second_row = r2_bytes + kVectorBytes;
    const int second = c.pixels() * l.second_row;
    const bool over = l.r2_passes == 1;  // nothing reads the first hidden tile once the second is written
    l.second = over ? l.hidden : l.hidden + hidden;
    offset += over ? most(hidden, second) : hidden + second;
  } else {
    // The depthwise stages work in place, and a linear layer has one hidden tile.
    l.second_row = l.hidden_row;
    l.second = l.hidden;
    offset += hidden;
  }
  offset = int(round_up(offset, 128));
  l.slots = offset;
  offset += g.stages * l.slot;
  l.staging_warp = lean ? lean_staging(c, element) : 16 * kStagedStride * (element == 8 ? 8 : 4);
  l.staging = int(round_up(offset, 128));
  if (lean) l.halo_offset = l.staging;  // stage 1 alone reads the table of the halo, stage 3 alone stages output
  l.bytes = l.staging + most(c.warps_m * c.warps_n * l.staging_warp, lean ? halo_table : 0);
  return l;
}

}  // namespace lowrank_ops
