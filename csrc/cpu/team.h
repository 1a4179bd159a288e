// How the threads of a call divide one stage of a tile. Where tiles are few, the tiles run one after the other and each
// stage is divided into shares: a thread takes some panels of the stage's output channels, and some of its pixels where
// panels alone do not divide evenly. Each output is one sum, in one thread: the division changes no bit of a result.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <thread>

#include "cpu/brgemm.h"

namespace lowrank_ops {

constexpr int64_t kFewestPixels =
    6;  // per piece of a divided row: one register block; smaller pieces waste a panel read

// The part of a stage that one of `count` threads computes.
struct Share {
  int64_t index = 0, count = 1;

  // Calls body(panel, row, first, pixels) for this share of `panels` x `rows` rows of `pixels` pixels, panel by panel.
  // Rows are divided, into pieces of at least `fewest` pixels, only where whole rows do not divide evenly.
  template <typename Body>
  void pieces(int64_t panels, int64_t rows, int64_t pixels, int64_t fewest, const Body& body) const {
    int64_t parts = 1;  // per row
    if (panels * rows % count != 0) {
      parts = std::max<int64_t>(1, pixels / fewest);
      if (parts > count) parts -= parts % count;
    }
    const int64_t units = panels * rows * parts, last = units * (index + 1) / count;
    for (int64_t unit = units * index / count; unit < last;) {
      const int64_t line = unit / parts, next = std::min(last, (line + 1) * parts);
      const int64_t first = pixels * (unit - line * parts) / parts;
      body(line / rows, line % rows, first, pixels * (next - line * parts) / parts - first);
      unit = next;
    }
  }
};

// One thread leads: it walks through the tasks and hands out stages; the others serve it. A call is one parallel
// region, because one region per stage would cost more than a small stage. Threads claim shares, so the leader waits
// only for shares that another thread has begun: a call ends, and is right, however many threads OpenMP really starts.
class Team {
 public:
  explicit Team(int64_t threads) : threads_(threads) {}
  int64_t threads() const { return threads_; }

  // Runs lead() on one thread, and the shares of the stages that it hands out on all.
  template <typename Lead>
  void call(const Lead& lead) {
    at::parallel_for(0, threads_, 1, [&](int64_t begin, int64_t) {
      if (begin > 0) return serve();
      struct Dismissal {  // also when lead() throws
        std::atomic<bool>& over;
        ~Dismissal() { over.store(true, std::memory_order_release); }
      } dismissal{over_};
      lead();
    });
  }

  // Calls stage(share) for all shares and waits for them. Called by the leader. When the leader's own share throws, it
  // drops the shares that no thread has begun and waits for the others, because they use `stage`.
  template <typename Stage>
  void run(const Stage& stage) {
    if (threads_ == 1) return stage(Share{});
    stage_ = &stage;
    run_share_ = [](const void* context, const Share& share) { (*static_cast<const Stage*>(context))(share); };
    finished_.store(0, std::memory_order_relaxed);
    next_.store(0, std::memory_order_release);
    const struct Completion {
      Team& team;
      ~Completion() {
        const int64_t begun = std::min(team.next_.exchange(kNoStage, std::memory_order_acq_rel), team.threads_);
        wait_until([&] { return team.finished_.load(std::memory_order_acquire) == begun; });
      }
    } completion{*this};
    work();
  }

 private:
  void serve() {
    const BrgemmScope products;
    wait_until([&] {
      if (next_.load(std::memory_order_relaxed) < threads_) work();
      return over_.load(std::memory_order_acquire);
    });
  }

  // The leader cannot hand out the next stage before a claimed share is finished: `stage_` stays that of the claim.
  void work() {
    for (int64_t index; (index = next_.fetch_add(1, std::memory_order_acq_rel)) < threads_;) {
      struct Finish {  // also when the stage throws
        std::atomic<int64_t>& finished;
        ~Finish() { finished.fetch_add(1, std::memory_order_release); }
      } finish{finished_};
      run_share_(stage_, Share{index, threads_});
    }
  }

  template <typename Condition>
  static void wait_until(const Condition& condition) {
    constexpr int kSpins = 2000;  // some ten microseconds; after that other processes may use the core
    for (int i = 0; !condition(); ++i) {
      if (i < kSpins)
        pause();
      else
        std::this_thread::yield();
    }
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  static constexpr int64_t kNoStage = std::numeric_limits<int32_t>::max();
  const int64_t threads_;
  const void* stage_ = nullptr;
  void (*run_share_)(const void* stage, const Share& share) = nullptr;
  // Each on its own cache line, because waiting threads read them all the time.
  alignas(64) std::atomic<int64_t> next_{kNoStage};  // the share to claim next; beyond the last: none
  alignas(64) std::atomic<int64_t> finished_{0};
  alignas(64) std::atomic<bool> over_{false};
};

}  // namespace lowrank_ops
