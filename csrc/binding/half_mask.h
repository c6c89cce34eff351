// From lists of tensors to matrices of which half is live: what the CPU and the CUDA binding of family
// half_mask share.
#pragma once
#include <string>
#include <vector>

#include "../kernels/half_mask.h"
#include "sparse_adamw.h"

namespace partune {

inline HalfLevel half_level(const char* op, const std::string& level) {
  if (level == "elements") return kHalfElements;
  return chooses(op, "level", level, "rows", "columns") ? kHalfRows : kHalfColumns;
}

inline int64_t mask_tiles(int64_t count) { return (count + kHalfTile - 1) / kHalfTile; }
inline int64_t mask_words(int64_t count) {
  return (count + kCounterEntries - 1) / kCounterEntries * (kCounterEntries / 32);
}

// Rows of the matrix that a parameter is seen as: what the state's shape leaves of them.
inline int64_t half_rows(const char* op, HalfLevel level, const Tensor& weight, const Tensor& exp_avg) {
  if (level == kHalfElements) return weight.dim() == 2 ? weight.size(0) : int64_t(weight.numel() > 0);
  STD_TORCH_CHECK(exp_avg.dim() == 2, op, ": the moments of rows and columns must be matrices");
  if (level == kHalfColumns || weight.numel() == 0) return weight.numel() == 0 ? 0 : exp_avg.size(0);
  const int64_t columns = exp_avg.size(1);
  STD_TORCH_CHECK(columns > 0 && weight.numel() % columns == 0, op, ": moments with ", columns,
                  " columns don't fit a parameter of ", weight.numel(), " entries");
  return weight.numel() / columns;
}

struct HalfArguments {
  const TensorList &self, &grads, &live, &ranks, &exp_avgs, &exp_avg_sqs, &masters, &state_steps;
  const std::vector<int64_t>&parameter_ids, &mask_ids;
};

inline HalfMatrix pack_half_matrix(const char* op, HalfLevel level, const HalfArguments& a, size_t i) {
  const Tensor &weight = a.self[i], &grad = a.grads[i], &exp_avg = a.exp_avgs[i];
  HalfMatrix half{};
  half.level = level;
  half.mask_id = uint32_t(a.mask_ids[i]);
  SparseAdamWMatrix& m = half.entries;
  m.rows = half_rows(op, level, weight, exp_avg);
  STD_TORCH_CHECK(grad.device() == weight.device(), op, ": grads must be on the parameter's device");
  const MatrixView view = matrix_view(op, "self", weight, m.rows);
  const MatrixView grad_view = matrix_view(op, "grads", grad, m.rows);
  STD_TORCH_CHECK(view.columns == grad_view.columns, op, ": grads and self must have the same shape");
  m.columns = view.columns;
  m.weight_row_stride = view.row_stride;
  m.weight_column_stride = view.column_stride;
  m.grad_row_stride = grad_view.row_stride;
  m.grad_column_stride = grad_view.column_stride;
  m.nnz = exp_avg.numel();

  half.live_count = a.live[i].numel();
  check_vector(op, "live", a.live[i], weight, {ScalarType::Int}, half.live_count);
  if (level == kHalfElements) {
    const bool drawn = half.live_count == 0;
    STD_TORCH_CHECK(drawn || half.live_count == mask_words(entries_of(m)), op,
                    ": a mask must have one bit per entry, in whole counters of 128");
    if (!drawn) half.mask = reinterpret_cast<const uint32_t*>(a.live[i].const_data_ptr<int32_t>());
    check_vector(op, "ranks", a.ranks[i], weight, {ScalarType::Long}, mask_tiles(entries_of(m)) + 1);
    half.ranks = a.ranks[i].const_data_ptr<int64_t>();
    STD_TORCH_CHECK(exp_avg.dim() == 1, op, ": the moments of elements must be vectors");
  } else {
    half.live = a.live[i].const_data_ptr<int32_t>();
    const int64_t wanted = level == kHalfRows ? half.live_count * m.columns : m.rows * half.live_count;
    STD_TORCH_CHECK(m.nnz == wanted, op, ": the moments must have ", wanted, " entries, got ", m.nnz);
  }

  for (const Tensor* moment : {&exp_avg, &a.exp_avg_sqs[i]}) {
    check_dtype(op, "exp_avgs and exp_avg_sqs", *moment, {exp_avg.scalar_type()});
    STD_TORCH_CHECK(
        moment->is_contiguous() && same_layout(*moment, exp_avg) && moment->device() == weight.device(), op,
        ": the moments must be contiguous, alike and on the parameter's device");
  }
  m.weight = weight.mutable_data_ptr();
  m.grad = grad.const_data_ptr();
  m.exp_avg = exp_avg.mutable_data_ptr();
  m.exp_avg_sq = a.exp_avg_sqs[i].mutable_data_ptr();
  if (!a.masters.empty()) {
    check_dtype(op, "masters", a.masters[i], {ScalarType::Float});
    STD_TORCH_CHECK(same_layout(a.masters[i], exp_avg) && a.masters[i].device() == weight.device(), op,
                    ": masters must have the moments' layout and device");
    m.master = a.masters[i].mutable_data_ptr<float>();
  }
  check_scalar(op, "state_steps", a.state_steps[i], weight, {ScalarType::Float});
  m.state_step = a.state_steps[i].const_data_ptr<float>();
  m.parameter_id = uint32_t(a.parameter_ids[i]);
  return half;
}

struct HalfList {
  std::vector<HalfMatrix> matrices;
  std::vector<SparseAdamWTypes> types;
  bool draws;        // something is rounded stochastically
  bool draws_masks;  // a mask isn't stored
};

inline HalfList pack_half_list(const char* op, HalfLevel level, const HalfArguments& a, bool stochastic) {
  const size_t count = a.self.size();
  check_lengths(op, count,
                {a.grads.size(), a.live.size(), a.ranks.size(), a.exp_avgs.size(), a.exp_avg_sqs.size(),
                 a.state_steps.size(), a.parameter_ids.size(), a.mask_ids.size()});
  if (!a.masters.empty()) check_lengths(op, count, {a.masters.size()});
  HalfList list{};
  for (size_t i = 0; i < count; ++i) {
    list.types.push_back(types_of(op, a.self[i], a.grads[i], a.exp_avgs[i]));
    list.draws |= rounds_stochastically(op, a.self[i], a.exp_avgs[i], !a.masters.empty(), stochastic);
    list.matrices.push_back(pack_half_matrix(op, level, a, i));
    const HalfMatrix& m = list.matrices.back();
    list.draws_masks |= level == kHalfElements && !m.mask && entries_of(m.entries) > 0;
  }
  return list;
}

inline void check_mask(const char* op, const Tensor& mask, int64_t count) {
  STD_TORCH_CHECK(count >= 0, op, ": count must not be negative");
  check_vector(op, "mask", mask, mask, {ScalarType::Int}, mask_words(count));
}

}  // namespace partune
