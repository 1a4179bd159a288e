// The cost of waiting: barriers of the grid, of clusters and in shared memory, copies shared by a cluster, launches.
#include <algorithm>
#include <string>

#include "host.cuh"
#include "tma.cuh"

namespace hopper {
namespace {

// A barrier of all CTAs: one thread of each adds to a counter and waits until all have done so.
__global__ void __launch_bounds__(128, 1) grid_barrier_kernel(unsigned* counter, int iterations) {
  for (int i = 1; i <= iterations; ++i) {
    __syncthreads();
    if (threadIdx.x == 0) {
      asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
      unsigned seen = 0;
      for (int tries = 0; seen < unsigned(i) * gridDim.x; ++tries) {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
        if (tries > (1 << 22)) __trap();
      }
    }
    __syncthreads();
  }
}

}  // namespace

void test_latencies_grid() {
  unsigned* counter = allocate<unsigned>(1);
  constexpr int kIterations = 2000;
  Launch how{multiprocessors(), 128};
  how.cooperative = true;
  const double ms = median_ms([&] {
    CHECK(cudaMemsetAsync(counter, 0, 4));
    launch(how, grid_barrier_kernel, counter, kIterations);
  });
  report.number("ctas", how.ctas);
  report.number("grid_barrier_ns", ms * 1e6 / kIterations);
}

namespace {

template <bool relaxed>
__global__ void __launch_bounds__(128) cluster_barrier_kernel(long long* clocks, int iterations) {
  cluster_barrier();
  const long long start = clock64();
  for (int i = 0; i < iterations; ++i)
    if constexpr (relaxed)
      cluster_barrier_relaxed();
    else
      cluster_barrier();
  if (threadIdx.x == 0) clocks[blockIdx.x] = clock64() - start;
}

// Threads write to (or read from) the shared memory of the CTA of rank own ^ other: 64 KB per iteration, 16 bytes per
// thread at a time.
DEVICE void write_remote(uint32_t remote, int iterations) {
  for (int i = 0; i < iterations; ++i) {
#pragma unroll
    for (int part = 0; part < 8; ++part) {
      const uint32_t address = remote + threadIdx.x * 16 + part * 8192;
      asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(i) : "memory");
    }
  }
}
// The place in the 64 KB moves on by 512 bytes per iteration: with equal addresses in all iterations the assembler
// would move the loads out of the loop, `volatile` or not.
DEVICE uint32_t read_remote(uint32_t remote, int iterations) {
  uint32_t sum = 0, place = threadIdx.x * 16;
#pragma unroll 1
  for (int i = 0; i < iterations; ++i) {
#pragma unroll
    for (int part = 0; part < 8; ++part) {
      uint32_t word[4];
      asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                   : "r"(remote + place + part * 8192)
                   : "memory");
      sum += word[0] ^ word[1] ^ word[2] ^ word[3];
    }
    place = (place + 512) % 8192;
  }
  return sum;
}

template <bool store>
__global__ void __launch_bounds__(512) remote_kernel(uint32_t* sink, long long* clocks, int iterations, int other) {
  const uint32_t base = shared_base();
  for (int i = int(threadIdx.x); i < 4096; i += 512) store_shared(base + i * 16, make_uint4(i, i, i, i));
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(base), "r"(cluster_rank() ^ other));
  cluster_barrier();
  uint32_t sum = 0;
  const long long start = clock64();
  if constexpr (store)
    write_remote(remote, iterations);
  else
    sum = read_remote(remote, iterations);
  cluster_barrier();  // before this, others use the memory of this CTA, and stores may be under way
  if (threadIdx.x == 0) clocks[blockIdx.x] = clock64() - start;
  sink[blockIdx.x * 512 + threadIdx.x] = sum;
}

template <bool store>
void remote_rate(const std::string& key, int other, long long* clocks, uint32_t* sink) {
  attempt(key, [&] {
    constexpr int kIterations = 1000;
    Launch how{multiprocessors() / 2 * 2, 512, kOneCta, 2};
    how.ctas = std::min(how.ctas, resident_ctas(how, remote_kernel<store>));
    const double ms = median_ms([&] { launch(how, remote_kernel<store>, sink, clocks, kIterations, other); });
    const double bytes = 65536.0 * kIterations;  // per CTA
    report.number(key + "_gbps_per_sm", bytes / ms * 1e-6);
    report.number(key + "_bytes_per_clk", bytes / mean(clocks, how.ctas));
  });
}

}  // namespace

void test_latencies_cluster() {
  long long* clocks = allocate<long long>(256);
  uint32_t* sink = allocate<uint32_t>(256 * 512);
  for (int size : {2, 4})
    for (const bool relaxed : {false, true}) {
      const std::string key = "cluster_barrier_" + std::to_string(size) + (relaxed ? "_relaxed" : "");
      attempt(key, [&] {
        constexpr int kIterations = 5000;
        const auto kernel = relaxed ? cluster_barrier_kernel<true> : cluster_barrier_kernel<false>;
        Launch how{multiprocessors() / size * size, 128, kOneCta, size};
        how.ctas = std::min(how.ctas, resident_ctas(how, kernel));
        const double ms = median_ms([&] { launch(how, kernel, clocks, kIterations); });
        report.number(key + "_ctas", how.ctas);
        report.number(key + "_ns", ms * 1e6 / kIterations);
        report.number(key + "_clk", mean(clocks, how.ctas) / kIterations);
      });
    }
  remote_rate<false>("remote_read", 1, clocks, sink);
  remote_rate<true>("remote_write", 1, clocks, sink);
  remote_rate<false>("own_read_by_cluster_address", 0, clocks, sink);
  remote_rate<true>("own_write_by_cluster_address", 0, clocks, sink);
}

namespace {

// Warp 0 tells warp 1 that a buffer is full, and warp 1 answers that it is empty: two arrivals and two waits.
__global__ void __launch_bounds__(64) round_trip_kernel(long long* clocks, int iterations) {
  const uint32_t full = shared_base(), empty = full + 8;
  if (threadIdx.x == 0) {
    barrier_init(full, 1);
    barrier_init(empty, 1);
    barrier_init_done();
  }
  __syncthreads();
  const long long start = clock64();
  if (threadIdx.x == 0) {
    for (int i = 0; i < iterations; ++i) {
      barrier_arrive(full);
      barrier_wait(empty, i % 2);
    }
    clocks[blockIdx.x] = clock64() - start;
  } else if (threadIdx.x == 32) {
    for (int i = 0; i < iterations; ++i) {
      barrier_wait(full, i % 2);
      barrier_arrive(empty);
    }
  }
}

// The same between two CTAs of a cluster: each arrives at the barrier of the other.
__global__ void __launch_bounds__(64) remote_round_trip_kernel(long long* clocks, int iterations) {
  const uint32_t barrier = shared_base(), rank = cluster_rank();
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barrier_init_done();
  }
  cluster_barrier();
  if (threadIdx.x == 0) {
    const long long start = clock64();
    for (int i = 0; i < iterations; ++i) {
      if (rank == 0) barrier_arrive_at(barrier, 1);
      barrier_wait(barrier, i % 2);
      if (rank == 1) barrier_arrive_at(barrier, 0);
    }
    clocks[blockIdx.x] = clock64() - start;
  }
  __syncthreads();
  cluster_barrier();
}

}  // namespace

void test_latencies_mbarrier() {
  constexpr int kIterations = 10000;
  const int sms = multiprocessors();
  long long* clocks = allocate<long long>(size_t(sms));
  const double ms = median_ms([&] { launch({sms, 64, kOneCta}, round_trip_kernel, clocks, kIterations); });
  report.number("round_trip_ns", ms * 1e6 / kIterations);
  report.number("round_trip_clk", mean(clocks, sms) / kIterations);
  attempt("remote_round_trip", [&] {
    Launch how{sms / 2 * 2, 64, kOneCta, 2};
    how.ctas = std::min(how.ctas, resident_ctas(how, remote_round_trip_kernel));
    const double remote_ms = median_ms([&] { launch(how, remote_round_trip_kernel, clocks, kIterations); });
    report.number("remote_round_trip_ns", remote_ms * 1e6 / kIterations);
    report.number("remote_round_trip_clk", mean(clocks, how.ctas) / kIterations);
  });
}

namespace {

// All CTAs of a cluster need the same blocks of 32 KB. With `multicast` each CTA copies its part of a block to all of
// them; without, each copies the whole block for itself.
constexpr int kBlock = 32 * 1024, kSlots = 4;

template <bool multicast>
__global__ void __launch_bounds__(64, 1)
    multicast_kernel(const unsigned char* source, int tiles, int iterations, int size, unsigned* differences) {
  const uint32_t base = shared_base(), full = base + kSlots * kBlock, empty = full + kSlots * 8;
  const uint32_t rank = cluster_rank();
  const int group = int(blockIdx.x) / size, groups = int(gridDim.x) / size;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kSlots; ++i) {
      barrier_init(full + i * 8, 1);
      barrier_init(empty + i * 8, multicast ? size : 1);
    }
    barrier_init_done();
  }
  cluster_barrier();
  if (threadIdx.x == 0) {  // producer: a slot is free when every CTA that receives the copy has read it
    const int share = multicast ? kBlock / size : kBlock, offset = multicast ? int(rank) * share : 0;
    for (int i = 0; i < iterations; ++i) {
      const int slot = i % kSlots;
      if (i >= kSlots) barrier_wait(empty + slot * 8, (i / kSlots - 1) % 2);
      barrier_expect(full + slot * 8, kBlock);
      const unsigned char* from = source + size_t((group + i * groups) % tiles) * kBlock + offset;
      const uint32_t to = base + slot * kBlock + offset;
      if constexpr (multicast)
        bulk_load_to(to, from, share, full + slot * 8, uint16_t((1 << size) - 1));
      else
        bulk_load(to, from, share, full + slot * 8);
    }
  } else if (threadIdx.x == 32) {  // consumer
    for (int i = 0; i < iterations; ++i) {
      const int slot = i % kSlots;
      barrier_wait(full + slot * 8, i / kSlots % 2);
      if constexpr (multicast)
        for (int to = 0; to < size; ++to) barrier_arrive_at(empty + slot * 8, to);
      else
        barrier_arrive(empty + slot * 8);
    }
  }
  __syncthreads();
  // Every thread waits for the last phase itself, so that it sees the copied data.
  const int last = iterations - 1;
  barrier_wait(full + last % kSlots * 8, last / kSlots % 2);
  const uint4* expected = reinterpret_cast<const uint4*>(source + size_t((group + last * groups) % tiles) * kBlock);
  const uint4* got = reinterpret_cast<const uint4*>(shared_memory + last % kSlots * kBlock);
  unsigned wrong = 0;
  for (int i = int(threadIdx.x); i < kBlock / 16; i += 64)
    wrong += got[i].x != expected[i].x || got[i].w != expected[i].w;
  if (wrong) atomicAdd(differences, wrong);
  cluster_barrier();  // no CTA ends while others copy to or arrive at its memory
}

template <bool multicast>
void multicast_rate(int size, const unsigned char* source, int tiles) {
  const std::string key = (multicast ? "multicast_" : "separate_") + std::to_string(size);
  attempt(key, [&] {
    constexpr int kIterations = 400;
    unsigned* differences = allocate<unsigned>(1);
    Launch how{multiprocessors() / size * size, 64, kSlots * kBlock + 1024, size};
    how.ctas = std::min(how.ctas, resident_ctas(how, multicast_kernel<multicast>));
    const double ms =
        median_ms([&] { launch(how, multicast_kernel<multicast>, source, tiles, kIterations, size, differences); });
    const unsigned wrong = download(differences, 1)[0];
    if (wrong) report.wrong();
    report.number(key + "_ctas", how.ctas);
    report.number(key + "_differences", wrong);
    report.number(key + "_arrived_gbps", double(how.ctas) * kIterations * kBlock / ms * 1e-6);
  });
}

}  // namespace

void test_latencies_multicast() {
  constexpr int kTiles = 512;  // 16 MB
  const auto source = upload(random_bf16(size_t(kTiles) * kBlock / 2, 7));
  const unsigned char* bytes = reinterpret_cast<const unsigned char*>(source);
  multicast_rate<false>(1, bytes, kTiles);
  multicast_rate<false>(2, bytes, kTiles);
  multicast_rate<true>(2, bytes, kTiles);
  multicast_rate<false>(4, bytes, kTiles);
  multicast_rate<true>(4, bytes, kTiles);
}

namespace {

__global__ void empty_kernel() {}
__global__ void dependent_kernel() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

}  // namespace

void test_latencies_launch() {
  constexpr int kLaunches = 200;
  for (const bool dependent : {false, true})
    for (const bool graph : {false, true}) {
      const std::string key = std::string(dependent ? "dependent" : "plain") + (graph ? "_graph" : "_stream");
      attempt(key, [&] {
        Launch how{multiprocessors(), 128};
        how.dependent = dependent;
        CHECK(cudaStreamCreateWithFlags(&how.stream, cudaStreamNonBlocking));
        const auto launches = [&] {
          for (int i = 0; i < kLaunches; ++i) launch(how, dependent ? dependent_kernel : empty_kernel);
        };
        double ms = 0;
        if (graph) {
          launch(how, dependent ? dependent_kernel : empty_kernel);  // loads the kernel before the capture
          CHECK(cudaStreamSynchronize(how.stream));
          cudaGraph_t captured;
          cudaGraphExec_t executable;
          CHECK(cudaStreamBeginCapture(how.stream, cudaStreamCaptureModeThreadLocal));
          launches();
          CHECK(cudaStreamEndCapture(how.stream, &captured));
          CHECK(cudaGraphInstantiate(&executable, captured, 0));
          ms = median_ms([&] { CHECK(cudaGraphLaunch(executable, how.stream)); }, 7, how.stream);
        } else {
          ms = median_ms(launches, 7, how.stream);
        }
        report.number(key + "_ns", ms * 1e6 / kLaunches);
      });
    }
}

}  // namespace hopper
