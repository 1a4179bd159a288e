// The tensor cores: matrix descriptors and wgmma for N = 64, 128, 256; mma.sync and ldmatrix.
#pragma once

#include <cstdint>

#include "device.cuh"

namespace hopper {

// Layouts of a matrix in shared memory, as bits 62 and 63 of its descriptor say.
constexpr uint64_t kNoSwizzle = 0, kSwizzle128 = 1;

// The descriptor of a K-major matrix. Rows come in groups of 8, and K in steps of 16 bytes:
// `stride` is the distance in bytes between groups of rows, `leading` the one between steps of K (without effect with
// the 128-byte swizzle), `base` the field "base offset" for matrices that do not start at a multiple of 1024 bytes.
DEVICE uint64_t descriptor(uint32_t start, uint32_t leading, uint32_t stride, uint64_t layout, uint32_t base = 0) {
  return uint64_t((start & 0x3FFFF) >> 4) | uint64_t((leading & 0x3FFFF) >> 4) << 16 |
         uint64_t((stride & 0x3FFFF) >> 4) << 32 | uint64_t(base & 7) << 49 | layout << 62;
}

// The descriptor of the matrix that lies `steps` x 16 bytes further on. Only the low half changes, by one instruction.
DEVICE uint64_t advance(uint64_t matrix, int steps) {
  return (matrix & 0xFFFFFFFF00000000) | (uint32_t(matrix) + uint32_t(steps));
}

DEVICE void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
DEVICE void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int pending>
DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// Keeps the compiler from moving reads and writes of the sums across this point.
template <int count>
DEVICE void pin(float (&sums)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// wgmma m64nNk16, bf16, K-major A and B: sums += A B, with A from shared memory or from registers.
// Warp w holds rows 16 w to 16 w + 15. A lane's sums 4 j and 4 j + 1 are of row lane / 4, sums 4 j + 2 and 4 j + 3 of
// row lane / 4 + 8; in both rows they are columns 8 j + lane % 4 * 2 and the next.
// clang-format off
#define SUMS4(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define SUMS16(i) SUMS4(i), SUMS4(i + 4), SUMS4(i + 8), SUMS4(i + 12)
#define SUMS32(i) SUMS16(i), SUMS16(i + 16)
#define SUMS64(i) SUMS32(i), SUMS32(i + 32)
#define SUMS128(i) SUMS64(i), SUMS64(i + 64)
#define PLACES32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define PLACES64 PLACES32 "," \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define PLACES128 PLACES64 "," \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95" "," \
  "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define WGMMA(N, PLACES, SUMS, P0, P1, P2, P3, P4)                                                                    \
  DEVICE void wgmma(float (&sums)[N / 2], uint64_t a, uint64_t b) {                                                    \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" PLACES "}, " P0 ", " P1                  \
                 ", 1, 1, 1, 0, 0;" : SUMS(0) : "l"(a), "l"(b));                                                       \
  }                                                                                                                    \
  DEVICE void wgmma(float (&sums)[N / 2], const uint32_t (&a)[4], uint64_t b) {                                        \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" PLACES "}, {" P0 ", " P1 ", " P2         \
                 ", " P3 "}, " P4 ", 1, 1, 1, 0;" : SUMS(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));     \
  }
WGMMA(64, PLACES32, SUMS32, "%32", "%33", "%34", "%35", "%36")
WGMMA(128, PLACES64, SUMS64, "%64", "%65", "%66", "%67", "%68")
WGMMA(256, PLACES128, SUMS128, "%128", "%129", "%130", "%131", "%132")
// clang-format on

// mma.sync m16n8k16: sum += a b. Not volatile, so that the compiler may move it among the loads of other operands.
DEVICE void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// ldmatrix of four 8x8 matrices.
DEVICE void load_matrices(uint32_t (&matrices)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(row));
}

}  // namespace hopper
