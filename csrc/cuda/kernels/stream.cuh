// The stream of chunks (block.cuh) in the general case: any strides, alignment and memory format of the tensors.
#pragma once

#include "cuda/kernels/copy.cuh"
#include "cuda/kernels/kernel_params.cuh"

namespace lowrank_ops {

template <typename Kernel>
class GeneralStream {
  using Element = typename Kernel::Element;
  static constexpr Config config = Kernel::config;
  static constexpr int element = Kernel::element, input_stride = Kernel::input_stride;
  static constexpr bool has_core = Kernel::has_core;

 public:
  LOWRANK_OPS_DEVICE GeneralStream(const KernelParams& params, unsigned char* shared, int thread, Passes passes)
      : p(params.block),
        g(params.block.geometry),
        l(params.layout),
        shared(shared),
        thread(thread),
        passes(passes),
        s_bytes(g.s * element),
        r1_bytes(l.hidden_row - kVectorBytes),
        r2_bytes(l.second_row - kVectorBytes) {}

  // To be called once the table of the halo is written.
  LOWRANK_OPS_DEVICE void begin() {}

  // Starts the copies of the next chunk into `slot` and closes their group. Behind the last chunk it closes empty
  // groups, so that wait_copies counts alike everywhere. One piece of code, whose arguments are chosen here, copies all
  // factors.
  template <int>
  LOWRANK_OPS_DEVICE void start(unsigned char* slot) {
    if (next.pass < (next.stage == 3 ? passes.last : kAnyPass)) {
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

 private:
  const BlockParams& p;
  const Geometry& g;
  const SharedLayout& l;
  unsigned char* const shared;
  const int thread;
  const Passes passes;
  const int s_bytes, r1_bytes, r2_bytes;  // bytes per row of input and hidden tiles, the latter in whole steps

  struct Cursor {
    int stage = 1, halo_pass = 0, pass = 0, tap_y = 0, tap_x = 0,
        byte = 0;  // `pass`: over the columns; `byte`: of a row
  } next;
  static constexpr int kAnyPass = 1 << 30;

  // Moves the cursor on at the end of a row of chunks.
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
      if (!has_core) next.pass = passes.first;
    } else if (core && next.pass == l.r2_passes) {
      next.stage = 3;
      next.pass = passes.first;
    }
  }

  static LOWRANK_OPS_DEVICE int log2(int power) { return power == 32 ? 5 : power == 64 ? 6 : power == 128 ? 7 : 8; }

  // Copies 64 bytes of channels of a pass of halo positions. Neighbouring threads copy neighbours in memory: the
  // channels of a position, or the positions of a row where channels lie apart (NCHW).
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
      static_assert(rows * vectors % config.threads() == 0, "all threads copy equally much");
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
};

}  // namespace lowrank_ops
