// The emulator's program: one image through the variants of a block.
#pragma once

#include "numbers.cuh"

namespace hopper {

// One CTA.
template <class Arguments>
void emulate_cta(const Variant<Arguments>& what, const Arguments& arguments, int block) {
  blockIdx.x = block;
  std::memset(shared_storage, 0xFF, sizeof shared_storage);
  mbarriers.clear();
  pthread_barrier_init(&cta_barrier, nullptr, unsigned(what.threads));
  pthread_barrier_init(&two_groups, nullptr, 256);
  for (auto& barrier : warp_barriers) pthread_barrier_init(&barrier, nullptr, 32);
  for (auto& barrier : group_barriers) pthread_barrier_init(&barrier, nullptr, 128);
  std::vector<std::thread> threads;
  for (int i = 0; i < what.threads; ++i)
    threads.emplace_back([&, i] {
      threadIdx.x = i;
      what.kernel(arguments);
    });
  for (std::thread& thread : threads) thread.join();
}

template <class Block>
int run_block(int count, char** names) {
  constexpr int kCtas = 4;
  const typename Block::Factors factors;
  std::vector<uint16_t> input(kImageValues);
  for (size_t i = 0; i < kImageValues; ++i) input[i] = high_half(input_value(uint32_t(i)));
  std::vector<float> expected(kImageValues);
  Block::reference(factors, 0, 0, kSize, expected.data());
  uint16_t* const output = static_cast<uint16_t*>(std::aligned_alloc(256, kImageValues * 2));
  std::vector<uint32_t> profile(kCtas * 4 * 8);
  const auto keep = [](const auto& values) { return values.data(); };
  const auto arguments = Block::arguments(factors, keep, input.data(), output, 1, profile.data());
  int wrong = 0;
  for (const auto& what : Block::variants()) {
    if (count > 1 ? std::strcmp(names[1], what.name) != 0 : !what.right) continue;
    std::memset(output, 0xFF, kImageValues * 2);
    gridDim.x = kCtas;
    for (int block = 0; block < kCtas; ++block) emulate_cta(what, arguments, block);
    Errors errors;
    for (size_t i = 0; i < kImageValues; ++i) errors.add(output[i], expected[i]);
    const auto unwritten = std::count(output, output + kImageValues, uint16_t(0xFFFF));
    const bool right = errors.right() && unwritten == 0;
    wrong += !right;
    std::printf("%-24s %s, errors: largest %.3g, Frobenius %.3g, bad %lld, differing %lld of %lld, unwritten %lld\n",
                what.name, right ? "right" : "WRONG", errors.max_error(), errors.frobenius(), errors.bad,
                errors.differing, errors.values, static_cast<long long>(unwritten));
    std::fflush(stdout);
  }
  std::free(output);
  return wrong > 0;
}

}  // namespace hopper
