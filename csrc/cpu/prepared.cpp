#include "cpu/prepared.h"

#include <ATen/ops/empty.h>

#include <array>
#include <cstring>

#include "cpu/winograd.h"
#include "plan/plan.h"
#include "problem_of.h"

namespace lowrank_ops {
namespace {

// What panels depend on. Words that do not apply are zero.
struct Record {
  static constexpr int kFactors = 3, kAxes = 4;
  struct Factor {
    int64_t data, version;
    std::array<int64_t, kAxes> sizes, strides;
  };
  int64_t dtype, element, lanes, panel_width, group;
  std::array<Factor, kFactors> factors;
};

// At the start of the tensor; offsets in bytes, 0 where there is no such part.
struct Header {
  Record record;
  int64_t in_factor, core, winograd[4], out_factor;
};

Record::Factor identity(const at::Tensor& factor) {
  Record::Factor result{};
  result.data = int64_t(factor.const_data_ptr());
  result.version = int64_t(factor._version());
  std::copy(factor.sizes().begin(), factor.sizes().end(), result.sizes.begin());
  std::copy(factor.strides().begin(), factor.strides().end(), result.strides.begin());
  return result;
}

Record record_of(const at::Tensor& in_factor, const at::Tensor* core, const at::Tensor& out_factor,
                 const Engine& engine) {
  const ComputeKernels& kernels = *engine.kernels;
  Record record{};
  record.dtype = int64_t(in_factor.scalar_type());
  record.element = int64_t(kernels.element);
  record.lanes = kernels.lanes;
  record.panel_width = kernels.panel_width;
  record.group = kernels.group;
  record.factors[0] = identity(in_factor);
  if (core) record.factors[1] = identity(*core);
  record.factors[2] = identity(out_factor);
  return record;
}

static_assert(sizeof(Record) == sizeof(int64_t) * (5 + 3 * 10), "records are compared byte by byte");

}  // namespace

at::Tensor prepare(const at::Tensor& in_factor, const OptionalTensor& core, const at::Tensor& out_factor,
                   bool unit_window) {
  const DType dtype = dtype_of(in_factor.scalar_type());
  const Engine engine = engine_for(dtype);
  PackedWeight in_weight = pack_matrix(in_factor, dtype, engine);
  PackedWeight out_weight = pack_matrix(out_factor, dtype, engine);
  std::optional<PackedWeight> core_weight, winograd_weights[4];
  if (core) {
    Problem p;
    p.dtype = dtype;
    p.r2 = core->size(0);
    p.r1 = core->size(1);
    p.kh = core->size(2);
    p.kw = core->size(3);
    const auto core_rows = [&] { return core->contiguous(at::MemoryFormat::ChannelsLast); };
    core_weight.emplace(pack_core(core_rows, p.r2, p.kh * p.kw, p.r1, dtype, engine));
    for (const Winograd winograd : kPatches)  // those that some image size might take
      if (unit_window && winograd_fits(p, cpu_caps(), winograd))
        winograd_weights[int(winograd)].emplace(pack_winograd(winograd, core_rows, p, engine));
  }
  Header header{record_of(in_factor, core ? &*core : nullptr, out_factor, engine), 0, 0, {}, 0};
  struct Part {
    PackedWeight* weight;
    int64_t* offset;
  };
  const auto if_any = [](std::optional<PackedWeight>& weight) { return weight ? &*weight : nullptr; };
  const std::array<Part, 6> parts = {{{&in_weight, &header.in_factor},
                                      {if_any(core_weight), &header.core},
                                      {if_any(winograd_weights[1]), &header.winograd[1]},
                                      {if_any(winograd_weights[2]), &header.winograd[2]},
                                      {if_any(winograd_weights[3]), &header.winograd[3]},
                                      {&out_weight, &header.out_factor}}};
  std::array<PackedWeight*, 6> weights;
  int64_t end = Scratch::padded(sizeof(Header));
  for (size_t i = 0; i < parts.size(); ++i) {
    weights[i] = parts[i].weight;
    if (!weights[i]) continue;
    *parts[i].offset = end;
    end += Scratch::padded(weights[i]->bytes());
  }
  pack(weights);

  const at::Tensor packed = at::empty({end}, at::TensorOptions().dtype(at::kByte));
  char* memory = static_cast<char*>(packed.data_ptr());
  std::memcpy(memory, &header, sizeof(header));
  for (const Part& part : parts)
    if (part.weight) std::memcpy(memory + *part.offset, part.weight->data(), size_t(part.weight->bytes()));
  return packed;
}

Prepared prepared_for(const at::Tensor& packed, const at::Tensor& in_factor, const at::Tensor* core,
                      const at::Tensor& out_factor) {
  if (packed.scalar_type() != at::kByte || !packed.is_contiguous() || packed.numel() < int64_t(sizeof(Header)) ||
      in_factor.is_inference() || out_factor.is_inference() || (core && core->is_inference()))
    return {};
  const char* memory = static_cast<const char*>(packed.const_data_ptr());
  Header header;
  std::memcpy(&header, memory, sizeof(header));
  const Record record = record_of(in_factor, core, out_factor, engine_for(dtype_of(in_factor.scalar_type())));
  if (std::memcmp(&header.record, &record, sizeof(record)) != 0) return {};
  const auto at = [memory](int64_t offset) { return offset ? memory + offset : nullptr; };
  return {at(header.in_factor),
          at(header.core),
          {nullptr, at(header.winograd[1]), at(header.winograd[2]), at(header.winograd[3])},
          at(header.out_factor)};
}

}  // namespace lowrank_ops
