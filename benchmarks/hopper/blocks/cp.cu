// The fused CP block for Hopper (sm_90a) with TMA and wgmma, without torch: its variants and what they cost.
//
//   nvcc -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a -o build/hopper_cp benchmarks/hopper/blocks/cp.cu
//   build/hopper_cp [--seconds S] [NAME]     all variants, or those whose names begin with NAME; --list names them
//
// ptxas notes C7519, "warpgroup.arrive is injected", once a kernel: it costs an instruction and nothing is serialised.
//
// emulator.h says how to run the kernels without a GPU. cp_block.cuh states the problem, cp_layout.cuh draws the
// kernel.
//
// Measured on an NVIDIA H200 (nvcc 13.0, driver 580), in us, with a clean L2 (flushed by reading) and with a dirty one
// (flushed by writing); all variants that compute the block were right. The chain with merged depthwise stages: 186 us.
//
//                               clean  dirty
//   cp_rolled                     100    101   its parts unrolled (dropped): 97 and 98
//   cp_rolled_no_prefetch          97     98
//   cp_rolled_no_load_no_store     90     91
//   cp_rolled_no_depthwise         64     65
//   cp_rolled_no_stage3            56     58
//
// So it waits for its depthwise stage, on the ordinary cores, and not for memory.
#include "cp_kernel.cuh"
#ifdef EMULATE
#include "emulate.h"
#else
#include "harness.cuh"
#endif

namespace hopper::cp {

// clang-format off
struct NoPrefetch : Plan { static constexpr bool prefetch = false; };
struct NoDepthwise : Plan { static constexpr int skip = kDepthwise; };
struct NoLoadNoStore : Plan { static constexpr int skip = kStore | kInput; };
struct NoStage3 : Plan { static constexpr int skip = kStage3; };
// clang-format on

template <class P>
Variant<Arguments> variant(const char* name) {
  return {name, cp_kernel<P>, kThreads, kSharedBytes, P::skip == 0};
}

// What the harness and the emulator need to know.
struct Block {
  using Factors = cp::Factors;
  using Arguments = cp::Arguments;
  static std::vector<Variant<Arguments>> variants() {
    return {
        variant<Plan>("cp_rolled"),
        variant<NoPrefetch>("cp_rolled_no_prefetch"),
        variant<NoDepthwise>("cp_rolled_no_depthwise"),
        variant<NoLoadNoStore>("cp_rolled_no_load_no_store"),
        variant<NoStage3>("cp_rolled_no_stage3"),
    };
  }
  template <class Keep>
  static Arguments arguments(const Factors& factors, Keep keep, const uint16_t* input, uint16_t* output, int images,
                             uint32_t*) {
    return make_arguments(factors, keep, input, output, images);
  }
  static void reference(const Factors& factors, int image, int first, int last, float* out) {
    reference_rows(factors, image, first, last, out);
  }
};

}  // namespace hopper::cp

int main(int count, char** arguments) {
  return hopper::run_block<hopper::cp::Block>(count, arguments);
}
