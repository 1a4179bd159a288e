// Counts that follow from a problem alone: multiply-adds, FLOPs, bytes.
#pragma once

#include "plan/problem.h"

namespace lowrank_ops {

int64_t element_bytes(DType dtype);

// Multiply-adds per image, by stage.
struct Stages {
  double in, middle, out;
};
// The chain's multiply-adds, if its first stage computes `in_pixels` pixels.
Stages multiply_adds(const Problem& problem, double in_pixels);
double depthwise_sums(const Problem& problem);  // multiply-adds of an image; CP only
double block_flops(const Problem& problem);     // of the chain, which computes every stage once

double packed_elements(const Problem& problem);  // of the factors that are packed: all but CP's taps
double weight_elements(const Problem& problem);  // of all factors
double image_elements(const Problem& problem);   // of input and output
double block_bytes(const Problem& problem);      // input + output + weights, once
double hidden_bytes(const Problem& problem);     // intermediates of the chain, written and read

}  // namespace lowrank_ops
