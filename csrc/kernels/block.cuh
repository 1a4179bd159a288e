// A factorized block as one kernel: what every op, dtype and architecture shares.
//
//   input tile with halo ─(1)→ hidden [halo, R1] ─(2)→ second [pixels, R2] ─(3)→ output tile [pixels, T]
//      global, streamed          shared memory           shared memory            global, written once
//
// (1) in_factor, the 1x1 convolution at the block's entry. The halo's positions come in passes of Config::halo_rows()
//     (one, where the tile is chosen well), S in chunks of 64 bytes. Positions outside the image stay zero.
// (2) Tucker: core as an implicit matrix product out of shared memory; a tap is a shift of the rows that a lane
//     addresses. CP: the two depthwise stages, in place. Linear: nothing.
// (3) out_factor over T in passes of Config::columns() channels, with bias and activation.
//
// The chunks of all three stages (of input and in_factor, of core, of out_factor) are one stream through a ring buffer
// of `stages` slots in shared memory: copies of the next stage's first chunks are under way while the last ones of a
// stage are multiplied. Per chunk: wait for one's own copies, one barrier (everybody's copies are there, and everybody
// is done with the chunk before, whose slot is free), start the copies of a later chunk, multiply.
//
// Warps form a grid of warps_m x warps_n over pixels x columns; the warp tile is that of the engine's `multiply`.
#pragma once

#include "kernels/copy.cuh"
#include "kernels/depthwise.cuh"
#include "kernels/epilogue.cuh"

namespace lowrank_ops {

struct KernelParams {
  BlockParams block;
  SharedLayout layout;
  // What every thread would otherwise divide for: tiles of the two axes; passes of stage 3 that each split has, and how
  // many splits have one more.
  int row_tiles, column_tiles, split_passes, longer_splits;
};

template <Op op, typename Engine, Family family, int index>
class Block {
  using Element = typename Engine::Element;
  using Sum = typename Engine::Sum;
  static constexpr Config config = config_of(family, index, op != Op::kLinear);
  static constexpr int warps_m = config.warps_m, halo_tiles = config.halo_tiles, pixel_tiles = config.pixel_tiles,
                       rank_tiles = config.rank_tiles;
  static constexpr int element = int(sizeof(Element));
  static constexpr int input_stride = kInputChunkBytes + kVectorBytes;  // of a row of a chunk of stage 1
  static constexpr bool has_core = op == Op::kTucker;

 public:
  LOWRANK_OPS_DEVICE explicit Block(const KernelParams& params)
      : params(params),
        p(params.block),
        g(params.block.geometry),
        l(params.layout),
        shared(shared_memory()),
        thread(thread_index()),
        lane(thread % 32),
        warp_m(thread / 32 % warps_m),
        warp_n(thread / 32 / warps_m),
        s_bytes(g.s * element),
        r1_bytes(l.hidden_row - kVectorBytes),
        r2_bytes(l.second_row - kVectorBytes) {
    const int split = int(block_index()) % g.splits;
    first_pass = split * params.split_passes + least(split, params.longer_splits);
    last_pass = first_pass + params.split_passes + (split < params.longer_splits ? 1 : 0);
  }

  LOWRANK_OPS_DEVICE void run() {
    write_tables();
    barrier<Barrier::kTables>();
    for (int i = 0; i < g.stages - 1; ++i) start_copies();
    in_stage();
    if constexpr (has_core) core_stage();
    if constexpr (op == Op::kCP) {
      barrier<Barrier::kHiddenWritten>();
      depthwise<Element, Sum>(shared + l.hidden, l.hidden_row, p, thread, config.threads());
    }
    out_stage();
  }

 private:
  const KernelParams& params;
  const BlockParams& p;
  const Geometry& g;
  const SharedLayout& l;
  unsigned char* const shared;
  const int thread, lane, warp_m, warp_n;
  const int s_bytes, r1_bytes, r2_bytes;  // of a row: of the input, and of the hidden tiles, rounded up to whole steps
  int first_pass, last_pass;              // of stage 3, this CTA's

  // Where the stream of chunks stands: the next to be copied, the next to be multiplied.
  struct Cursor {
    int stage = 1, halo_pass = 0, pass = 0, tap_y = 0, tap_x = 0, byte = 0;  // pass over columns; byte of a row
  } next;
  int copy_slot = 0, multiply_slot = 0;

  // Global offsets of the halo's positions and of the tile's pixels, and the hidden row where a pixel's window begins.
  LOWRANK_OPS_DEVICE void write_tables() {
    const TileAxis &rows = g.rows, &columns = g.columns;
    int tile = int(block_index()) / g.splits;
    const int column_tile = tile % params.column_tiles;
    tile /= params.column_tiles;
    const int row_tile = tile % params.row_tiles;
    const int first_image = tile / params.row_tiles * g.tile_n;
    const int halo_h = rows.halo(), halo_w = columns.halo(), halo = g.halo();
    const int first_y = rows.input(row_tile, 0), first_x = columns.input(column_tile, 0);
#pragma unroll 1
    for (int i = thread; i < l.halo_passes * config.halo_rows(); i += config.threads()) {
      const int line = i / halo_w, image_in_tile = line / halo_h;
      const int image = first_image + image_in_tile;
      const int y = first_y + (line - image_in_tile * halo_h) * rows.unit;
      const int x = first_x + (i - line * halo_w) * columns.unit;
      const bool inside = i < halo && image < g.n && y >= 0 && y < rows.in && x >= 0 && x < columns.in;
      const int64_t offset = image * p.input_stride[0] + y * p.input_stride[2] + x * p.input_stride[3];
      store_shared<int64_t>(shared + l.halo_offset + i * 8, inside ? offset : -1);
    }
    // Stage 2 reads a core's windows where they lie in the halo; depthwise stages have moved their results together.
    const int row_stride = has_core ? rows.stride : 1, column_stride = has_core ? columns.stride : 1;
    const int first_row = rows.output(row_tile, 0), first_column = columns.output(column_tile, 0);
    const int pixels = g.pixels();
#pragma unroll 1
    for (int i = thread; i < config.pixels(); i += config.threads()) {
      const int line = i / columns.tile, image_in_tile = line / rows.tile;
      const int tile_y = line - image_in_tile * rows.tile, tile_x = i - line * columns.tile;
      const int image = first_image + image_in_tile;
      const int y = first_row + tile_y * rows.lattice, x = first_column + tile_x * columns.lattice;
      const bool inside = i < pixels && image < g.n && y < rows.out && x < columns.out;
      const int64_t offset = image * p.output_stride[0] + y * p.output_stride[2] + x * p.output_stride[3];
      store_shared<int64_t>(shared + l.pixel_offset + i * 8, inside ? offset : -1);
      const int row = (image_in_tile * halo_h + tile_y * row_stride) * halo_w + tile_x * column_stride;
      store_shared<int>(shared + l.pixel_row + i * 4, i < pixels ? row : 0);
    }
  }

  // Starts the copies of the next chunk of the stream into the next slot, and closes their group (an empty one at the
  // end, so that counting groups stays simple). All factors are copied by one piece of code, whose arguments are chosen
  // here.
  LOWRANK_OPS_DEVICE void start_copies() {
    unsigned char* slot = shared + l.slots + copy_slot * l.slot;
    copy_slot = copy_slot + 1 == g.stages ? 0 : copy_slot + 1;
    if (next.pass < (next.stage == 3 ? last_pass : kAnyPass)) {
      const bool in = next.stage == 1, core = has_core && next.stage == 2;
      if (in) copy_input(slot);
      const Factor factor = in ? p.in_factor : core ? p.core : p.out_factor;
      const int64_t tap_offset = core ? next.tap_y * factor.tap_stride[0] + next.tap_x * factor.tap_stride[1] : 0;
      const int row_bytes = in ? s_bytes : core ? r1_bytes : r2_bytes;
      const int chunk = in ? kInputChunkBytes : core ? l.core_chunk : l.out_chunk;
      copy_factor<Element>(slot + (in ? config.halo_rows() * input_stride : 0), factor, tap_offset,
                           next.pass * config.columns(), config.columns(),
                           in     ? g.r1
                           : core ? g.r2
                                  : g.t,
                           next.byte / element,
                           in     ? g.s
                           : core ? g.r1
                                  : g.r2,
                           log2(chunk), in ? chunk : least(chunk, row_bytes - next.byte), thread, config.threads());
      next.byte += chunk;
      if (next.byte >= row_bytes) advance(in, core);
    }
    commit_copies();
  }
  static constexpr int kAnyPass = 1 << 30;

  // The cursor at the end of a row of chunks.
  LOWRANK_OPS_DEVICE void advance(bool in, bool core) {
    next.byte = 0;
    if (core) {
      if (++next.tap_x < g.columns.kernel) return;
      next.tap_x = 0;
      if (++next.tap_y < g.rows.kernel) return;
      next.tap_y = 0;
    }
    ++next.pass;
    if (in && next.pass == l.r1_passes) {
      next.pass = 0;
      if (++next.halo_pass < l.halo_passes) return;
      next.stage = has_core ? 2 : 3;
      if (!has_core) next.pass = first_pass;
    } else if (core && next.pass == l.r2_passes) {
      next.stage = 3;
      next.pass = first_pass;
    }
  }

  static LOWRANK_OPS_DEVICE int log2(int power) { return power == 32 ? 5 : power == 64 ? 6 : power == 128 ? 7 : 8; }

  // 64 bytes of channels of the halo's positions. Neighbouring threads copy what lies side by side in memory: the
  // channels of a position, or positions of a row where channels lie apart (NCHW).
  LOWRANK_OPS_DEVICE void copy_input(unsigned char* slot) {
    constexpr int vectors = kInputChunkBytes / kVectorBytes, rows = config.halo_rows();
    const Element* input = static_cast<const Element*>(p.input);
    const int64_t channel_stride = p.input_stride[1];
    const auto copy = [&](int row, int vector, auto copy_row) {
      const int position = next.halo_pass * rows + row;
      const int64_t offset = load_shared<int64_t>(shared + l.halo_offset + position * 8);
      const int channel = (next.byte + vector * kVectorBytes) / element;
      const bool inside = offset >= 0 && channel < g.s;
      copy_row(slot + row * input_stride + vector * kVectorBytes,
               inside ? input + offset + channel * channel_stride : input, inside ? g.s - channel : 0);
    };
    if (p.input_vector == kVectorBytes) {
#pragma unroll
      for (int i = 0; i < rows * vectors / config.threads(); ++i) {
        const int copied = thread + i * config.threads();
        static_assert(vectors == 4, "the logarithm below");
        copy(spread_rows(copied / vectors, 2), copied % vectors,
             [](unsigned char* to, const Element* from, int count) { copy_async<kVectorBytes>(to, from, count > 0); });
      }
      static_assert(rows * vectors % config.threads() == 0, "every thread copies as much");
    } else {
      const bool side_by_side = channel_stride == 1;
#pragma unroll 1
      for (int i = thread; i < rows * vectors; i += config.threads())
        copy(side_by_side ? i / vectors : i % rows, side_by_side ? i % vectors : i / rows,
             [&](unsigned char* to, const Element* from, int count) {
               copy_vector(to, from, channel_stride, count, p.input_vector);
             });
    }
  }

  // The slot of the next chunk, arrived.
  LOWRANK_OPS_DEVICE const unsigned char* next_chunk() {
    if (g.stages == 2)
      wait_copies<0>();
    else if (g.stages == 3)
      wait_copies<1>();
    else
      wait_copies<2>();
    barrier<Barrier::kChunk>();
    start_copies();
    const unsigned char* slot = shared + l.slots + multiply_slot * l.slot;
    multiply_slot = multiply_slot + 1 == g.stages ? 0 : multiply_slot + 1;
    return slot;
  }

  // Writes a warp tile of sums into a hidden tile: `row` of its first row, `byte` of its first column.
  template <int tiles>
  LOWRANK_OPS_DEVICE void store_hidden(const Sum (&sum)[tiles][rank_tiles][4], unsigned char* hidden, int row_stride,
                                       int row, int rows, int byte, int bytes) {
#pragma unroll
    for (int m = 0; m < tiles; ++m)
#pragma unroll
      for (int n = 0; n < rank_tiles; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int to_row = row + m * 16 + half * 8 + lane / 4, to_byte = byte + (n * 8 + lane % 4 * 2) * element;
          if (to_row < rows && to_byte < bytes)
            store_shared(hidden + to_row * row_stride + to_byte,
                         Pair<Element>{{narrow<Element, Sum>(sum[m][n][2 * half]),
                                        narrow<Element, Sum>(sum[m][n][2 * half + 1])}});
        }
  }

  LOWRANK_OPS_DEVICE void in_stage() {
    constexpr int tiles = halo_tiles, columns = config.columns();
    int a_row[tiles][Engine::a_rows];
#pragma unroll
    for (int m = 0; m < tiles; ++m)
#pragma unroll
      for (int i = 0; i < Engine::a_rows; ++i)
        a_row[m][i] = ((warp_m * tiles + m) * 16 + Engine::a_row(lane, i)) * input_stride;
    for (int halo_pass = 0; halo_pass < l.halo_passes; ++halo_pass)
      for (int pass = 0; pass < l.r1_passes; ++pass) {
        Sum sum[tiles][rank_tiles][4] = {};
        for (int byte = 0; byte < s_bytes; byte += kInputChunkBytes) {
          const unsigned char* chunk = next_chunk();
          Engine::multiply(sum, chunk, a_row, chunk + (config.halo_rows() + warp_n * 8 * rank_tiles) * input_stride,
                           input_stride, kInputChunkBytes, lane);
        }
        store_hidden(sum, shared + l.hidden, l.hidden_row, halo_pass * config.halo_rows() + warp_m * tiles * 16,
                     l.halo_rows, (pass * columns + warp_n * 8 * rank_tiles) * element, r1_bytes);
      }
  }

  LOWRANK_OPS_DEVICE void core_stage() {
    constexpr int tiles = pixel_tiles, columns = config.columns();
    int a_row[tiles][Engine::a_rows];
#pragma unroll
    for (int m = 0; m < tiles; ++m)
#pragma unroll
      for (int i = 0; i < Engine::a_rows; ++i)
        a_row[m][i] = l.hidden_row *
                      load_shared<int>(shared + l.pixel_row + ((warp_m * tiles + m) * 16 + Engine::a_row(lane, i)) * 4);
    const int halo_w = g.columns.halo(), stride = l.core_chunk + kVectorBytes;
    for (int pass = 0; pass < l.r2_passes; ++pass) {
      Sum sum[tiles][rank_tiles][4] = {};
      for (int y = 0; y < g.rows.kernel; ++y)
        for (int x = 0; x < g.columns.kernel; ++x)
          for (int byte = 0; byte < r1_bytes; byte += l.core_chunk) {
            const unsigned char* chunk = next_chunk();
            Engine::multiply(sum, shared + l.hidden + (y * halo_w + x) * l.hidden_row + byte, a_row,
                             chunk + warp_n * 8 * rank_tiles * stride, stride, least(l.core_chunk, r1_bytes - byte),
                             lane);
          }
      if (l.r2_passes == 1) barrier<Barrier::kHiddenRead>();  // the second tile lies over the first
      store_hidden(sum, shared + l.second, l.second_row, warp_m * tiles * 16, config.pixels(),
                   (pass * columns + warp_n * 8 * rank_tiles) * element, r2_bytes);
    }
  }

  LOWRANK_OPS_DEVICE void out_stage() {
    constexpr int tiles = pixel_tiles, columns = config.columns();
    int a_row[tiles][Engine::a_rows];
#pragma unroll
    for (int m = 0; m < tiles; ++m)
#pragma unroll
      for (int i = 0; i < Engine::a_rows; ++i) {
        const int pixel = (warp_m * tiles + m) * 16 + Engine::a_row(lane, i);
        a_row[m][i] = l.second_row * (has_core ? pixel : load_shared<int>(shared + l.pixel_row + pixel * 4));
      }
    const int stride = l.out_chunk + kVectorBytes;
    for (int pass = first_pass; pass < last_pass; ++pass) {
      Sum sum[tiles][rank_tiles][4] = {};
      for (int byte = 0; byte < r2_bytes; byte += l.out_chunk) {
        const unsigned char* chunk = next_chunk();
        Engine::multiply(sum, shared + l.second + byte, a_row, chunk + warp_n * 8 * rank_tiles * stride, stride,
                         least(l.out_chunk, r2_bytes - byte), lane);
      }
      const int channel = pass * columns + warp_n * 8 * rank_tiles;
      if (channel < g.t)
#pragma unroll
        for (int m = 0; m < tiles; ++m)
          write_output<Element>(sum[m], shared + l.staging + thread / 32 * l.staging_warp,
                                shared + l.pixel_offset + (warp_m * tiles + m) * 16 * 8, p, channel, lane);
    }
  }
};

// Multiply-adds hold elements widened to sums: in fp64, bf16 and fp16 that takes the registers of a third CTA.
template <Op op, typename Engine, Family family, int index>
constexpr int resident_ctas() {
  const int ctas = config_of(family, index, op != Op::kLinear).resident();
  return family == Family::kSimt && sizeof(typename Engine::Element) != 4 ? least(ctas, 2) : ctas;
}

template <Op op, typename Engine, Family family, int index>
LOWRANK_OPS_KERNEL(config_of(family, index, op != Op::kLinear).threads(), (resident_ctas<op, Engine, family, index>()))
block_kernel(const KernelParams params) {
  Block<op, Engine, family, index>(params).run();
}

template <Op op, typename Engine, Family family, int index>
cudaError_t launch_block(const BlockParams& params, cudaStream_t stream) {
  constexpr Config config = config_of(family, index, op != Op::kLinear);
  const SharedLayout layout =
      shared_layout(params.geometry, config, int(sizeof(typename Engine::Element)), op == Op::kTucker);
  const Geometry& g = params.geometry;
  const int passes = int(ceil_div(g.t, config.columns()));
  return launch(block_kernel<op, Engine, family, index>, g.ctas(), config.threads(), layout.bytes, stream,
                KernelParams{params, layout, g.rows.tiles(), g.columns.tiles(), passes / g.splits, passes % g.splits});
}

}  // namespace lowrank_ops
