// The stream of chunks (block.cuh) in the common case (common_case.h): all copies take 16 bytes.
//
// From chunk to chunk the addresses of a thread's copies move by constant steps. So a thread keeps one pointer into the
// input, one pointer into the present factor, one bit per copy (whether there is something to read), and the offsets of
// its halo positions in units of 16 bytes, which one instruction scales and adds to the pointer. Nothing is divided,
// and only the beginning of a stage multiplies by strides.
#pragma once

#include "cuda/kernels/copy.cuh"
#include "cuda/kernels/kernel_params.cuh"

namespace lowrank_ops {

constexpr uint32_t kNowhere = 0xffffffff;  // an entry of the lean kernel's tables: outside of the tensor

// The copies of one thread.
template <typename Kernel>
class LeanCopies {
 protected:
  static constexpr Config config = Kernel::config;
  static constexpr int threads = Kernel::threads, columns = config.columns();
  // Stage 1: vectors per position, positions per pass, and copies of the input per thread, which are equally many.
  static constexpr int vectors = kInputChunkBytes / kVectorBytes, input_rows = config.halo_rows(),
                       input_copies = input_rows * vectors / threads;
  static_assert(input_rows * vectors % threads == 0 && input_copies <= 32, "one bit of a mask per copy");

  LOWRANK_OPS_DEVICE LeanCopies(const KernelParams& params, unsigned char* shared, int thread)
      : params(params), shared(shared), thread(thread) {}

  const KernelParams& params;
  unsigned char* const shared;
  const int thread;

  // The position of the stream, the same in all threads.
  int halo_pass = 0, pass = 0, tap_y = 0, tap_x = 0, byte = 0;
  // This thread's copies of the factor. Of the first copy: its source, its offset in a slot, its first byte in a
  // chunk's row, and the rows of the factor from its row on; for each copy a bit: whether it has a row.
  const unsigned char* factor = nullptr;
  int place = 0, vector_byte = 0, rows_left = 0;
  uint32_t factor_mask = 0;
  // This thread's copies of the input, which have the same `place` in stage 1.
  const unsigned char* input = nullptr;
  uint32_t input_offset[input_copies] = {}, input_mask = 0;

  static constexpr LOWRANK_OPS_DEVICE int apart(int log2_vectors) { return threads >> log2_vectors; }

  LOWRANK_OPS_DEVICE void mask_rows(int log2_vectors) {
    const int copies = (rows_left + apart(log2_vectors) - 1) >> (log2(threads) - log2_vectors);
    factor_mask = copies >= 32 ? ~0u : copies <= 0 ? 0 : (1u << copies) - 1;
  }
  static constexpr LOWRANK_OPS_DEVICE int log2(int power) { return power == 1 ? 0 : 1 + log2(power / 2); }

  LOWRANK_OPS_DEVICE void begin_factor(const FactorStream& f, int first_pass) {
    pass = first_pass;
    const int row = spread_rows(thread >> f.log2_vectors, f.log2_vectors);
    vector_byte = (thread & ((1 << f.log2_vectors) - 1)) * kVectorBytes;
    place = row * (f.chunk + kVectorBytes) + vector_byte;
    const int first_row = pass * columns + row;
    factor = f.data + first_row * f.row + vector_byte;
    rows_left = f.rows - first_row;
    mask_rows(f.log2_vectors);
  }

  // Moves on from the last chunk of a row. True: that was the last pass.
  template <bool taps>
  LOWRANK_OPS_DEVICE bool next_row(const FactorStream& f) {
    byte = 0;
    factor += f.next_tap;
    if constexpr (taps) {
      if (++tap_x < f.taps_w) return false;
      tap_x = 0;
      factor += f.next_tap_line;
      if (++tap_y < f.taps_h) return false;
      tap_y = 0;
    }
    factor += f.next_pass;
    rows_left -= columns;
    mask_rows(f.log2_vectors);
    return ++pass == f.passes;
  }

  // Looks up the halo positions that this thread copies in this pass.
  LOWRANK_OPS_DEVICE void begin_halo_pass() {
    input_mask = 0;
    const int row = halo_pass * input_rows + spread_rows(thread / vectors, log2(vectors));
#pragma unroll
    for (int i = 0; i < input_copies; ++i) {
      const uint32_t offset =
          load_shared<uint32_t>(shared + params.layout.halo_offset + (row + i * apart(log2(vectors))) * 4);
      input_mask |= offset == kNowhere ? 0 : 1u << i;
      input_offset[i] = offset == kNowhere ? 0 : offset;
    }
  }

  // Copies the input's part of a chunk of stage 1.
  LOWRANK_OPS_DEVICE void copy_input(SharedAddress slot) {
    const unsigned char* const from = input + uint32_t(byte);
    const uint32_t mask = vector_byte + byte < params.lean.in_factor.row_bytes ? input_mask : 0;
#pragma unroll
    for (int i = 0; i < input_copies; ++i)
      copy_async_if(slot + place + i * apart(log2(vectors)) * Kernel::input_stride,
                    vectors_behind(from, input_offset[i]), mask & 1u << i);
  }

  // Moves on by one chunk. True: that was the last one of a row.
  LOWRANK_OPS_DEVICE bool next_chunk(const FactorStream& f) {
    factor += f.chunk;
    byte += f.chunk;
    return byte >= f.row_bytes;
  }

  // One case per size that chunk_bytes (geometry.h) can choose.
  LOWRANK_OPS_DEVICE void copy_factor(SharedAddress slot, const FactorStream& f) {
    static_assert(kStepBytes == 32 && kMaxChunkBytes == 256, "one case per size");
    if (f.log2_vectors == 3)
      copy_rows<3>(slot, f);
    else if (f.log2_vectors == 2)
      copy_rows<2>(slot, f);
    else if (f.log2_vectors == 1)
      copy_rows<1>(slot, f);
    else
      copy_rows<4>(slot, f);
  }

  template <int log2_vectors>
  LOWRANK_OPS_DEVICE void copy_rows(SharedAddress slot, const FactorStream& f) {
    constexpr int stride = (kVectorBytes << log2_vectors) + kVectorBytes, all = columns << log2_vectors;
    const uint32_t mask = vector_byte + byte < f.row_bytes ? factor_mask : 0;
    if (all >= threads || thread < all)
#pragma unroll
      for (int i = 0; i < most(all / threads, 1); ++i)
        copy_async_if(slot + place + i * apart(log2_vectors) * stride, factor + uint64_t(f.copy) * (i * kVectorBytes),
                      mask & 1u << i);
  }
};

// The stream of the kernel whose CTAs compute one tile each: input and factors go through the ring.
template <typename Kernel>
class LeanStream : LeanCopies<Kernel> {
  using Copies = LeanCopies<Kernel>;
  using Copies::begin_factor, Copies::begin_halo_pass, Copies::next_chunk, Copies::copy_factor;
  using Copies::params, Copies::halo_pass, Copies::pass, Copies::input, Copies::vector_byte;

 public:
  LOWRANK_OPS_DEVICE LeanStream(const KernelParams& params, unsigned char* shared, int thread, Passes passes)
      : Copies(params, shared, thread), passes(passes) {}

  // `tile`: the address that the table's offsets count from.
  LOWRANK_OPS_DEVICE void begin(const unsigned char* tile) {
    begin_factor(params.lean.in_factor, 0);
    input = tile + vector_byte;
    begin_halo_pass();
  }

  // Starts the copies of the next chunk into `slot` and closes their group, which is empty behind the last chunk.
  // `stage`: the earliest stage that the chunk can belong to; code for earlier ones is not compiled.
  template <int stage>
  LOWRANK_OPS_DEVICE void start(SharedAddress slot) {
    if (stage == 1 && at_stage == 1)
      start_input(slot);
    else if (Kernel::has_core && stage <= 2 && at_stage == 2)
      start_core(slot);
    else if (pass < passes.last)
      start_out(slot);
    commit_copies();
  }

 private:
  const Passes passes;
  int at_stage = 1;

  LOWRANK_OPS_DEVICE void start_input(SharedAddress slot) {
    const FactorStream& f = params.lean.in_factor;
    Copies::copy_input(slot);
    Copies::template copy_rows<Copies::log2(Copies::vectors)>(slot + Copies::input_rows * Kernel::input_stride, f);
    if (!next_chunk(f)) return;
    if (!Copies::template next_row<false>(f)) return;
    if (++halo_pass < params.layout.halo_passes) {
      begin_factor(f, 0);
      begin_halo_pass();
    } else if (Kernel::has_core) {
      at_stage = 2;
      begin_factor(params.lean.core, 0);
    } else {
      begin_out();
    }
  }

  LOWRANK_OPS_DEVICE void start_core(SharedAddress slot) {
    const FactorStream& f = params.lean.core;
    copy_factor(slot, f);
    if (next_chunk(f) && Copies::template next_row<true>(f)) begin_out();
  }

  LOWRANK_OPS_DEVICE void begin_out() {
    at_stage = 3;
    begin_factor(params.lean.out_factor, passes.first);
  }

  LOWRANK_OPS_DEVICE void start_out(SharedAddress slot) {
    const FactorStream& f = params.lean.out_factor;
    copy_factor(slot, f);
    if (next_chunk(f)) Copies::template next_row<false>(f);
  }
};

}  // namespace lowrank_ops
