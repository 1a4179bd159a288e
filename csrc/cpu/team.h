// How the threads of a call divide one stage of a tile. Where tiles are few, the tiles run one after the other and each
// stage is cut into shares: a thread takes some panels of the stage's output channels, and some of its pixels where
// panels alone do not divide evenly. Each output is one sum, in one thread: the cuts change no bit of a result.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

#include "cpu/brgemm.h"

namespace lowrank_ops {

constexpr int64_t kFewestPixels = 7;  // of a cut row: the rows of a register block, for fewer a panel is read in vain

// What one of `count` threads does of a stage.
struct Share {
  int64_t index = 0, count = 1;

  // Calls body(panel, row, first, pixels) for this share of `panels` x `rows` rows of `pixels` pixels, panel by panel.
  // Rows are cut, into pieces of at least `fewest` pixels, only where whole ones do not divide evenly.
  template <typename Body>
  void pieces(int64_t panels, int64_t rows, int64_t pixels, int64_t fewest, const Body& body) const {
    int64_t parts = 1;  // of a row
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

class Team {
 public:
  explicit Team(int64_t threads) : threads_(threads) {}
  int64_t threads() const { return threads_; }
  // Calls stage(share) for all shares at once and waits for them. Right for any number of threads that really come.
  template <typename Stage>
  void run(const Stage& stage) const {
    if (threads_ == 1) return stage(Share{});
    at::parallel_for(0, threads_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) stage(Share{index, threads_});
      brgemm_release();
    });
  }

 private:
  int64_t threads_;
};

}  // namespace lowrank_ops
