// From global to shared memory: 16 bytes at a time, in copies as wide as pointers and strides allow.
#pragma once

#include "cuda/kernels/engine_simt.cuh"
#include "cuda/kernels/primitives.cuh"

namespace lowrank_ops {

// Copies elements source[0], source[stride], ... to 16 bytes of shared memory, in copies of less than 16; those from
// `count` on become zeros. `width` is BlockParams' vector of the tensor: copies of 8 or 4 bytes are asynchronous, and
// count is then a multiple of what one of them takes; 2-byte elements that lie apart pass through registers.
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

// The row that a thread copies to: `index` counts rows of `1 << log2_vectors` vectors of 16 bytes, one more apart.
// Taking neighbouring rows, eight threads with 2 or 4 vectors a row would meet in some banks; rows 2 or 4 apart do not.
LOWRANK_OPS_DEVICE int spread_rows(int index, int log2_vectors) {
  if (log2_vectors == 2) return (index & ~7) | (index & 1) << 2 | (index & 6) >> 1;
  if (log2_vectors == 1) return (index & ~7) | (index & 3) << 1 | (index & 4) >> 2;
  return index;
}

// A chunk of a factor: `rows` rows from `first_row` on, `1 << log2_bytes` bytes of columns from `first_column` on, of
// those the first `used_bytes`. Rows and columns outside the factor become zeros.
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
