// A factorized block as one kernel: the code that all ops, dtypes and architectures of the simt and sm80 families
// share.
//
//   input tile with halo ─(1)→ hidden [halo, R1] ─(2)→ second [pixels, R2] ─(3)→ output tile [pixels, T]
//      global, streamed          shared memory           shared memory            global, written once
//
// (1) in_factor, the 1x1 convolution at the block's entry. The halo's positions come in passes of Config::halo_rows()
//     (one pass, where the tile is chosen well), S in chunks of 64 bytes. Positions outside the image stay zero.
// (2) Tucker: the core as a matrix product out of shared memory, without im2col: a tap is a shift of the rows that a
//     lane addresses. CP: the two depthwise stages, in place. Linear: nothing.
// (3) out_factor, T in passes of Config::columns() channels, with bias and activation.
//
// The chunks of all three stages (of input and in_factor, of core, of out_factor) are one stream through a ring buffer
// of Geometry::stages slots in shared memory: the first chunks of a stage are copied while the last chunks of the stage
// before are multiplied. Per chunk a thread waits for its own copies, meets all threads at one barrier (now the copies
// of all threads are there, and the slot of the chunk before is free), starts the copies of a later chunk, and
// multiplies.
//
// The stream of chunks, the addresses of the products and the output come in two versions each: a general one, and a
// lean one for the common case (common_case.h), which takes far fewer instructions.
//
// Threads: warps form a grid over pixels and columns. `tiles` is Config::halo_tiles in stage 1, pixel_tiles afterwards.
//
//                     8 * rank_tiles columns   8 * rank_tiles   ... warps_n of these
//   16 * tiles pixels         warp 0            warp warps_m
//   16 * tiles pixels         warp 1            warp warps_m + 1
//   ... warps_m of these
//
// A lane holds, of each 16 x 8 tile of sums, rows lane / 4 and lane / 4 + 8, columns lane % 4 * 2 and the next
// (engine_sm80.cuh, engine_simt.cuh).
#pragma once

#include <type_traits>

#include "cuda/kernels/depthwise.cuh"
#include "cuda/kernels/epilogue.cuh"
#include "cuda/kernels/epilogue_lean.cuh"
#include "cuda/kernels/stream.cuh"
#include "cuda/kernels/stream_lean.cuh"
#include "cuda/kernels/stream_persistent.cuh"

namespace lowrank_ops {

template <typename Kernel>
class Block {
 protected:
  using Engine = typename Kernel::Engine;
  using Element = typename Kernel::Element;
  using Sum = typename Kernel::Sum;
  static constexpr Config config = Kernel::config;
  static constexpr int warps_m = config.warps_m, halo_tiles = config.halo_tiles, pixel_tiles = config.pixel_tiles,
                       rank_tiles = config.rank_tiles;
  static constexpr int element = Kernel::element, input_stride = Kernel::input_stride;
  static constexpr bool has_core = Kernel::has_core, lean = Kernel::lean, persistent = Kernel::persistent;
  // The type of addresses in shared memory: the lean kernel computes them with 32 bits.
  using Address = std::conditional_t<lean, SharedAddress, unsigned char*>;
  using Output = std::conditional_t<lean, LeanOutput<Kernel>, GeneralOutput<Kernel>>;
  using Stream = std::conditional_t<persistent, PersistentStream<Kernel>,
                                    std::conditional_t<lean, LeanStream<Kernel>, GeneralStream<Kernel>>>;

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
        r2_bytes(l.second_row - kVectorBytes),
        passes(passes_of(params)),
        stream(params, shared, thread, passes),
        ring(address(l.slots)),
        ring_end(ring + g.stages * l.slot),
        slot(ring_end - l.slot) {}

  LOWRANK_OPS_DEVICE void run() {
    const Tile tile = locate(params.splits.quotient(int(block_index())));
    write_halo_table(tile);
    write_pixel_tables(tile);
    barrier<Barrier::kTables>();
    if constexpr (lean)
      stream.begin(input_of(tile));
    else
      stream.begin();
    for (Address first = ring; first != slot; first += l.slot) stream.template start<1>(first);
    in_stage();
    if constexpr (has_core) core_stage();
    if constexpr (Kernel::op == Op::kCP) {
      barrier<Barrier::kHiddenWritten>();
      depthwise<Kernel>(shared + l.hidden, l.hidden_row, p, thread);
    }
    out_stage(tile);
  }

 protected:
  const KernelParams& params;
  const BlockParams& p;
  const Geometry& g;
  const SharedLayout& l;
  unsigned char* const shared;
  const int thread, lane, warp_m, warp_n;
  const int s_bytes, r1_bytes, r2_bytes;  // bytes per row of input and hidden tiles, the latter in whole steps
  const Passes passes;
  Stream stream;
  const Address ring, ring_end;  // the slots
  Address slot;                  // of the chunk that was multiplied last: the next copies take it

  static LOWRANK_OPS_DEVICE Passes passes_of(const KernelParams& params) {
    const int split = params.splits.remainder(int(block_index()));
    const int first = split * params.split_passes + least(split, params.longer_splits);
    return {first, first + params.split_passes + (split < params.longer_splits ? 1 : 0)};
  }

  // The tile's first image, first input position (which may lie outside the image) and first output.
  struct Tile {
    int image, y, x, out_y, out_x;
  };
  LOWRANK_OPS_DEVICE Tile locate(int tile) {
    const int line = params.column_tiles.quotient(tile), column_tile = tile - line * params.column_tiles.divisor;
    const int images = params.row_tiles.quotient(line), row_tile = line - images * params.row_tiles.divisor;
    const int y = first_output(g.rows, params.row_lattice, row_tile);
    const int x = first_output(g.columns, params.column_lattice, column_tile);
    return {images * g.tile_n, y * g.rows.original_stride - g.rows.padding,
            x * g.columns.original_stride - g.columns.padding, y, x};
  }
  // The same as TileAxis::output(index, 0), without a division.
  static LOWRANK_OPS_DEVICE int first_output(const TileAxis& axis, const Divider& lattice, int index) {
    const int tile = lattice.quotient(index);
    return index - tile * axis.lattice + tile * axis.tile * axis.lattice;
  }

  // The addresses from which the offsets in the lean kernel's tables count.
  LOWRANK_OPS_DEVICE const unsigned char* input_of(const Tile& tile) {
    return static_cast<const unsigned char*>(p.input) +
           (tile.image * p.input_stride[0] + most(tile.y, 0) * p.input_stride[2] +
            most(tile.x, 0) * p.input_stride[3]) *
               element;
  }
  LOWRANK_OPS_DEVICE unsigned char* output_of(const Tile& tile) {
    return static_cast<unsigned char*>(p.output) +
           (tile.image * p.output_stride[0] + tile.out_y * p.output_stride[2] + tile.out_x * p.output_stride[3]) *
               element;
  }

  // Three tables: the global offset of every halo position and of every pixel of the tile, and the row of the hidden
  // tile where a pixel's window begins. Offsets are in elements from the beginning of the tensor, -1 outside; those of
  // the lean kernel are in units of 16 bytes from input_of and output_of, kNowhere outside.
  LOWRANK_OPS_DEVICE void store_offset(const Tile& tile, int table, int i, bool inside, int image, int y, int x,
                                       const int64_t (&stride)[4], const uint32_t (&lean_stride)[3], int first_y,
                                       int first_x) {
    if constexpr (lean) {
      uint32_t offset = image * lean_stride[0] + (y - first_y) * lean_stride[1] + (x - first_x) * lean_stride[2];
      if (!inside) offset = kNowhere;
      store_shared(shared + table + i * 4, offset);
    } else {
      const int64_t offset = (tile.image + image) * stride[0] + y * stride[2] + x * stride[3];
      store_shared<int64_t>(shared + table + i * 8, inside ? offset : -1);
    }
  }
  LOWRANK_OPS_DEVICE void write_halo_table(const Tile& tile) {
    const TileAxis &rows = g.rows, &columns = g.columns;
    const int halo_h = rows.halo(), halo_w = columns.halo(), halo = g.halo();
#pragma unroll 1
    for (int i = thread; i < l.halo_passes * config.halo_rows(); i += config.threads()) {
      const int line = params.halo_w.quotient(i), image = params.halo_h.quotient(line);
      const int y = tile.y + (line - image * halo_h) * rows.unit, x = tile.x + (i - line * halo_w) * columns.unit;
      const bool inside = i < halo && tile.image + image < g.n && y >= 0 && y < rows.in && x >= 0 && x < columns.in;
      store_offset(tile, l.halo_offset, i, inside, image, y, x, p.input_stride, params.lean.input_stride,
                   most(tile.y, 0), most(tile.x, 0));
    }
  }
  LOWRANK_OPS_DEVICE void write_pixel_tables(const Tile& tile) {
    const TileAxis &rows = g.rows, &columns = g.columns;
    const int halo_h = rows.halo(), halo_w = columns.halo();
    // Tucker's windows begin at positions of the halo, `stride` apart. CP's depthwise stages leave results side by
    // side.
    const int row_stride = has_core ? rows.stride : 1, column_stride = has_core ? columns.stride : 1;
    const int pixels = g.pixels();
#pragma unroll 1
    for (int i = thread; i < config.pixels(); i += config.threads()) {
      const int line = params.tile_w.quotient(i), image = params.tile_h.quotient(line);
      const int tile_y = line - image * rows.tile, tile_x = i - line * columns.tile;
      const int y = tile.out_y + tile_y * rows.lattice, x = tile.out_x + tile_x * columns.lattice;
      const bool inside = i < pixels && tile.image + image < g.n && y < rows.out && x < columns.out;
      store_offset(tile, l.pixel_offset, i, inside, image, y, x, p.output_stride, params.lean.output_stride, tile.out_y,
                   tile.out_x);
      const int row = (image * halo_h + tile_y * row_stride) * halo_w + tile_x * column_stride;
      store_shared<int>(shared + l.pixel_row + i * 4, i < pixels ? row : 0);
    }
  }

  LOWRANK_OPS_DEVICE Address address(int offset) {
    if constexpr (lean)
      return shared_address(shared) + offset;
    else
      return shared + offset;
  }

  // Waits for the next chunk, starts the copies of a later one, and returns the address of the chunk's slot.
  template <int stage>
  LOWRANK_OPS_DEVICE Address next_chunk() {
    wait_copies<2>();
    if (g.stages < 4) wait_copies<1>();
    if (g.stages < 3) wait_copies<0>();
    barrier<Barrier::kChunk>();
    stream.template start<stage>(slot);
    slot += l.slot;
    if (slot == ring_end) slot = ring;
    return slot;
  }

  // The rows of a factor that the next products read: in a slot of the ring, or, in persistent kernels, `kept`, where
  // chunks of `bytes` bytes follow each other.
  template <int stage>
  LOWRANK_OPS_DEVICE Address next_rows(Address& kept, int bytes) {
    if constexpr (!persistent) return next_chunk<stage>();
    const Address rows = kept;
    kept += bytes;
    return rows;
  }

  // sum += A B^T over `bytes` of K. Rows of A lie at `a` + `a_row`; the warp's rows of B at `b`, `b_stride` bytes
  // apart. In the lean kernel a_row and `b` already include the lane's offsets (a_place, first_b). `hidden`: A is the
  // hidden tile.
  template <bool hidden, int tiles>
  LOWRANK_OPS_DEVICE void multiply(Sum (&sum)[tiles][rank_tiles][4], Address a,
                                   const int (&a_row)[tiles][Engine::a_rows], Address b, int b_stride, int bytes) {
    if constexpr (lean)
      Engine::template multiply_lean<hidden>(sum, a, a_row, b, b_stride, bytes);
    else
      Engine::template multiply<hidden>(sum, a, a_row, b, b_stride, bytes, lane);
  }
  LOWRANK_OPS_DEVICE int first_b(int stride) {
    const int first = warp_n * 8 * rank_tiles * stride;
    if constexpr (lean) return first + Engine::b_place(lane, stride);
    return first;
  }
  LOWRANK_OPS_DEVICE int a_place(int row, int stride) {
    if constexpr (lean) return row * stride + Engine::a_column(lane);
    return row * stride;
  }

  // Writes a warp's sums into a hidden tile, from row `row` and byte `byte` of a row on. The hidden tile has `rows`
  // rows, a multiple of 16, of `bytes` bytes, a multiple of 8 columns (in fp64: of 4).
  template <int tiles>
  LOWRANK_OPS_DEVICE void store_hidden(const Sum (&sum)[tiles][rank_tiles][4], unsigned char* hidden, int row_stride,
                                       int row, int rows, int byte, int bytes) {
    const int lane_byte = lane % 4 * 2 * element;
#pragma unroll
    for (int m = 0; m < tiles; ++m) {
      if (row + m * 16 >= rows) break;
      unsigned char* const to = hidden + (row + m * 16 + lane / 4) * row_stride + byte + lane_byte;
#pragma unroll
      for (int n = 0; n < rank_tiles; ++n)
        if (byte + n * 8 * element + (element == 8 ? lane_byte : 0) < bytes)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const Sum first = sum[m][n][2 * half], second = sum[m][n][2 * half + 1];
            unsigned char* const pair = to + half * 8 * row_stride + n * 8 * element;
            if constexpr (Kernel::op == Op::kCP)  // the depthwise stages read it
              store_shared(pair, Engine::narrow_both(first, second));
            else
              store_shared(pair, Engine::hidden_pair(first, second));
          }
    }
  }

  LOWRANK_OPS_DEVICE void in_stage() {
    constexpr int tiles = halo_tiles, columns = config.columns();
    int a_row[tiles][Engine::a_rows];
#pragma unroll
    for (int m = 0; m < tiles; ++m)
#pragma unroll
      for (int i = 0; i < Engine::a_rows; ++i)
        a_row[m][i] = a_place(warp_m * tiles * 16 + Engine::a_row(lane, i), input_stride) + m * 16 * input_stride;
    const int b_offset = (persistent ? 0 : config.halo_rows() * input_stride) + first_b(input_stride);
    for (int halo_pass = 0; halo_pass < l.halo_passes; ++halo_pass) {
      Address kept = address(l.in_factor);
      for (int pass = 0; pass < l.r1_passes; ++pass) {
        Sum sum[tiles][rank_tiles][4] = {};
        for (int byte = 0; byte < s_bytes; byte += kInputChunkBytes, kept += columns * input_stride) {
          const Address chunk = next_chunk<1>(), factor = persistent ? kept : chunk;
          multiply<false>(sum, chunk, a_row, factor + b_offset, input_stride, kInputChunkBytes);
        }
        store_hidden(sum, shared + l.hidden, l.hidden_row, halo_pass * config.halo_rows() + warp_m * tiles * 16,
                     l.halo_rows, (pass * columns + warp_n * 8 * rank_tiles) * element, r1_bytes);
      }
    }
  }

  LOWRANK_OPS_DEVICE void core_stage() {
    constexpr int tiles = pixel_tiles, columns = config.columns();
    int a_row[tiles][Engine::a_rows];
#pragma unroll
    for (int m = 0; m < tiles; ++m)
#pragma unroll
      for (int i = 0; i < Engine::a_rows; ++i)
        a_row[m][i] =
            a_place(load_shared<int>(shared + l.pixel_row + ((warp_m * tiles + m) * 16 + Engine::a_row(lane, i)) * 4),
                    l.hidden_row);
    const int stride = l.core_chunk + kVectorBytes, b_offset = first_b(stride);
    const int line = (g.columns.halo() - g.columns.kernel) * l.hidden_row;
    Address kept = address(l.core);
    for (int pass = 0; pass < l.r2_passes; ++pass) {
      Sum sum[tiles][rank_tiles][4] = {};
      Address tap = address(l.hidden);
      for (int y = 0; y < g.rows.kernel; ++y, tap += line)
        for (int x = 0; x < g.columns.kernel; ++x, tap += l.hidden_row)
          for (int byte = 0; byte < r1_bytes; byte += l.core_chunk) {
            const Address rows = next_rows<2>(kept, columns * stride);
            multiply<true>(sum, tap + byte, a_row, rows + b_offset, stride, least(l.core_chunk, r1_bytes - byte));
          }
      if (l.r2_passes == 1) barrier<Barrier::kHiddenRead>();  // the second tile lies over the first
      store_hidden(sum, shared + l.second, l.second_row, warp_m * tiles * 16, config.pixels(),
                   (pass * columns + warp_n * 8 * rank_tiles) * element, r2_bytes);
    }
  }

  LOWRANK_OPS_DEVICE void out_stage(const Tile& tile) {
    constexpr int tiles = pixel_tiles, columns = config.columns();
    int a_row[tiles][Engine::a_rows];
#pragma unroll
    for (int m = 0; m < tiles; ++m)
#pragma unroll
      for (int i = 0; i < Engine::a_rows; ++i) {
        const int pixel = (warp_m * tiles + m) * 16 + Engine::a_row(lane, i);
        a_row[m][i] = a_place(has_core ? pixel : load_shared<int>(shared + l.pixel_row + pixel * 4), l.second_row);
      }
    const int stride = l.out_chunk + kVectorBytes, b_offset = first_b(stride);
    const Output output(params, shared + l.staging + thread / 32 * l.staging_warp,
                        shared + l.pixel_offset + warp_m * tiles * 16 * Output::offset_bytes, output_of(tile), lane);
    Address kept = address(l.out_factor);
    for (int pass = passes.first; pass < passes.last; ++pass) {
      const int channel = pass * columns + warp_n * 8 * rank_tiles;
      const auto bias = output.load_bias(channel);
      Sum sum[tiles][rank_tiles][4] = {};
      for (int byte = 0; byte < r2_bytes; byte += l.out_chunk) {
        const Address rows = next_rows<3>(kept, columns * stride);
        multiply<true>(sum, address(l.second + byte), a_row, rows + b_offset, stride,
                       least(l.out_chunk, r2_bytes - byte));
      }
      if (channel < g.t) output.write(sum, bias, channel);
    }
  }
};

}  // namespace lowrank_ops
