// What a factor was when its values were prepared: a call may use the prepared values of the same factor only.
//
// Changes that leave memory and version counter as they are (`.data` edits) do not show: preparing is the user's own
// step for that reason.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>

namespace lowrank_ops {

struct FactorRecord {
  static constexpr int kMostAxes = 4;
  int64_t data = 0, version = 0;
  std::array<int64_t, kMostAxes> sizes{}, strides{};

  bool operator==(const FactorRecord&) const = default;
};

// `factor`: of at most kMostAxes axes, and no inference tensor, which has no version.
inline FactorRecord factor_record(const at::Tensor& factor) {
  TORCH_INTERNAL_ASSERT(factor.dim() <= FactorRecord::kMostAxes);
  FactorRecord record;
  record.data = int64_t(factor.const_data_ptr());
  record.version = int64_t(factor._version());
  std::copy(factor.sizes().begin(), factor.sizes().end(), record.sizes.begin());
  std::copy(factor.strides().begin(), factor.strides().end(), record.strides.begin());
  return record;
}

}  // namespace lowrank_ops
