// From lists of tensors to shapes and members: what the CPU and the CUDA binding of family block_lora share.
#pragma once
#include <string>
#include <vector>

#include "../kernels/block_lora.h"
#include "checks.h"

namespace partune {

using LoraTensors = std::vector<Tensor>;
using LoraScales = std::vector<double>;

// How a group's task is cut; `share_rank`: arms of the up-projections are summed, not chunks.
struct BlockLoraGroup {
  BlockLoraShape shape;
  int64_t arms;
  BlockLoraDropout dropout;
};

struct BlockLoraMemberShape {
  int64_t out, first, rank;
};

struct BlockLoraArguments {
  const Tensor& input;
  const LoraTensors &downs, &ups;
  const LoraScales& scales;
  const std::string& share;
  double dropout;
  const std::optional<Tensor>&seed, &step;
  int64_t layer_id;
};

inline void check_matrix_like(const char* op, const char* name, const Tensor& tensor, const Tensor& like,
                              ScalarType dtype, int64_t rows, int64_t columns) {
  check_dtype(op, name, tensor, {dtype});
  STD_TORCH_CHECK(tensor.device() == like.device() && tensor.is_contiguous() && tensor.dim() == 2 &&
                      tensor.size(0) == rows && tensor.size(1) == columns,
                  op, ": ", name, " must be a contiguous matrix of ", rows, " times ", columns,
                  " on the input's device");
}

inline ScalarType lora_type(const Tensor& input) {
  return input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline BlockLoraDropout dropout_of(const char* op, const BlockLoraArguments& a) {
  STD_TORCH_CHECK(a.dropout >= 0.0 && a.dropout < 1.0, op, ": dropout must lie in [0, 1), got ", a.dropout);
  BlockLoraDropout dropout{0, uint32_t(a.layer_id)};
  if (a.dropout == 0.0) return dropout;
  STD_TORCH_CHECK(a.seed && a.step, op, ": dropout needs seed and step");
  check_scalar(op, "seed", *a.seed, a.input, {ScalarType::Long});
  check_scalar(op, "step", *a.step, a.input, {ScalarType::Long});
  // To even, as Python rounds.
  const int64_t dropped = int64_t(__builtin_nearbyint(a.dropout * 65536.0));
  dropout.dropped = uint32_t(dropped < 65535 ? dropped : 65535);
  return dropout;
}

inline BlockLoraGroup group_of(const char* op, const BlockLoraArguments& a) {
  check_dtype(op, "input", a.input,
              {ScalarType::Double, ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  STD_TORCH_CHECK(a.input.dim() == 2 && a.input.is_contiguous(), op, ": input must be a contiguous matrix");
  const bool by_rank = chooses(op, "share", a.share, "rank", "input");
  STD_TORCH_CHECK(!a.downs.empty() && a.ups.size() == a.downs.size() && a.scales.size() == a.downs.size(), op,
                  ": downs, ups and scales must have one entry per member");
  BlockLoraGroup group{{a.input.size(0), a.input.size(1), 1, a.input.size(1), 0}, 1, dropout_of(op, a)};
  const ScalarType dtype = lora_type(a.input);
  for (size_t i = 0; i < a.downs.size(); ++i) {
    const Tensor &down = a.downs[i], &up = a.ups[i];
    STD_TORCH_CHECK(down.dim() == 2 && up.dim() == (by_rank ? 3 : 2), op,
                    ": downs or ups have the wrong number of dimensions");
    if (i == 0) {
      group.shape.width = down.size(1);
      group.arms = by_rank ? up.size(0) : 1;
      const int64_t width = group.shape.width, features = group.shape.features;
      STD_TORCH_CHECK(width == features || (!by_rank && width > 0 && features % width == 0), op,
                      ": downs of ", width, " columns don't fit an input of ", features, " features");
      group.shape.chunks = width > 0 ? features / width : 1;
      STD_TORCH_CHECK(group.arms > 0, op, ": ups must have arms");
    }
    const int64_t rank = down.size(0);
    STD_TORCH_CHECK(rank > 0, op, ": downs must have a row per rank");
    check_matrix_like(op, "downs", down, a.input, dtype, rank, group.shape.width);
    check_dtype(op, "ups", up, {dtype});
    STD_TORCH_CHECK(up.device() == a.input.device() && up.is_contiguous() && up.size(up.dim() - 1) == rank &&
                        (!by_rank || up.size(0) == group.arms),
                    op, ": ups must be contiguous and fit downs, on the input's device");
    group.shape.ranks += rank;
  }
  return group;
}

// The members' columns and ranks, `matrices` being [tokens, out] of each.
inline std::vector<BlockLoraMemberShape> members_of(const char* op, const char* name,
                                                    const BlockLoraArguments& a, const BlockLoraGroup& group,
                                                    const LoraTensors& matrices) {
  STD_TORCH_CHECK(matrices.size() == a.ups.size(), op, ": ", name, " must have one entry per member");
  std::vector<BlockLoraMemberShape> members;
  int64_t first = 0;
  for (size_t i = 0; i < matrices.size(); ++i) {
    const int64_t out = a.ups[i].size(a.ups[i].dim() - 2), rank = a.downs[i].size(0);
    check_matrix_like(op, name, matrices[i], a.input, a.input.scalar_type(), group.shape.tokens, out);
    members.push_back({out, first, rank});
    first += rank;
  }
  return members;
}

// Gradients shaped as the adapters, or none.
inline void check_adapter_grads(const char* op, const char* name, const LoraTensors& grads,
                                const LoraTensors& adapters) {
  if (grads.empty()) return;
  STD_TORCH_CHECK(grads.size() == adapters.size(), op, ": ", name,
                  " must have one entry per member, or none");
  for (size_t i = 0; i < grads.size(); ++i) {
    const Tensor &grad = grads[i], &like = adapters[i];
    check_dtype(op, name, grad, {like.scalar_type()});
    bool same = grad.device() == like.device() && grad.dim() == like.dim() && grad.is_contiguous();
    for (int64_t dim = 0; same && dim < like.dim(); ++dim) same = grad.size(dim) == like.size(dim);
    STD_TORCH_CHECK(same, op, ": ", name, " must be contiguous and shaped as the adapters");
  }
}

inline void check_backward_tensors(const char* op, const BlockLoraArguments& a, const BlockLoraGroup& group,
                                   const std::optional<Tensor>& grad_input, const LoraTensors& grad_downs,
                                   const LoraTensors& grad_ups, const Tensor& hidden) {
  const BlockLoraShape& shape = group.shape;
  check_matrix_like(op, "hidden", hidden, a.input, lora_type(a.input), shape.tokens, shape.ranks);
  if (grad_input) {
    check_matrix_like(op, "grad_input", *grad_input, a.input, a.input.scalar_type(), shape.tokens,
                      shape.features);
  }
  check_adapter_grads(op, "grad_downs", grad_downs, a.downs);
  check_adapter_grads(op, "grad_ups", grad_ups, a.ups);
}

}  // namespace partune
