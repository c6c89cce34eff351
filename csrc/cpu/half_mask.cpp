// Family half_mask on the CPU. Work is split by tiles over all matrices of a list.
#include "../binding/half_mask.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../kernels/half_mask_cpu.h"
#include "isa.h"
#include "scalars.h"

namespace partune {
namespace {

constexpr int64_t kGrain = 8;  // tiles: below that a second thread costs more than it saves

int64_t step_tiles(const HalfMatrix& m) {
  return mask_tiles(m.level == kHalfElements ? entries_of(m.entries) : m.entries.nnz);
}

PhiloxKey key_of(const char* op, const char* name, const std::optional<Tensor>& seed) {
  const uint64_t key = seed ? uint64_t(integer_value(op, name, *seed)) : 0;
  return {uint32_t(key), uint32_t(key >> 32)};
}

void half_adamw_(TensorList self, TensorList grads, TensorList live, TensorList ranks, TensorList exp_avgs,
                 TensorList exp_avg_sqs, TensorList masters, TensorList state_steps,
                 std::vector<int64_t> parameter_ids, std::vector<int64_t> mask_ids, std::string level,
                 Tensor lr, double beta1, double beta2, double weight_decay, double eps, std::string eps_mode,
                 bool maximize, std::string rounding, std::optional<Tensor> mask_seed,
                 std::optional<Tensor> seed, std::optional<Tensor> offset, std::optional<Tensor> grad_scale,
                 std::optional<Tensor> found_inf) {
  const char* op = "half_adamw_";
  const HalfArguments arguments{self,        grads,   live,        ranks,         exp_avgs,
                                exp_avg_sqs, masters, state_steps, parameter_ids, mask_ids};
  for (const Tensor& one : self) STD_TORCH_CHECK(one.is_cpu(), op, ": parameters must be on the CPU");
  SparseAdamWStep step{};
  step.hyperparameters =
      hyperparameters_of<double>(op, beta1, beta2, weight_decay, eps, eps_mode, maximize, rounding);
  step.lr = scalar_value(op, "lr", lr);
  step.grad_scale = grad_scale ? scalar_value(op, "grad_scale", *grad_scale) : 1.0;
  step.key = key_of(op, "seed", seed);
  step.offset = offset ? uint32_t(integer_value(op, "offset", *offset)) : 0;
  const PhiloxKey mask_key = key_of(op, "mask_seed", mask_seed);
  const HalfList list = pack_half_list(op, half_level(op, level), arguments, step.hyperparameters.stochastic);
  STD_TORCH_CHECK(seed || !list.draws, op, ": stochastic rounding needs a seed");
  STD_TORCH_CHECK(mask_seed || !list.draws_masks, op, ": a mask that isn't stored needs mask_seed");
  if (found_inf && scalar_value(op, "found_inf", *found_inf) != 0) return;

  std::vector<int64_t> starts{0};  // [matrices + 1], in tiles
  for (const HalfMatrix& m : list.matrices) {
    starts.push_back(starts.back() + step_tiles(m));
    STD_TORCH_CHECK(!m.ranks || m.ranks[step_tiles(m)] == m.entries.nnz, op,
                    ": ranks must end with the number of moments");
  }
  const HalfMaskCpu& cpu = PARTUNE_CPU_TABLE(half_mask_cpu);
  torch::stable::parallel_for(0, starts.back(), kGrain, [&](int64_t begin, int64_t end) {
    size_t i = size_t(std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin()) - 1;
    for (; i < list.matrices.size() && starts[i] < end; ++i) {
      const int64_t first = std::max(begin, starts[i]) - starts[i];
      const int64_t last = std::min(end, starts[i + 1]) - starts[i];
      if (first < last) cpu.step[list.types[i]](list.matrices[i], step, mask_key, first, last);
    }
  });
}

Tensor random_mask(int64_t count, Tensor mask_seed, int64_t mask_id) {
  const char* op = "random_mask";
  STD_TORCH_CHECK(count >= 0, op, ": count must not be negative");
  const PhiloxKey key = key_of(op, "mask_seed", mask_seed);
  Tensor mask = torch::stable::empty({mask_words(count)}, ScalarType::Int, std::nullopt, mask_seed.device());
  uint32_t* words = reinterpret_cast<uint32_t*>(mask.mutable_data_ptr<int32_t>());
  const auto draw = PARTUNE_CPU_TABLE(half_mask_cpu).draw;
  torch::stable::parallel_for(0, mask_tiles(count), kGrain, [&](int64_t first, int64_t last) {
    draw(first, last, count, uint32_t(mask_id), key, words);
  });
  return mask;
}

Tensor mask_counts(Tensor mask, int64_t count) {
  const char* op = "mask_counts";
  STD_TORCH_CHECK(mask.is_cpu(), op, ": mask must be on the CPU");
  check_mask(op, mask, count);
  Tensor counts = torch::stable::empty({mask_tiles(count)}, ScalarType::Long, std::nullopt, mask.device());
  int64_t* out = counts.mutable_data_ptr<int64_t>();
  const uint32_t* words = reinterpret_cast<const uint32_t*>(mask.const_data_ptr<int32_t>());
  const auto body = PARTUNE_CPU_TABLE(half_mask_cpu).count;
  torch::stable::parallel_for(0, mask_tiles(count), kGrain,
                              [&](int64_t first, int64_t last) { body(words, first, last, count, out); });
  return counts;
}

}  // namespace
}  // namespace partune

STABLE_TORCH_LIBRARY_IMPL(partune, CPU, library) {
  library.impl("half_adamw_", TORCH_BOX(&partune::half_adamw_));
  library.impl("random_mask", TORCH_BOX(&partune::random_mask));
  library.impl("mask_counts", TORCH_BOX(&partune::mask_counts));
}
