// The interface to Python (harness.py): one kernel launch. All members are int64, pointers too, so that the structs can
// be declared in both languages without surprises.
#pragma once

#include <cstdint>

#include "simulator.h"

struct FactorCall {
  int64_t data, row_stride, column_stride, tap_stride[2], vector, bytes;  // bytes: from the first to the last element
};

struct BlockCall {
  int64_t op, family, config, dtype, activation;  // the numbers of the enums
  int64_t n, s, h, w, t, oh, ow, r1, r2, kh, kw;  // as in plan/problem.h
  int64_t stride[2], padding[2], dilation[2];
  int64_t tile_n, tile_h, tile_w, stages, splits, cluster;
  int64_t input, input_bytes, input_stride[4], input_vector;
  int64_t output, output_bytes, output_stride[4], output_vector;
  FactorCall in_factor, core, height_factor, width_factor, out_factor;
  int64_t bias, bias_bytes;
};

#define LOWRANK_OPS_EXPORT extern "C" __attribute__((visibility("default")))

// Returns the launcher's error; simulator_report says what happened.
LOWRANK_OPS_EXPORT int simulator_run(const BlockCall* call, const lowrank_ops::simulator::Settings* settings);
LOWRANK_OPS_EXPORT const char* simulator_report();
// Writes to `cut` how the planner cuts the call's problem for its kernel on a named GPU: tile_n, tile_h, tile_w,
// stages, splits, cluster, and the shared memory that a CTA of that GPU can have. Returns why the kernel cannot take it
// there, or "".
LOWRANK_OPS_EXPORT const char* simulator_plan(const BlockCall* call, const char* gpu, int64_t* cut);
