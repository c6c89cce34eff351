// Family sparse_adamw on the CPU. Work is split by entries, not by rows or matrices: principal rows
// are skewed, and a list mixes large matrices with small ones.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

#include "../binding/sparse_adamw.h"
#include "../kernels/sparse_adamw_cpu.h"
#include "isa.h"
#include "scalars.h"

namespace partune {
namespace {

constexpr int64_t kGrain = 8192;  // entries: below that a second thread costs more than it saves

struct MatrixList {
  std::vector<SparseAdamWMatrix> matrices;
  std::vector<int64_t> starts{0};  // [matrices + 1], first entry of each in the whole list

  void append(const SparseAdamWMatrix& matrix) {
    matrices.push_back(matrix);
    starts.push_back(starts.back() + matrix.nnz);
  }

  // body(matrix number, begin, end) over all entries of the list, on all threads.
  template <typename Body>
  void for_entries(const Body& body) const {
    torch::stable::parallel_for(0, starts.back(), kGrain, [&](int64_t begin, int64_t end) {
      size_t i = size_t(std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin()) - 1;
      for (; i < matrices.size() && starts[i] < end; ++i) {
        body(i, std::max(begin - starts[i], int64_t(0)), std::min(end, starts[i + 1]) - starts[i]);
      }
    });
  }
};

SparseAdamWTypes types_of(const Tensor& weight, const Tensor& grad, const Tensor& moment) {
  const char* op = "sparse_adamw_";
  const ScalarType dtype = weight.scalar_type();
  const bool same = grad.scalar_type() == dtype;
  if (!same) check_dtype(op, "grads", grad, {ScalarType::Float});
  const bool rounded_state = dtype != ScalarType::Double && moment.scalar_type() == ScalarType::BFloat16;
  check_dtype(op, "exp_avgs", moment,
              {dtype == ScalarType::Double ? ScalarType::Double
               : rounded_state             ? ScalarType::BFloat16
                                           : ScalarType::Float});
  switch (dtype) {
    case ScalarType::Double:
      STD_TORCH_CHECK(same, op, ": grads of float64 parameters must be float64");
      return kFloat64;
    case ScalarType::Float:
      return rounded_state ? kFloat32StateBFloat16 : kFloat32;
    case ScalarType::BFloat16:
      if (same) return rounded_state ? kBFloat16StateBFloat16 : kBFloat16;
      return rounded_state ? kBFloat16GradFloat32StateBFloat16 : kBFloat16GradFloat32;
    case ScalarType::Half:
      if (same) return rounded_state ? kHalfStateBFloat16 : kHalf;
      return rounded_state ? kHalfGradFloat32StateBFloat16 : kHalfGradFloat32;
    default:
      STD_TORCH_CHECK(false, op, ": parameters must be float64, float32, bfloat16 or float16");
  }
}

void sparse_adamw_(TensorList self, TensorList grads, TensorList crow_indices, TensorList col_indices,
                   TensorList exp_avgs, TensorList exp_avg_sqs, TensorList masters, TensorList state_steps,
                   std::vector<int64_t> parameter_ids, Tensor lr, double beta1, double beta2,
                   double weight_decay, double eps, std::string eps_mode, bool maximize, std::string rounding,
                   std::optional<Tensor> seed, std::optional<Tensor> offset,
                   std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf) {
  const char* op = "sparse_adamw_";
  check_lengths(op, self.size(),
                {grads.size(), crow_indices.size(), col_indices.size(), exp_avgs.size(), exp_avg_sqs.size(),
                 state_steps.size(), parameter_ids.size()});
  if (!masters.empty()) check_lengths(op, self.size(), {masters.size()});
  SparseAdamWStep step{};
  step.hyperparameters = {beta1,
                          1 - beta1,
                          beta2,
                          1 - beta2,
                          weight_decay,
                          eps,
                          chooses(op, "eps_mode", eps_mode, "corrected", "uncorrected"),
                          maximize,
                          chooses(op, "rounding", rounding, "stochastic", "nearest")};
  step.lr = scalar_value(op, "lr", lr);
  step.grad_scale = grad_scale ? scalar_value(op, "grad_scale", *grad_scale) : 1.0;
  const uint64_t key = seed ? uint64_t(integer_value(op, "seed", *seed)) : 0;
  step.key = {uint32_t(key), uint32_t(key >> 32)};
  step.offset = offset ? uint32_t(integer_value(op, "offset", *offset)) : 0;

  MatrixList list;
  std::vector<SparseAdamWTypes> types;
  bool draws = false;
  for (size_t i = 0; i < self.size(); ++i) {
    STD_TORCH_CHECK(self[i].is_cpu(), op, ": parameters must be on the CPU");
    types.push_back(types_of(self[i], grads[i], exp_avgs[i]));
    const ScalarType dtype = self[i].scalar_type();
    const bool rounded = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
    STD_TORCH_CHECK(masters.empty() || rounded, op, ": masters are for bfloat16 and float16 parameters");
    draws |= (rounded && masters.empty() && step.hyperparameters.stochastic) ||
             exp_avgs[i].scalar_type() == ScalarType::BFloat16;
    list.append(pack_matrix(op, self[i], grads[i], crow_indices[i], col_indices[i], exp_avgs[i],
                            exp_avg_sqs[i], masters.empty() ? nullptr : &masters[i], state_steps[i],
                            parameter_ids[i]));
  }
  STD_TORCH_CHECK(seed || !draws, op, ": stochastic rounding needs a seed");
  if (found_inf && scalar_value(op, "found_inf", *found_inf) != 0) return;

  const SparseAdamWCpu& cpu = PARTUNE_CPU_TABLE(sparse_adamw_cpu);
  list.for_entries([&](size_t i, int64_t begin, int64_t end) {
    cpu.step[types[i]](list.matrices[i], step, begin, end);
  });
}

void found_inf_(Tensor found_inf, TensorList grads, TensorList crow_indices, TensorList col_indices) {
  const char* op = "found_inf_";
  check_lengths(op, grads.size(), {crow_indices.size(), col_indices.size()});
  check_dtype(op, "found_inf", found_inf, {ScalarType::Float});
  STD_TORCH_CHECK(found_inf.is_cpu() && found_inf.numel() == 1, op, ": found_inf must be one float32");
  MatrixList list;
  for (size_t i = 0; i < grads.size(); ++i) {
    STD_TORCH_CHECK(grads[i].is_cpu(), op, ": grads must be on the CPU");
    check_dtype(op, "grads", grads[i],
                {ScalarType::Double, ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
    list.append(pack_gradient(op, grads[i], grads[i], crow_indices[i], col_indices[i]));
  }
  const SparseAdamWCpu& cpu = PARTUNE_CPU_TABLE(sparse_adamw_cpu);
  std::atomic<bool> found{false};
  list.for_entries([&](size_t i, int64_t begin, int64_t end) {
    const auto body = grads[i].scalar_type() == ScalarType::Double     ? cpu.found_inf_float64
                      : grads[i].scalar_type() == ScalarType::Float    ? cpu.found_inf_float32
                      : grads[i].scalar_type() == ScalarType::BFloat16 ? cpu.found_inf_bfloat16
                                                                       : cpu.found_inf_half;
    if (body(list.matrices[i], begin, end)) found = true;
  });
  if (found) *found_inf.mutable_data_ptr<float>() = 1.0f;
}

// Copies the values of the entries that a row has in both CSRs.
template <typename Word>
void carry_row(const int32_t* old_columns, int64_t old_count, const int32_t* new_columns, int64_t new_count,
               const Word* old_values, Word* new_values) {
  for (int64_t i = 0, j = 0; i < old_count && j < new_count;) {
    if (old_columns[i] == new_columns[j]) {
      new_values[j++] = old_values[i++];
    } else if (old_columns[i] < new_columns[j]) {
      ++i;
    } else {
      ++j;
    }
  }
}

int64_t count_common(const int32_t* a, int64_t a_count, const int32_t* b, int64_t b_count) {
  int64_t common = 0;
  for (int64_t i = 0, j = 0; i < a_count && j < b_count;) {
    common += a[i] == b[j];
    const bool advance_a = a[i] <= b[j], advance_b = b[j] <= a[i];
    i += advance_a;
    j += advance_b;
  }
  return common;
}

Tensor remap_(TensorList new_values, TensorList old_values, Tensor old_crow_indices, Tensor old_col_indices,
              Tensor new_crow_indices, Tensor new_col_indices) {
  const char* op = "remap_";
  check_lengths(op, new_values.size(), {old_values.size()});
  const int64_t old_nnz = old_col_indices.numel(), new_nnz = new_col_indices.numel();
  const int64_t rows = new_crow_indices.numel() - 1;
  STD_TORCH_CHECK(rows >= 0 && new_crow_indices.is_cpu(), op, ": new_crow_indices must not be empty");
  check_vector(op, "old_crow_indices", old_crow_indices, new_crow_indices, {ScalarType::Long}, rows + 1);
  check_vector(op, "new_crow_indices", new_crow_indices, new_crow_indices, {ScalarType::Long}, rows + 1);
  check_vector(op, "old_col_indices", old_col_indices, new_crow_indices, {ScalarType::Int}, old_nnz);
  check_vector(op, "new_col_indices", new_col_indices, new_crow_indices, {ScalarType::Int}, new_nnz);
  for (size_t i = 0; i < new_values.size(); ++i) {
    const auto dtypes = {ScalarType::Double, ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
    check_vector(op, "new_values", new_values[i], new_crow_indices, dtypes, new_nnz);
    check_vector(op, "old_values", old_values[i], new_crow_indices, {new_values[i].scalar_type()}, old_nnz);
  }
  const int64_t* old_crow = old_crow_indices.const_data_ptr<int64_t>();
  const int64_t* new_crow = new_crow_indices.const_data_ptr<int64_t>();
  const int32_t* old_col = old_col_indices.const_data_ptr<int32_t>();
  const int32_t* new_col = new_col_indices.const_data_ptr<int32_t>();
  std::atomic<int64_t> common{0};
  const int64_t grain = std::max<int64_t>(1, kGrain * rows / std::max<int64_t>(1, new_nnz));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t first, int64_t last) {
    int64_t here = 0;
    for (int64_t row = first; row < last; ++row) {
      const int64_t o = old_crow[row], n = new_crow[row];
      const int64_t old_count = old_crow[row + 1] - o, new_count = new_crow[row + 1] - n;
      here += count_common(old_col + o, old_count, new_col + n, new_count);
      for (size_t i = 0; i < new_values.size(); ++i) {
        const auto carry = [&](auto word) {
          using Word = decltype(word);
          carry_row(old_col + o, old_count, new_col + n, new_count,
                    static_cast<const Word*>(old_values[i].const_data_ptr()) + o,
                    static_cast<Word*>(new_values[i].mutable_data_ptr()) + n);
        };
        switch (new_values[i].element_size()) {
          case 8:
            carry(uint64_t());
            break;
          case 4:
            carry(uint32_t());
            break;
          default:
            carry(uint16_t());
        }
      }
    }
    common += here;
  });
  Tensor result = torch::stable::empty({}, ScalarType::Long, std::nullopt, new_crow_indices.device());
  *result.mutable_data_ptr<int64_t>() = common;
  return result;
}

}  // namespace
}  // namespace partune

STABLE_TORCH_LIBRARY_IMPL(partune, CPU, library) {
  library.impl("sparse_adamw_", TORCH_BOX(&partune::sparse_adamw_));
  library.impl("found_inf_", TORCH_BOX(&partune::found_inf_));
  library.impl("remap_", TORCH_BOX(&partune::remap_));
}
