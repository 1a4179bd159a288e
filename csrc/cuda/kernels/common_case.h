// The common case, which a lean kernel runs: channels lie side by side (channels_last) in input and output, and all
// copies can take 16 bytes. The general kernel runs every other case.
//
// This file computes, on the host, the lean kernel's parameters: strides in units of 16 bytes, and the steps by which
// the addresses of a factor's copies move. Plain C++.
#pragma once

#include "cuda/kernels/launch.h"

namespace lowrank_ops {

// A factor as a stream of chunks. A chunk is `chunk` bytes of each of Config::columns() rows. The chunks follow each
// other along a row, then for each tap of a line of taps, for each line of taps, and for each pass over the rows.
// Strides and steps are in bytes.
struct FactorStream {
  const unsigned char* data = nullptr;
  int64_t row = 0;            // from one row to the next
  int64_t next_tap = 0;       // added to an address behind the last chunk of a row, for the next tap ...
  int64_t next_tap_line = 0;  // ... then behind the last tap of a line of taps ...
  int64_t next_pass = 0;      // ... and then behind the last line
  uint32_t copy = 0;          // from one copy of a thread to its next one in the same chunk, in units of 16 bytes
  int rows = 0, row_bytes = 0;
  int chunk = 0, log2_vectors = 0;  // a row's part of a chunk: bytes; log2 of its number of 16-byte vectors
  int passes = 0, taps_h = 1, taps_w = 1;
};

struct LeanParams {
  FactorStream in_factor, core, out_factor;
  uint32_t input_stride[3] = {}, output_stride[3] = {};  // n, h, w in units of 16 bytes
};

// Whether offsets within a tile of `positions` (n, h, w), in units of 16 bytes, fit into 32 bits.
inline bool fits_32_bits(const int64_t (&stride)[4], const int64_t (&positions)[3], int element) {
  constexpr int64_t limit = int64_t(kVectorBytes) << 31;
  int64_t left = limit / element;
  for (int axis = 0; axis < 3; ++axis) {
    const int64_t step = stride[axis == 0 ? 0 : axis + 1];
    if (positions[axis] > 1 && step > left / (positions[axis] - 1)) return false;
    if (positions[axis] > 1) left -= step * (positions[axis] - 1);
  }
  return left >= 0;
}

inline bool is_common_case(const BlockParams& p, bool has_core, int element) {
  const Geometry& g = p.geometry;
  const bool vectors = p.input_stride[1] == 1 && p.output_stride[1] == 1 && p.input_vector == kVectorBytes &&
                       p.output_vector == kVectorBytes && p.in_factor.vector == kVectorBytes &&
                       p.out_factor.vector == kVectorBytes && (!has_core || p.core.vector == kVectorBytes);
  const bool bias = p.bias == nullptr || reinterpret_cast<uintptr_t>(p.bias) % kVectorBytes == 0;
  const int images = least(g.n, g.tile_n);
  const int64_t halo[3] = {images, least(g.rows.in, (g.rows.halo() - 1) * g.rows.unit + 1),
                           least(g.columns.in, (g.columns.halo() - 1) * g.columns.unit + 1)};
  const int64_t tile[3] = {images, least(g.rows.out, (g.rows.tile - 1) * g.rows.lattice + 1),
                           least(g.columns.out, (g.columns.tile - 1) * g.columns.lattice + 1)};
  const auto row_fits = [&](const Factor& factor) {
    return factor.row_stride * element < (int64_t(kVectorBytes) << 20);  // with 512 rows an offset fits into 32 bits
  };
  return vectors && bias && fits_32_bits(p.input_stride, halo, element) &&
         fits_32_bits(p.output_stride, tile, element) && row_fits(p.in_factor) && row_fits(p.out_factor) &&
         (!has_core || row_fits(p.core));
}

// The stream of a factor of `rows` rows of `row_bytes` bytes, `chunk` bytes per row and chunk.
inline FactorStream factor_stream(const Factor& factor, int rows, int row_bytes, int chunk, int taps_h, int taps_w,
                                  const Config& config, int element) {
  FactorStream f;
  f.data = static_cast<const unsigned char*>(factor.data);
  f.row = factor.row_stride * element;
  f.rows = rows;
  f.row_bytes = row_bytes;
  f.chunk = chunk;
  while (kVectorBytes << f.log2_vectors < chunk) ++f.log2_vectors;
  f.copy = uint32_t(f.row / kVectorBytes * (config.threads() >> f.log2_vectors));
  f.passes = int(ceil_div(rows, config.columns()));
  f.taps_h = taps_h;
  f.taps_w = taps_w;
  const int64_t tap_line = taps_h > 1 ? factor.tap_stride[0] * element : 0;
  const int64_t tap = taps_w > 1 ? factor.tap_stride[1] * element : 0;
  f.next_tap = tap - round_up(row_bytes, chunk);
  f.next_tap_line = tap_line - taps_w * tap;
  f.next_pass = config.columns() * f.row - taps_h * tap_line;
  return f;
}

inline LeanParams lean_params(const BlockParams& p, const SharedLayout& l, const Config& config, bool has_core,
                              int element) {
  const Geometry& g = p.geometry;
  LeanParams lean;
  lean.in_factor = factor_stream(p.in_factor, g.r1, g.s * element, kInputChunkBytes, 1, 1, config, element);
  if (has_core)
    lean.core =
        factor_stream(p.core, g.r2, g.r1 * element, l.core_chunk, g.rows.kernel, g.columns.kernel, config, element);
  lean.out_factor = factor_stream(p.out_factor, g.t, g.r2 * element, l.out_chunk, 1, 1, config, element);
  for (int axis = 0; axis < 3; ++axis) {
    const int from = axis == 0 ? 0 : axis + 1;
    lean.input_stride[axis] = uint32_t(p.input_stride[from] * element / kVectorBytes);
    lean.output_stride[axis] = uint32_t(p.output_stride[from] * element / kVectorBytes);
  }
  return lean;
}

}  // namespace lowrank_ops
