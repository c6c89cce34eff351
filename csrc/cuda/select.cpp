// Family select on CUDA: checks, workspace, launches. Only threshold_csr reads anything back: how many
// entries there are decides its result's size.
#include "../binding/select.h"

#include <torch/csrc/stable/ops.h>

#include "../kernels/select.h"
#include "bindings.h"
#include "device.h"
#include "launchers.h"

namespace partune {
namespace {

Tensor empty_like(const Tensor& like, int64_t size, ScalarType dtype) {
  return torch::stable::empty({size}, dtype, std::nullopt, like.device());
}

// One selection: its buffers, and the launches on the current stream of its tensors' device.
class Selection {
 public:
  Selection(const char* op, const SelectLaunchers& launchers, const Tensor& like, const SelectTask& task)
      : op_(op),
        launchers_(launchers),
        scope_(like.get_device_index()),
        stream_(current_stream(like.get_device_index())),
        like_(like),
        task_(task),
        workspace_(empty_like(like, select_workspace_bytes(task.rows, task.columns), ScalarType::Byte)),
        crow_indices_(empty_like(like, task.rows + 1, ScalarType::Long)) {
    torch::stable::zero_(workspace_);
    task_.workspace = workspace_.mutable_data_ptr();
    task_.crow_indices = crow_indices_.mutable_data_ptr<int64_t>();
  }

  Csr topk(int64_t k) {
    check_launch(op_, launchers_.find(task_, k, stream_));
    check_launch(op_, launchers_.count(task_, stream_));
    return emit(k);
  }

  Csr above(uint64_t threshold) {
    task_.threshold_given = true;
    task_.threshold = threshold;
    check_launch(op_, launchers_.count(task_, stream_));
    Tensor size = torch::stable::narrow(crow_indices_, 0, task_.rows, 1);
    size = torch::stable::to(size, torch::stable::Device(torch::headeronly::DeviceType::CPU));
    return emit(*size.const_data_ptr<int64_t>());
  }

 private:
  Csr emit(int64_t size) {
    Tensor col_indices = empty_like(like_, size, ScalarType::Int);
    task_.col_indices = col_indices.mutable_data_ptr<int32_t>();
    if (size > 0) check_launch(op_, launchers_.emit(task_, stream_));
    return {crow_indices_, col_indices};
  }

  const char* op_;
  const SelectLaunchers& launchers_;
  DeviceScope scope_;
  cudaStream_t stream_;
  Tensor like_;
  SelectTask task_;
  Tensor workspace_, crow_indices_;
};

const SelectLaunchers& launchers_of(const char* op, const Tensor& scores) {
  check_dtype(op, "scores", scores,
              {ScalarType::Double, ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  switch (scores.scalar_type()) {
    case ScalarType::Double:
      return select_float64;
    case ScalarType::Float:
      return select_float32;
    case ScalarType::BFloat16:
      return select_bfloat16;
    default:
      return select_half;
  }
}

Selection select_scores(const char* op, const Tensor& scores, bool largest) {
  check_matrix(op, "scores", scores);
  SelectTask task{};
  task.scores = scores.const_data_ptr();
  task.rows = scores.size(0);
  task.columns = scores.size(1);
  task.largest = largest;
  return {op, launchers_of(op, scores), scores, task};
}

}  // namespace

Csr topk_csr_cuda(Tensor scores, int64_t k, bool largest) {
  const char* op = "topk_csr";
  check_matrix(op, "scores", scores);
  check_k(op, k, scores.size(0), scores.size(1));
  return select_scores(op, scores, largest).topk(k);
}

Csr threshold_csr_cuda(Tensor scores, double threshold, bool largest) {
  const char* op = "threshold_csr";
  check_threshold(op, threshold);
  const uint64_t key = scores.scalar_type() == ScalarType::Double
                           ? score_key(last_excluded<double>(threshold, largest), largest)
                           : score_key(last_excluded<float>(threshold, largest), largest);
  return select_scores(op, scores, largest).above(key);
}

Csr topk_csr_factors_cuda(Tensor left, Tensor right, int64_t k) {
  const char* op = "topk_csr_factors";
  check_factors(op, left, right, k);
  SelectTask task{};
  task.scores = left.const_data_ptr();
  task.right = right.const_data_ptr();
  task.rows = left.size(0);
  task.columns = right.size(1);
  task.rank = left.size(1);
  task.largest = true;
  const bool wide = left.scalar_type() == ScalarType::Double;
  return Selection(op, wide ? select_factors_float64 : select_factors_float32, left, task).topk(k);
}

Tensor random_scores_cuda(int64_t rows, int64_t columns, Tensor seed, Tensor step, int64_t parameter_id) {
  const char* op = "random_scores";
  check_random(op, rows, columns);
  check_scalar(op, "seed", seed, seed, {ScalarType::Long});
  check_scalar(op, "step", step, seed, {ScalarType::Long});
  const DeviceScope scope(seed.get_device_index());
  Tensor scores = torch::stable::empty({rows, columns}, ScalarType::Float, std::nullopt, seed.device());
  check_launch(op, launch_random_scores(scores.mutable_data_ptr<float>(), rows * columns,
                                        seed.const_data_ptr<int64_t>(), step.const_data_ptr<int64_t>(),
                                        uint32_t(parameter_id), current_stream(seed.get_device_index())));
  return scores;
}

}  // namespace partune
