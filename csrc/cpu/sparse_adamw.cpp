// Family sparse_adamw on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

#include "../binding/sparse_adamw.h"
#include "../kernels/sparse_adamw_cpu.h"
#include "for_entries.h"
#include "isa.h"
#include "scalars.h"

namespace partune {
namespace {

void sparse_adamw_(TensorList self, TensorList grads, TensorList crow_indices, TensorList col_indices,
                   TensorList exp_avgs, TensorList exp_avg_sqs, TensorList masters, TensorList state_steps,
                   std::vector<int64_t> parameter_ids, Tensor lr, double beta1, double beta2,
                   double weight_decay, double eps, std::string eps_mode, bool maximize, std::string rounding,
                   std::optional<Tensor> seed, std::optional<Tensor> offset, std::optional<Tensor> grad_scale,
                   std::optional<Tensor> found_inf) {
  const char* op = "sparse_adamw_";
  const SparseAdamWArguments arguments{self,        grads,   crow_indices, col_indices,  exp_avgs,
                                       exp_avg_sqs, masters, state_steps,  parameter_ids};
  SparseAdamWStep step{};
  step.hyperparameters =
      hyperparameters_of<double>(op, beta1, beta2, weight_decay, eps, eps_mode, maximize, rounding);
  step.lr = scalar_value(op, "lr", lr);
  step.grad_scale = grad_scale ? scalar_value(op, "grad_scale", *grad_scale) : 1.0;
  const uint64_t key = seed ? uint64_t(integer_value(op, "seed", *seed)) : 0;
  step.key = {uint32_t(key), uint32_t(key >> 32)};
  step.offset = offset ? uint32_t(integer_value(op, "offset", *offset)) : 0;
  for (const Tensor& one : self) STD_TORCH_CHECK(one.is_cpu(), op, ": parameters must be on the CPU");
  const SparseAdamWList list = pack_list(op, arguments, step.hyperparameters.stochastic);
  STD_TORCH_CHECK(seed || !list.draws, op, ": stochastic rounding needs a seed");
  if (found_inf && scalar_value(op, "found_inf", *found_inf) != 0) return;

  const SparseAdamWCpu& cpu = PARTUNE_CPU_TABLE(sparse_adamw_cpu);
  for_entries(list.matrices, [&](size_t i, int64_t begin, int64_t end) {
    cpu.step[list.types[i]](list.matrices[i], step, begin, end);
  });
}

void found_inf_(Tensor found_inf, TensorList grads, TensorList crow_indices, TensorList col_indices) {
  const char* op = "found_inf_";
  check_dtype(op, "found_inf", found_inf, {ScalarType::Float});
  STD_TORCH_CHECK(found_inf.is_cpu() && found_inf.numel() == 1, op, ": found_inf must be one float32");
  for (const Tensor& one : grads) STD_TORCH_CHECK(one.is_cpu(), op, ": grads must be on the CPU");
  const std::vector<SparseAdamWMatrix> matrices = pack_gradients(op, grads, crow_indices, col_indices);
  const SparseAdamWCpu& cpu = PARTUNE_CPU_TABLE(sparse_adamw_cpu);
  std::atomic<bool> found{false};
  for_entries(matrices, [&](size_t i, int64_t begin, int64_t end) {
    const auto body = grads[i].scalar_type() == ScalarType::Double     ? cpu.found_inf_float64
                      : grads[i].scalar_type() == ScalarType::Float    ? cpu.found_inf_float32
                      : grads[i].scalar_type() == ScalarType::BFloat16 ? cpu.found_inf_bfloat16
                                                                       : cpu.found_inf_half;
    if (body(matrices[i], begin, end)) found = true;
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
  STD_TORCH_CHECK(new_crow_indices.is_cpu(), op, ": new_crow_indices must be on the CPU");
  const RemapArguments arguments = pack_remap(op, new_values, old_values, old_crow_indices, old_col_indices,
                                              new_crow_indices, new_col_indices);
  const CsrPair& csrs = arguments.csrs;
  std::atomic<int64_t> common{0};
  const int64_t grain = std::max<int64_t>(1, kEntryGrain * csrs.rows / std::max<int64_t>(1, csrs.new_nnz));
  torch::stable::parallel_for(0, csrs.rows, grain, [&](int64_t first, int64_t last) {
    int64_t here = 0;
    for (int64_t row = first; row < last; ++row) {
      const int64_t o = csrs.old_crow_indices[row], n = csrs.new_crow_indices[row];
      const int64_t old_count = csrs.old_crow_indices[row + 1] - o;
      const int64_t new_count = csrs.new_crow_indices[row + 1] - n;
      const int32_t* old_columns = csrs.old_col_indices + o;
      const int32_t* new_columns = csrs.new_col_indices + n;
      here += count_common(old_columns, old_count, new_columns, new_count);
      for (const RemapValues& values : arguments.values) {
        const auto carry = [&](auto word) {
          using Word = decltype(word);
          carry_row(old_columns, old_count, new_columns, new_count,
                    static_cast<const Word*>(values.old_values) + o,
                    static_cast<Word*>(values.new_values) + n);
        };
        switch (values.bytes) {
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
