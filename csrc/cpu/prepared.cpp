#include "cpu/prepared.h"

#include <ATen/ops/empty.h>

#include <array>
#include <cstring>
#include <vector>

#include "cpu/winograd.h"
#include "ops/checks.h"
#include "ops/factor_record.h"
#include "ops/problem_of.h"
#include "plan/cpu/planner.h"

namespace lowrank_ops {
namespace {

// All that the packed panels depend on. Numbers that do not apply are zero.
struct Record {
  static constexpr int kFactors = 3;
  int64_t dtype, element, lanes, panel_width, group;
  std::array<FactorRecord, kFactors> factors;
};

// The start of the tensor. Offsets are in bytes, 0 where there is no such part.
struct Header {
  Record record;
  int64_t bytes;  // of the whole tensor
  int64_t in_factor, core, winograd[4], out_factor;
};

Record record_of(const at::Tensor& in_factor, const at::Tensor* core, const at::Tensor& out_factor,
                 const KernelSet& kernel_set) {
  const ComputeKernels& kernels = *kernel_set.kernels;
  Record record{};
  record.dtype = int64_t(in_factor.scalar_type());
  record.element = int64_t(kernels.element);
  record.lanes = kernels.lanes;
  record.panel_width = kernels.panel_width;
  record.group = kernels.group;
  record.factors[0] = factor_record(in_factor);
  if (core) record.factors[1] = factor_record(*core);
  record.factors[2] = factor_record(out_factor);
  return record;
}

static_assert(sizeof(Record) == sizeof(int64_t) * (5 + 3 * 10), "records are compared byte by byte");

void check_factors(const at::Tensor& in_factor, const OptionalTensor& core, const at::Tensor& out_factor) {
  constexpr const char* op = "prepare";
  check_dim(op, {"in_factor", in_factor}, 2, "[R1, S]");
  if (core) check_dim(op, {"core", *core}, 4, "[R2, R1, KH, KW]");
  check_dim(op, {"out_factor", out_factor}, 2, "[T, R2]");
  TORCH_CHECK_TYPE(is_supported(in_factor.scalar_type()), op,
                   ": in_factor must be float32, float64, bfloat16 or float16, got ", in_factor.scalar_type());
  if (core) check_size(op, {"core", *core}, 1, in_factor.size(0), "R1, the rows of in_factor");
  check_size(op, {"out_factor", out_factor}, 1, core ? core->size(0) : in_factor.size(0),
             core ? "R2, the first axis of core" : "R, the rows of in_factor");
  const auto check = [&](const Argument& factor) {
    const at::Tensor& tensor = factor.tensor;
    TORCH_CHECK_TYPE(tensor.scalar_type() == in_factor.scalar_type(), op, ": ", factor.name,
                     " must have in_factor's dtype ", in_factor.scalar_type(), ", got ", tensor.scalar_type());
    TORCH_CHECK_VALUE(tensor.is_cpu() && tensor.layout() == at::kStrided, op, ": ", factor.name,
                      " must be a dense tensor on the CPU, got ", tensor.layout(), " on ", tensor.device());
    TORCH_CHECK_VALUE(
        !tensor.is_inference(), op, ": ", factor.name,
        " must be no inference tensor, whose changes cannot be noticed; create it outside inference_mode");
    check_nonempty(op, factor);
  };
  check({"in_factor", in_factor});
  if (core) check({"core", *core});
  check({"out_factor", out_factor});
}

}  // namespace

at::Tensor prepare(const at::Tensor& in_factor, const OptionalTensor& core, const at::Tensor& out_factor,
                   bool unit_window) {
  check_factors(in_factor, core, out_factor);
  const DType dtype = dtype_of(in_factor.scalar_type());
  const KernelSet kernel_set = kernel_set_for(dtype);
  Header header{};
  header.record = record_of(in_factor, core ? &*core : nullptr, out_factor, kernel_set);
  std::vector<PackedWeight> weights;
  std::vector<int64_t*> offsets;
  const auto add = [&](PackedWeight weight, int64_t& offset) {
    weights.push_back(std::move(weight));
    offsets.push_back(&offset);
  };
  add(pack_matrix(in_factor, dtype, kernel_set), header.in_factor);
  if (core) {
    Problem p;
    p.dtype = dtype;
    p.r2 = core->size(0);
    p.r1 = core->size(1);
    p.kh = core->size(2);
    p.kw = core->size(3);
    const auto core_rows = [&] { return core->contiguous(at::MemoryFormat::ChannelsLast); };
    add(pack_core(core_rows, p.r2, p.kh * p.kw, p.r1, dtype, kernel_set), header.core);
    for (const Winograd winograd : kPatches)  // the transforms that the planner may choose for some image size
      if (unit_window && winograd_fits(p, cpu_caps(), winograd))
        add(pack_winograd(winograd, core_rows, p, kernel_set), header.winograd[int(winograd)]);
  }
  add(pack_matrix(out_factor, dtype, kernel_set), header.out_factor);

  std::vector<PackedWeight*> to_pack;
  int64_t end = Scratch::padded(sizeof(Header));
  for (size_t i = 0; i < weights.size(); ++i) {
    to_pack.push_back(&weights[i]);
    *offsets[i] = end;
    end += Scratch::padded(weights[i].bytes());
  }
  pack(to_pack);
  header.bytes = end;

  const at::Tensor packed = at::empty({end}, at::TensorOptions().dtype(at::kByte));
  char* memory = static_cast<char*>(packed.data_ptr());
  std::memcpy(memory, &header, sizeof(header));
  for (size_t i = 0; i < weights.size(); ++i)
    std::memcpy(memory + *offsets[i], weights[i].data(), size_t(weights[i].bytes()));
  return packed;
}

Prepared prepared_for(const at::Tensor& packed, const OpCall& call) {
  const at::Tensor* core = call.op == Op::kTucker ? &call.core : nullptr;
  if (!packed.is_cpu() || packed.scalar_type() != at::kByte || !packed.is_contiguous() ||
      packed.numel() < int64_t(sizeof(Header)) || call.in_factor.is_inference() || call.out_factor.is_inference() ||
      (core && core->is_inference()))
    return {};
  const char* memory = static_cast<const char*>(packed.const_data_ptr());
  Header header;
  std::memcpy(&header, memory, sizeof(header));
  const Record record =
      record_of(call.in_factor, core, call.out_factor, kernel_set_for(dtype_of(call.in_factor.scalar_type())));
  if (header.bytes != packed.numel() || std::memcmp(&header.record, &record, sizeof(record)) != 0) return {};
  const auto at = [memory](int64_t offset) { return offset ? memory + offset : nullptr; };
  Prepared found;
  found.in_factor = at(header.in_factor);
  found.core = at(header.core);
  for (const Winograd winograd : kPatches) found.winograd[int(winograd)] = at(header.winograd[int(winograd)]);
  found.out_factor = at(header.out_factor);
  return found;
}

}  // namespace lowrank_ops
