// Copies from global to shared memory, as wide as pointers and strides allow (at most 16 bytes).
#pragma once

#include "cuda/kernels/engine_simt.cuh"
#include "cuda/kernels/primitives.cuh"

namespace lowrank_ops {

// Copies elements source[0], source[stride], ... to 16 bytes of shared memory by copies of less than 16 bytes; elements
// from number `count` on become zeros. `width` is the tensor's `vector` in BlockParams. Copies of 8 or 4 bytes are
// asynchronous, and `count` is then a multiple of the elements of one copy. 2-byte elements that lie apart pass through
// registers.
template <typename Element>
LOWRANK_OPS_DEVICE void copy_vector(unsigned char* shared, const Element* source, int64_t stride, int count,
                                    int width) {
  constexpr int size = Vector<Element>::size;
  if (width == 8) {
    constexpr int elements = 8 / int(sizeof(Element));
#pragma unroll
    for (int i = 0; i < 2; ++i)
      copy_async<8>(shared + 8 * i, i * elements < count ? source + i * elements * stride : source,
                    i * elements < count);
  } else if (width == 4 && sizeof(Element) <= 4) {
    constexpr int elements = sizeof(Element) <= 4 ? 4 / int(sizeof(Element)) : 1;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      copy_async<4>(shared + 4 * i, i * elements < count ? source + i * elements * stride : source,
                    i * elements < count);
  } else {
    Vector<Element> loaded;
#pragma unroll
    for (int i = 0; i < size; ++i) loaded.value[i] = i < count ? load_global<Element>(source + i * stride) : Element{};
    store_shared(shared, loaded);
  }
}

// The row of shared memory that a thread copies to, number `index` in the order of the threads; a row has `1 <<
// log2_vectors` vectors of 16 bytes and one of padding. With 2 or 4 vectors per row, eight threads that took
// neighbouring rows would meet in some banks; in rows 2 or 4 apart they do not.
LOWRANK_OPS_DEVICE int spread_rows(int index, int log2_vectors) {
  if (log2_vectors == 2) return (index & ~7) | (index & 1) << 2 | (index & 6) >> 1;
  if (log2_vectors == 1) return (index & ~7) | (index & 3) << 1 | (index & 4) >> 2;
  return index;
}

// Copies a chunk of a factor: `rows` rows from `first_row` on, and of each row `1 << log2_bytes` bytes from column
// `first_column` on, of which only the first `used_bytes` are read. Rows and columns outside the factor become zeros.
template <typename Element>
LOWRANK_OPS_DEVICE void copy_factor(unsigned char* shared, const Factor& factor, int64_t tap_offset, int first_row,
                                    int rows, int all_rows, int first_column, int all_columns, int log2_bytes,
                                    int used_bytes, int thread, int threads) {
  const Element* data = static_cast<const Element*>(factor.data) + tap_offset;
  const int log2_vectors = log2_bytes - 4, stride = (1 << log2_bytes) + kVectorBytes;
  const auto copy = [&](int i, auto copy_row) {
    const int row = spread_rows(i >> log2_vectors, log2_vectors), byte = (i & ((1 << log2_vectors) - 1)) * kVectorBytes;
    const int column = first_column + byte / int(sizeof(Element));
    const bool inside = first_row + row < all_rows && column < all_columns;
    const int64_t offset = inside ? (first_row + row) * factor.row_stride + column * factor.column_stride : 0;
    if (byte < used_bytes) copy_row(shared + row * stride + byte, data + offset, inside ? all_columns - column : 0);
  };
  if (factor.vector == kVectorBytes) {
#pragma unroll 4
    for (int i = thread; i < rows << log2_vectors; i += threads)
      copy(i, [](unsigned char* to, const Element* from, int count) { copy_async<kVectorBytes>(to, from, count > 0); });
  } else {
#pragma unroll 1
    for (int i = thread; i < rows << log2_vectors; i += threads)
      copy(i, [&](unsigned char* to, const Element* from, int count) {
        copy_vector(to, from, factor.column_stride, count, factor.vector);
      });
  }
}

}  // namespace lowrank_ops
