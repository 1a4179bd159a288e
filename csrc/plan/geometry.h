// How a fused CUDA kernel cuts a block into tiles, and where they lie in shared memory. The planner chooses the cut,
// the kernels follow it, the tests check it. Plain C++17, no CUDA headers.
//
// One CTA computes a tile of `tile_n` images x `tile_h` x `tile_w` output pixels. Along an axis with stride s and
// dilation d the tile's outputs are `lattice` = d / gcd(s, d) apart. Then all taps of all its outputs read input
// positions that are `unit` = d apart, and a halo of `(tile - 1) * stride + kernel` positions, with stride = s / gcd(s,
// d), holds them all: a dilated convolution has the halo of an undilated one. The outputs of an axis fall into
// `lattice` residue classes, and each class has tiles of its own.
#pragma once

#include <cstdint>

#include "plan/integers.h"

namespace lowrank_ops {

constexpr int kMaxStages = 4;     // most slots of the ring buffer that chunks stream through
constexpr int kVectorBytes = 16;  // the widest access, and the padding of a row: in rows an odd multiple of 16 bytes
                                  // apart, eight consecutive rows lie in different banks of shared memory
constexpr int kStepBytes = 32;    // one step of an inner product: 16 bf16, 8 tf32, 8 fp32, 4 fp64
constexpr int kInputChunkBytes = 64;  // bytes of each pixel's channels in a chunk of the first stage
constexpr int kMaxChunkBytes = 256;   // most bytes of each row in a chunk of the other stages
constexpr int kStagedColumns = 32;    // output channels whose sums a warp stages in shared memory at a time
constexpr int kStagedStride = 40;     // distance between two staged rows, in sums

// Division by a number that the host knows, as kernels do it: by a multiplication and a shift. Exact for 0 <= n < 2^31:
// with 2^shift >= divisor, `factor` exceeds 2^(31 + shift) / divisor by at most one.
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

// The sizes that are fixed when a kernel is compiled. Warps form a grid of warps_m x warps_n. In the first stage a warp
// computes 16 * halo_tiles halo pixels, afterwards 16 * pixel_tiles output pixels; in all stages 8 * rank_tiles columns
// (ranks or output channels).
struct Config {
  int warps_m, warps_n, halo_tiles, pixel_tiles, rank_tiles;
  bool persistent = false;  // CTAs keep all factors in shared memory and take tile after tile (block_persistent.cuh)
  int one_tile = 0;         // of a persistent one: the index of the same configuration with one tile per CTA

  LOWRANK_OPS_BOTH constexpr int threads() const { return 32 * warps_m * warps_n; }
  // How many CTAs per multiprocessor the compiler has to fit into the registers. The lean kernel of 2-byte elements
  // fits one more where a thread has at most 96 sums.
  LOWRANK_OPS_BOTH constexpr int resident(bool lean_halves = false) const {
    if (threads() > 128) return 1;
    return rank_tiles > 4 && !(lean_halves && halo_tiles <= 3) ? 2 : 3;
  }
  LOWRANK_OPS_BOTH constexpr int halo_rows() const { return 16 * warps_m * halo_tiles; }  // per pass of stage 1
  LOWRANK_OPS_BOTH constexpr int pixels() const { return 16 * warps_m * pixel_tiles; }    // at most, per tile
  LOWRANK_OPS_BOTH constexpr int columns() const { return 8 * warps_n * rank_tiles; }     // per pass of any stage
};

// The configurations of each family of kernels. A warp computes 32 pixels x 64 or 32 columns.
constexpr Config kSm80Configs[] = {
    {4, 1, 3, 2, 4},           // 128 pixels, ranks up to 32 in one pass
    {4, 1, 3, 2, 8},           // 128 pixels, ranks up to 64
    {4, 2, 3, 2, 8},           // 128 pixels, ranks up to 128
    {2, 2, 4, 2, 8},           // 64 pixels, ranks up to 128: large hidden tiles
    {2, 2, 4, 2, 4},           // 64 pixels, ranks up to 64: small problems
    {4, 1, 3, 2, 4, true, 0},  // the first one, persistent: Tucker alone
};
constexpr Config kSimtConfigs[] = {
    {4, 1, 3, 2, 8},  // 128 pixels, ranks up to 64
    {2, 2, 4, 2, 4},  // 64 pixels: small problems, large hidden tiles; the only one for fp64
};
// Only pixels() and columns() of these are used; <op>_sm90a.h has the sizes of the sm90a kernels.
constexpr Config kSm90aConfigs[] = {
    {4, 1, 2, 1, 8},   // Tucker: 8x8 pixels
    {7, 1, 2, 1, 8},   // CP: 14x8 pixels
    {4, 1, 2, 1, 16},  // Tucker, ranks up to 128: 8x8 pixels
    {8, 1, 1, 1, 32},  // linear, ranks up to 256: 128 rows
};
constexpr int kSm90aTuckerConfig = 0, kSm90aCpConfig = 1, kSm90aWideConfig = 2, kSm90aLinearConfig = 3;
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

// One axis (height or width); `lattice`, `unit`, `stride` and the halo as explained at the top of this file.
struct TileAxis {
  int in = 1, out = 1, kernel = 1, padding = 0;
  int lattice = 1, unit = 1, stride = 1;  // `stride`: between outputs, in units
  int original_stride = 1;
  int tile = 1;  // outputs per tile

  LOWRANK_OPS_BOTH constexpr int halo() const { return (tile - 1) * stride + kernel; }
  LOWRANK_OPS_BOTH constexpr int class_outputs() const { return int(ceil_div(out, lattice)); }
  LOWRANK_OPS_BOTH constexpr int tiles() const { return lattice * int(ceil_div(class_outputs(), tile)); }
  // The output of the axis that is number `position` of tile number `index`. May lie outside.
  LOWRANK_OPS_BOTH constexpr int output(int index, int position) const {
    return index % lattice + (index / lattice * tile + position) * lattice;
  }
  // The input coordinate of halo position number `position` of tile number `index`. May lie outside.
  LOWRANK_OPS_BOTH constexpr int input(int index, int position) const {
    return output(index, 0) * original_stride - padding + position * unit;
  }
};

// A problem cut into tiles.
struct Geometry {
  TileAxis rows, columns;  // height, width
  int n = 0, tile_n = 1;   // images; images per tile
  int s = 0, t = 0, r1 = 0, r2 = 0;
  int stages = 2;     // slots of the ring buffer, 2 to kMaxStages (sm90a kernels: as <op>_sm90a.h says)
  int splits = 1;     // CTAs that share a tile's pixels, each with T / splits output channels
  int most_ctas = 0;  // of a persistent kernel of sm80, so that a few tiles are several per CTA (0: no limit)
  // CTAs of a cluster, which compute neighbouring tiles and copy the factors for each other (sm90a): 1 or 2.
  int cluster = 1;

  LOWRANK_OPS_BOTH constexpr int halo() const { return tile_n * rows.halo() * columns.halo(); }
  LOWRANK_OPS_BOTH constexpr int pixels() const { return tile_n * rows.tile * columns.tile; }
  LOWRANK_OPS_BOTH constexpr int taps() const { return rows.kernel * columns.kernel; }
  LOWRANK_OPS_BOTH constexpr int64_t tiles() const { return ceil_div(n, tile_n) * rows.tiles() * columns.tiles(); }
  LOWRANK_OPS_BOTH constexpr int64_t ctas() const { return round_up(tiles(), cluster) * splits; }
};

// Offsets into a CTA's shared memory, in bytes, and the sizes of the chunks that stream through it. A row of `bytes`
// payload occupies bytes + kVectorBytes.
//
//   lean:        pixel tables | hidden tile(s) | ring: slots x slot | staging of the output, over the halo table
//   persistent:  halo table, pixel tables | hidden tile(s) | factors | ring: slots x slot | staging of the output
//   general:     halo table, pixel tables | hidden tile(s) | ring: slots x slot | staging of the output
struct SharedLayout {
  int halo_rows = 0;                  // rows of the hidden tile, a multiple of 16
  int hidden_row = 0, hidden = 0;     // first hidden tile [halo_rows, R1]: bytes from row to row; offset
  int second_row = 0, second = 0;     // the same of Tucker's second one [pixels, R2], over the first where it can be
  int slots = 0, slot = 0;            // ring buffer: offset; bytes per slot
  int core_chunk = 0, out_chunk = 0;  // bytes per row in a chunk of core, of out_factor (chunk_bytes)
  int staging = 0, staging_warp = 0;  // staging of the output: offset; bytes per warp (16 rows)
  int halo_offset = 0, pixel_offset = 0, pixel_row = 0;  // tables: of the halo (whole passes), of the pixels (two)
  int in_factor = 0, core = 0, out_factor = 0;           // of persistent kernels: the factors, all chunks in order
  int bytes = 0;

  // Passes over the halo rows of stage 1, over the ranks of stage 1, over the ranks of Tucker's core.
  int halo_passes = 1, r1_passes = 1, r2_passes = 1;
};

LOWRANK_OPS_BOTH constexpr int least(int a, int b) {
  return a < b ? a : b;
}
LOWRANK_OPS_BOTH constexpr int most(int a, int b) {
  return a > b ? a : b;
}

// Bytes per row in a chunk: a power of two, so that threads find their part by shifting. At least one step, at most as
// many as let `rows` rows fit into `slot` bytes, and no more than the row needs.
LOWRANK_OPS_BOTH constexpr int chunk_bytes(int rows, int slot, int row_bytes) {
  int bytes = kStepBytes;
  while (bytes < row_bytes && 2 * bytes <= kMaxChunkBytes && rows * (2 * bytes + kVectorBytes) <= slot) bytes *= 2;
  return bytes;
}

// Bytes in which a warp of the lean kernel stages its output. 2-byte elements: 16 rows of all of the warp's columns as
// elements, or 16 rows of 16 columns as sums, 96 bytes apart. 4-byte elements: as in the general kernel.
constexpr int kLeanStagedColumns = 16, kLeanStagedStride = 24;  // sums
LOWRANK_OPS_BOTH constexpr int lean_staging(const Config& c, int element) {
  if (element != 2) return 16 * kStagedStride * 4;
  return 16 * most(8 * c.rank_tiles * element + kVectorBytes, kLeanStagedStride * 4);
}

// Bytes of a factor that a persistent kernel keeps: `passes` passes over `columns` rows, each in chunks of `chunk`
// bytes, and that for every tap.
LOWRANK_OPS_BOTH constexpr int kept_bytes(int columns, int passes, int taps, int row_bytes, int chunk) {
  return passes * taps * int(ceil_div(row_bytes, chunk)) * columns * (chunk + kVectorBytes);
}

// `lean`: the layout of the lean kernel (cuda/kernels/common_case.h), whose tables have entries of 32 bits and which
// stages elements of 2 bytes as elements. Persistent kernels are lean.
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
  const bool shared_table = lean && !c.persistent;  // only stage 1 reads it, only stage 3 stages output
  int offset = shared_table ? 0 : halo_table;
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
    // CP's depthwise stages work in place, and a linear layer has one hidden tile.
    l.second_row = l.hidden_row;
    l.second = l.hidden;
    offset += hidden;
  }
  offset = int(round_up(offset, 128));
  if (c.persistent) {
    l.in_factor = offset;
    l.core = l.in_factor + kept_bytes(c.columns(), l.r1_passes, 1, g.s * element, kInputChunkBytes);
    l.out_factor = l.core + kept_bytes(c.columns(), l.r2_passes, g.taps(), r1_bytes, l.core_chunk);
    offset = l.out_factor + kept_bytes(c.columns(), int(ceil_div(g.t, c.columns())), 1, r2_bytes, l.out_chunk);
    offset = int(round_up(offset, 128));
    l.slot = c.halo_rows() * (kInputChunkBytes + kVectorBytes);  // of the input alone
  }
  l.slots = offset;
  offset += g.stages * l.slot;
  l.staging_warp = lean ? lean_staging(c, element) : 16 * kStagedStride * (element == 8 ? 8 : 4);
  l.staging = int(round_up(offset, 128));
  if (shared_table) l.halo_offset = l.staging;
  l.bytes = l.staging + most(c.warps_m * c.warps_n * l.staging_warp, shared_table ? halo_table : 0);
  return l;
}

}  // namespace lowrank_ops
