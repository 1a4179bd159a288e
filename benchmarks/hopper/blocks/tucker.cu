// The fused Tucker-2 block for Hopper (sm_90a) with TMA and wgmma, without torch: its variants and what they cost.
//
//   nvcc -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a -o build/hopper_tucker benchmarks/hopper/blocks/tucker.cu
//   build/hopper_tucker [--seconds S] [NAME]     all variants, or those whose names begin with NAME; --list names them
//
// emulator.h says how to run the kernels without a GPU. tucker_block.cuh states the problem, tucker_layout.cuh draws
// the kernel.
//
// Measured on an NVIDIA H200 (nvcc 13.0, driver 580), in us, with a clean L2 (flushed by reading) and with a dirty one
// (flushed by writing); all variants that compute the block were right. cuDNN's chain of three convolutions: 136 us.
//
//                             clean  dirty
//   simple                    136.5  138.2
//   g2_s5                      32.4   34.5
//   g3_s4                      31.2   35.5
//   g2_s7_registers            33.8   34.9
//   g3_s6_registers            32.7   35.1
//   g2_s4_tma_store            32.0   35.7
//   g1_s5                      36.1   37.9
//   g2_s5_only_copies          28.9   32.2   no products: loads, barriers, stores
//   g2_s5_no_load_no_store     26.6   27.2   products and barriers
//   g2_s5_no_store             27.6   28.6
//   g2_s5_no_load              31.8   32.3
//   g2_s5_no_stage2            29.6   33.8
//   g2_s5_no_overlap_profile   32.1   34.6   clocks per tile: wait 772, stage 1 1636, hidden 358, stage 2 1444,
//                                            stage 3 3715
//   g3_s4_profile              31.3   35.6   wait 4780, stage 1 1700, hidden 339, stage 2 1420, stage 3 3571
//
// So copies alone take nine tenths of the time and products alone eight: both are near what the whole takes. An empty
// kernel takes 2.8 of each. Tried and dropped, as none was faster by more than the noise: stage 1 as pixels times
// factor (g1 37.8, g2_s4 33.3; transposed g2_s4 32.3), 128 columns per product of stage 3 (32.2), streaming stores
// (32.8; g3 31.3), prefetching the next tile to L2 (34.1), g2_s5 without overlap in stage 3 (32.1).
#include "tucker_kernel.cuh"
#include "tucker_simple.cuh"
#ifdef EMULATE
#include "emulate.h"
#else
#include "harness.cuh"
#endif

namespace hopper::tucker {

// clang-format off
struct G1S5 : Plan { static constexpr int groups = 1; static constexpr int slots = 5; };
struct G2S5 : Plan { static constexpr int slots = 5; };
struct G3S4 : Plan { static constexpr int groups = 3; static constexpr bool overlap = false; };
struct G2Registers : Plan { static constexpr bool registers = true; static constexpr int slots = 7; };
struct G3Registers : G3S4 { static constexpr bool registers = true; static constexpr int slots = 6; };
struct G2TmaStore : Plan { static constexpr bool tma_store = true; };
struct OnlyCopies : G2S5 { static constexpr int skip = kStage1 | kStage2 | kStage3; };
struct NoLoadNoStore : G2S5 { static constexpr int skip = kStore | kLoad; };
struct NoStore : G2S5 { static constexpr int skip = kStore; };
struct NoLoad : G2S5 { static constexpr int skip = kLoad; };
struct NoStage2 : G2S5 { static constexpr int skip = kStage2; };
struct G2Profile : G2S5 { static constexpr bool overlap = false; static constexpr bool profile = true; };
struct G3Profile : G3S4 { static constexpr bool profile = true; };
// clang-format on

template <class P>
Variant<Arguments> variant(const char* name) {
  return {name, tucker_kernel<P>, Layout<P>::threads, Layout<P>::total, P::skip == 0, P::profile ? P::groups : 0};
}

// What the harness and the emulator need to know.
struct Block {
  using Factors = tucker::Factors;
  using Arguments = tucker::Arguments;
  static std::vector<Variant<Arguments>> variants() {
    return {
        {"simple", simple_kernel, 128, SimpleLayout::total, true},
        variant<G2S5>("g2_s5"),
        variant<G3S4>("g3_s4"),
        variant<G2Registers>("g2_s7_registers"),
        variant<G3Registers>("g3_s6_registers"),
        variant<G2TmaStore>("g2_s4_tma_store"),
        variant<G1S5>("g1_s5"),
        variant<OnlyCopies>("g2_s5_only_copies"),
        variant<NoLoadNoStore>("g2_s5_no_load_no_store"),
        variant<NoStore>("g2_s5_no_store"),
        variant<NoLoad>("g2_s5_no_load"),
        variant<NoStage2>("g2_s5_no_stage2"),
        variant<G2Profile>("g2_s5_no_overlap_profile"),
        variant<G3Profile>("g3_s4_profile"),
    };
  }
  template <class Keep>
  static Arguments arguments(const Factors& factors, Keep keep, const uint16_t* input, uint16_t* output, int images,
                             uint32_t* profile) {
    return make_arguments(factors, keep, input, output, images, profile);
  }
  static void reference(const Factors& factors, int image, int first, int last, float* out) {
    reference_rows(factors, image, first, last, out);
  }
};

}  // namespace hopper::tucker

int main(int count, char** arguments) {
  return hopper::run_block<hopper::tucker::Block>(count, arguments);
}
