#include "plan/cpu/sharing.h"

#include <algorithm>
#include <cmath>

#include "plan/cpu/cost.h"

namespace lowrank_ops {

TileSizes::TileSizes(const Problem& p, const CpuCaps& caps)
    : converted(p.dtype == DType::kHalf || (p.dtype == DType::kBFloat16 && !caps.bfloat16_dot)),
      element(converted ? 4 : element_bytes(p.dtype)),
      sum(p.dtype == DType::kDouble ? 8 : 4),
      r1(round_up(p.r1, kAlign)),
      r2(round_up(p.r2, kAlign)) {}

namespace {

// CP's depthwise stages and Winograd's transforms read accumulators in whole vectors, or in a plane. Tucker's direct
// core reads elements, at most in pairs.
int64_t hidden_pixel_bytes(const Problem& p, const TileSizes& sizes, Winograd winograd) {
  if (p.op == Op::kCP && p.r1 == 1 && sizes.element == sizes.sum) return sizes.sum;
  if (p.op == Op::kCP || winograd != Winograd::kNone) return sizes.r1 * sizes.sum;
  return round_up(p.r1, int64_t(2)) * sizes.element;
}

bool copies_input(const Problem& p, const TileSizes& sizes) {
  const FirstStage way = first_stage(p);
  if (way == FirstStage::kPlanes) return false;
  return p.layout == Layout::kContiguous || (sizes.converted && way == FirstStage::kPanels);
}

}  // namespace

ConvScratch::ConvScratch(const Problem& p, const CpuCaps& caps, Winograd winograd)
    : sizes_(p, caps),
      rows_(row_axis(p)),
      columns_(column_axis(p)),
      patch_(patch_of(winograd)),
      tap_groups_(tap_groups(winograd, p.kw)),
      hidden_pixel_bytes_(hidden_pixel_bytes(p, sizes_, winograd)),
      tile_pixel_bytes_(sizes_.r2 * sizes_.element),
      // Rows that the kernel cannot read where they lie are copied, as is an output in NCHW.
      copied_channels_(copies_input(p, sizes_) ? round_up(p.s, kAlign) : 0),
      copied_columns_(p.layout == Layout::kContiguous ? 64 : 0) {
  if (spreads_plane(p, winograd, in_pairs(p, caps))) {
    tile_pixel_bytes_ = sizes_.element;
    copied_columns_ = 0;
  }
}

int64_t ConvScratch::operator()(int64_t tile_rows, int64_t tile_columns) const {
  const int64_t span = columns_.span(tile_columns), pixels = tile_rows * tile_columns;
  const int64_t patch_rows = ceil_div(tile_rows, patch_.rows), row_patches = ceil_div(tile_columns, patch_.columns);
  const int64_t inputs = patch_rows * (row_patches + tap_groups_ - 1);
  const int64_t places = patch_.places * (inputs * sizes_.r1 * sizes_.element +
                                          patch_rows * row_patches * std::min<int64_t>(sizes_.r2, 64) * sizes_.sum);
  const int64_t copied = span * copied_channels_ * sizes_.element + pixels * copied_columns_ * sizes_.sum;
  return places + rows_.span(tile_rows) * span * hidden_pixel_bytes_ + pixels * tile_pixel_bytes_ + copied;
}

namespace {

// Costs of thread coordination, in multiply-adds of one thread. Measured with two threads on Zen 4 and on Zen 5. Costs
// differ by a factor of five between two cores with a common L3 and two without, and on a virtual machine from one
// minute to the next. The figures are nearer to those of distant cores, where a wrong plan costs more. More threads
// were not measured: the functions below are upper bounds of how costs grow with them.
constexpr double kWait = 2e5;          // waiting for the other thread, with a margin for cores that other processes use
constexpr double kRegion = 2 * kWait;  // waking a thread and waiting for it
constexpr double kHandedOn = 80;       // reading an element that another core has just written: 0.1 to 0.9 ns
constexpr double kPacked = 13;         // packing an element of a factor
constexpr int64_t kPanelVectors = 4;   // per full panel

// One stage of a team: every thread changes two counters, to claim its share and to report that it is done, and only
// one thread can change a counter at a time.
double wait_of(int64_t threads) {
  return kWait * double(threads) / 2;
}
// A parallel region wakes its threads, and waits for them at the end, in rounds that double their number.
double region_of(int64_t threads) {
  return threads < 2 ? 0 : kRegion * std::ceil(std::log2(double(threads)));
}

int64_t images(const Problem& p) {
  return std::max<int64_t>(p.n, 1);
}

// The multiply-adds of the largest task.
double largest_task(const Problem& p, const CpuTile& tile, int64_t strip) {
  double largest = 0;
  for (int64_t first = 0; first < p.oh; first += strip)
    largest = std::max(largest, strip_multiply_adds(p, tile, first, std::min(first + strip, p.oh)));
  return largest;
}

// Elements of the factors whose panels cannot be divided evenly among a team's threads: each thread reads panels that
// another one has packed.
double shared_elements(const Problem& p, int64_t threads) {
  const auto uneven = [&](int64_t columns) {
    return ceil_div(ceil_div(columns, kAlign), kPanelVectors) % threads != 0 ? 1.0 : 0.0;
  };
  return uneven(p.r1) * p.r1 * p.s + uneven(p.t) * p.r2 * p.t +
         (p.op == Op::kTucker ? uneven(p.r2) * p.r1 * p.r2 * p.kh * p.kw : 0);
}

// Elements that a thread of a team may read from another: in each stage it computes some output channels from all input
// channels. CP's depthwise stages read the channels that the same thread has computed, but the leader writes the zeros
// around the image.
double handed_on(const Problem& p, const CpuTile& tile) {
  const Patch patch = patch_of(tile.winograd);
  double elements = double(p.oh) * p.ow * p.r2 + double(p.h + 2 * p.padding[0]) * (p.w + 2 * p.padding[1]) * p.r1;
  if (p.op == Op::kTucker)
    elements += double(patch.places) * ceil_div(p.oh, patch.rows) * ceil_div(p.ow, patch.columns) * p.r1;
  else
    elements -= double(p.h) * p.w * p.r1;
  return double(images(p)) * elements;
}

// The cost of a team: it has no halo and no idle thread, but threads wait for each other after each stage, and read
// what others wrote.
double team_cost(const Problem& p, const CpuTile& team, int64_t threads) {
  const double tasks = double(images(p) * ceil_div(p.ow, team.columns)), steps = ceil_div(p.oh, team.rows);
  const double waits = tasks * steps * (team.winograd == Winograd::kNone ? 3 : 4);
  const double others = double(threads - 1) / double(threads);  // the other threads' part of all that was written
  double cost = region_of(threads) + fused_flops(p, team) / 2 / double(threads) + waits * wait_of(threads) +
                kHandedOn * handed_on(p, team) * others;
  if (!team.prepared)
    cost += kPacked * packed_elements(p) / double(threads) + kHandedOn * shared_elements(p, threads) * others;
  return cost;
}

// How many of the threads should form a team: 2, 4, 8, ... or all; 0 where none costs less than `otherwise`.
int64_t team_size(const Problem& p, const CpuTile& team, const CpuCaps& caps, double otherwise) {
  if (caps.teams != Teams::kAuto) return caps.teams == Teams::kAlways ? caps.threads : 0;
  int64_t best = 0;
  for (int64_t size = 2;; size = std::min(2 * size, caps.threads)) {
    const double cost = team_cost(p, team, size);
    if (cost < otherwise) {
      best = size;
      otherwise = cost;
    }
    if (size == caps.threads) return best;
  }
}

}  // namespace

void share_out(const Problem& p, const CpuCaps& caps, const ConvScratch& scratch, CpuTile& tile) {
  const CpuTile alone = tile;
  const int64_t threads = caps.threads, even = patch_of(tile.winograd).rows;
  // Tasks: images x column tiles x strips. A strip recomputes the first stage's halo rows, so there are no more strips
  // than it takes to keep every thread busy.
  const int64_t parts = images(p) * ceil_div(p.ow, tile.columns);
  if (parts < 4 * threads && parts % threads != 0) tile.strips = std::min(ceil_div(p.oh, tile.rows), threads);
  if (tile.strips == 1 && parts == 1) {  // few rows: strips of less than a step
    tile.strips = std::min(ceil_div(p.oh, even), threads);
    tile.rows = std::min(tile.rows, round_up(ceil_div(p.oh, tile.strips), even));
  }
  const int64_t strip = round_up(ceil_div(p.oh, tile.strips), even), tasks = parts * ceil_div(p.oh, strip);
  const double task = largest_task(p, tile, strip), packing = tile.prepared ? 0 : kPacked * packed_elements(p);
  // Waking a thread must not take longer than its tasks.
  tile.tasks_each = int64_t(std::clamp(kRegion / task, 1.0, double(tasks)));
  const int64_t busy = ceil_div(tasks, tile.tasks_each);  // threads with tasks, if there were enough
  double cost =
      packing + task * double(tile.tasks_each) * double(ceil_div(busy, threads)) + region_of(std::min(busy, threads));

  const double cost_alone = packing + fused_flops(p, alone) / 2;
  if (cost_alone <= cost) {
    tile = alone;
    tile.tasks_each = parts;
    cost = cost_alone;
  }
  CpuTile team = alone;  // with longer steps, for fewer waits
  while (team.rows + even <= p.oh && scratch(team.rows + even, team.columns) <= caps.l2_bytes / 2) team.rows += even;
  team.rows = round_up(ceil_div(p.oh, ceil_div(p.oh, team.rows)), even);
  if (const int64_t size = team_size(p, team, caps, cost); size > 1) {
    tile = team;
    tile.team = size;
    tile.spreads_prefetches = false;
    tile.scratch_bytes = ceil_div(scratch(tile.rows, tile.columns), tile.team);
  }
}

}  // namespace lowrank_ops
