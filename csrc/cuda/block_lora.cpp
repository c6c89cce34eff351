// Family block_lora on CUDA: checks, tasks, launches. A matrix is read once for all that is made of it; parts
// of products and of sums are added up by kernels of their own.
#include "../binding/block_lora.h"

#include <torch/csrc/stable/ops.h>

#include "bindings.h"
#include "device.h"
#include "launchers.h"

namespace partune {
namespace {

Tensor empty_like_lora(const Tensor& like, int64_t size) {
  return torch::stable::empty({size}, lora_type(like), std::nullopt, like.device());
}

template <typename Real>
class LoraCalls {
 public:
  LoraCalls(const char* op, const BlockLoraLaunchers<Real>& launchers, const BlockLoraArguments& a,
            const BlockLoraGroup& group, const std::vector<BlockLoraMemberShape>& members)
      : op_(op),
        launchers_(launchers),
        a_(a),
        group_(group),
        members_(members),
        stream_(current_stream(a.input.get_device_index())),
        downs_(stack_downs()) {}

  void forward(const LoraTensors& outputs, const Tensor& hidden) const {
    const BlockLoraShape& shape = group_.shape;
    LoraRead<Real> task = read_task(input_matrix(a_.input.const_data_ptr()), downs_);
    const int64_t tiles = launchers_.column_tiles(shape.width);
    const Tensor products = empty_like_lora(a_.input, tiles * hidden.numel());
    task.products = static_cast<Real*>(products.mutable_data_ptr());
    check(launchers_.read(task, stream_));
    sum_products(products, tiles, shape.ranks, static_cast<Real*>(hidden.mutable_data_ptr()));
    const Real* factors = static_cast<const Real*>(hidden.const_data_ptr());
    for (size_t i = 0; i < members_.size(); ++i) {
      write(member_matrix(outputs[i].const_data_ptr(), i), thin_up(i), factors + members_[i].first, true);
    }
  }

  struct Gradients {
    const std::optional<Tensor>& input;
    const LoraTensors &downs, &ups, &outputs;
    bool accumulate;
  };

  void backward(const Gradients& grads, const Tensor& hidden) const {
    const BlockLoraShape& shape = group_.shape;
    const bool inner = grads.input || !grads.downs.empty();
    const Tensor grad_hidden = empty_like_lora(a_.input, inner ? hidden.numel() : 0);
    Real* to = static_cast<Real*>(grad_hidden.mutable_data_ptr());
    for (size_t i = 0; i < members_.size(); ++i) {
      read_gradient(i, grads, static_cast<const Real*>(hidden.const_data_ptr()), inner ? to : nullptr);
    }
    if (!grads.downs.empty()) {
      LoraRead<Real> task = read_task(input_matrix(a_.input.const_data_ptr()), downs_);
      const Tensor sums = read_sums(task, to, shape.ranks);
      sum_downs(grads.downs, sums, blocks_of(task));
    }
    if (grads.input) {
      write(input_matrix(grads.input->const_data_ptr()), downs_, to, grads.accumulate);
    }
  }

 private:
  void check(cudaError_t error) const { check_launch(op_, error); }

  LoraMatrix input_matrix(const void* data) const {
    const BlockLoraShape& shape = group_.shape;
    LoraMatrix matrix{const_cast<void*>(data), shape.tokens, shape.chunks, shape.width,
                      group_.dropout,          nullptr,      nullptr};
    if (group_.dropout.dropped && a_.seed && a_.step) {
      matrix.seed = a_.seed->template const_data_ptr<int64_t>();
      matrix.step = a_.step->template const_data_ptr<int64_t>();
    }
    return matrix;
  }

  LoraMatrix member_matrix(const void* data, size_t i) const {
    return {const_cast<void*>(data), group_.shape.tokens, 1, members_[i].out, {}, nullptr, nullptr};
  }

  ThinMatrix<Real> thin_up(size_t i) const {
    const BlockLoraMemberShape& m = members_[i];
    const Real* data = static_cast<const Real*>(a_.ups[i].const_data_ptr());
    return {data, m.rank, m.out, group_.arms, true, Real(a_.scales[i])};
  }

  // The members' down-projections as one matrix.
  ThinMatrix<Real> stack_downs() {
    const BlockLoraShape& shape = group_.shape;
    const Real* data = static_cast<const Real*>(a_.downs[0].const_data_ptr());
    if (a_.downs.size() > 1) {
      stacked_ = empty_like_lora(a_.input, shape.ranks * shape.width);
      Real* to = static_cast<Real*>(stacked_.mutable_data_ptr());
      data = to;
      for (const Tensor& down : a_.downs) {
        if (down.numel() == 0) continue;
        check(cudaMemcpyAsync(to, down.const_data_ptr(), size_t(down.numel()) * sizeof(Real),
                              cudaMemcpyDeviceToDevice, stream_));
        to += down.numel();
      }
    }
    return {data, shape.ranks, shape.width, 1, false, Real(1)};
  }

  LoraRead<Real> read_task(const LoraMatrix& x, const ThinMatrix<Real>& thin) const {
    return {x, thin, nullptr, {}, nullptr, launchers_.block_tokens(x.tokens, x.width)};
  }

  static int64_t blocks_of(const LoraRead<Real>& task) {
    return (task.x.tokens + task.block_tokens - 1) / task.block_tokens;
  }

  // Runs a reading that leaves sums.
  Tensor read_sums(LoraRead<Real>& task, const Real* factors, int64_t factor_stride) const {
    const Tensor sums = empty_like_lora(a_.input, blocks_of(task) * task.thin.ranks * task.x.width);
    task.sums = static_cast<Real*>(sums.mutable_data_ptr());
    task.factors = {factors, task.x.tokens, task.thin.ranks, factor_stride};
    check(launchers_.read(task, stream_));
    return sums;
  }

  // hidden's gradient and up's, of one member.
  void read_gradient(size_t i, const Gradients& grads, const Real* hidden, Real* grad_hidden) const {
    const BlockLoraMemberShape& m = members_[i];
    LoraRead<Real> task = read_task(member_matrix(grads.outputs[i].const_data_ptr(), i), thin_up(i));
    const int64_t tiles = launchers_.column_tiles(m.out);
    const Tensor products = empty_like_lora(a_.input, grad_hidden ? tiles * group_.shape.tokens * m.rank : 0);
    if (grad_hidden) task.products = static_cast<Real*>(products.mutable_data_ptr());
    if (!grads.ups.empty()) {
      const Tensor sums = read_sums(task, hidden + m.first, group_.shape.ranks);
      check(launchers_.sum(
          {static_cast<const Real*>(sums.const_data_ptr()), blocks_of(task), m.rank * m.out, m.rank, m.out,
           Real(a_.scales[i]), static_cast<Real*>(grads.ups[i].mutable_data_ptr()), 1, m.rank, group_.arms,
           m.out * m.rank},
          stream_));
    } else if (grad_hidden) {
      check(launchers_.read(task, stream_));
    }
    if (grad_hidden) sum_products(products, tiles, m.rank, grad_hidden + m.first);
  }

  void sum_products(const Tensor& products, int64_t tiles, int64_t ranks, Real* to) const {
    check(launchers_.sum(
        {static_cast<const Real*>(products.const_data_ptr()), tiles, group_.shape.tokens * ranks,
         group_.shape.tokens, ranks, Real(1), to, group_.shape.ranks, 1, 1, 0},
        stream_));
  }

  void sum_downs(const LoraTensors& grad_downs, const Tensor& sums, int64_t blocks) const {
    const BlockLoraShape& shape = group_.shape;
    const Real* from = static_cast<const Real*>(sums.const_data_ptr());
    for (size_t i = 0; i < members_.size(); ++i) {
      const BlockLoraMemberShape& m = members_[i];
      check(launchers_.sum(
          {from + m.first * shape.width, blocks, shape.ranks * shape.width, m.rank, shape.width, Real(1),
           static_cast<Real*>(grad_downs[i].mutable_data_ptr()), shape.width, 1, 1, 0},
          stream_));
    }
  }

  void write(const LoraMatrix& out, const ThinMatrix<Real>& thin, const Real* factors, bool add) const {
    const LoraFactors<Real> rows{factors, out.tokens, thin.ranks, group_.shape.ranks};
    check(launchers_.write({out, thin, rows, add}, stream_));
  }

  const char* op_;
  const BlockLoraLaunchers<Real>& launchers_;
  const BlockLoraArguments& a_;
  const BlockLoraGroup& group_;
  const std::vector<BlockLoraMemberShape>& members_;
  const cudaStream_t stream_;
  Tensor stacked_;
  const ThinMatrix<Real> downs_;
};

// body(launchers) with those of a tensor's dtype.
template <typename Body>
void with_lora_launchers(const Tensor& tensor, const Body& body) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return body(block_lora_float64);
    case ScalarType::Float:
      return body(block_lora_float32);
    case ScalarType::BFloat16:
      return body(block_lora_bfloat16);
    default:
      return body(block_lora_half);
  }
}

template <typename Real>
LoraCalls<Real> calls_of(const char* op, const BlockLoraLaunchers<Real>& launchers,
                         const BlockLoraArguments& a, const BlockLoraGroup& group,
                         const std::vector<BlockLoraMemberShape>& members) {
  return LoraCalls<Real>(op, launchers, a, group, members);
}

}  // namespace

Tensor block_lora_cuda_(LoraTensors outputs, Tensor input, LoraTensors downs, LoraTensors ups,
                        LoraScales scales, std::string share, double dropout, std::optional<Tensor> seed,
                        std::optional<Tensor> step, int64_t layer_id) {
  const char* op = "block_lora_";
  const BlockLoraArguments a{input, downs, ups, scales, share, dropout, seed, step, layer_id};
  const BlockLoraGroup group = group_of(op, a);
  const std::vector<BlockLoraMemberShape> members = members_of(op, "outputs", a, group, outputs);
  const DeviceScope scope(input.get_device_index());
  Tensor hidden = torch::stable::empty({group.shape.tokens, group.shape.ranks}, lora_type(input),
                                       std::nullopt, input.device());
  with_lora_launchers(input, [&](const auto& launchers) {
    calls_of(op, launchers, a, group, members).forward(outputs, hidden);
  });
  return hidden;
}

void block_lora_backward_cuda_(std::optional<Tensor> grad_input, LoraTensors grad_downs, LoraTensors grad_ups,
                               LoraTensors grads, Tensor input, Tensor hidden, LoraTensors downs,
                               LoraTensors ups, LoraScales scales, std::string share, double dropout,
                               std::optional<Tensor> seed, std::optional<Tensor> step, int64_t layer_id,
                               bool accumulate) {
  const char* op = "block_lora_backward_";
  const BlockLoraArguments a{input, downs, ups, scales, share, dropout, seed, step, layer_id};
  const BlockLoraGroup group = group_of(op, a);
  check_backward_tensors(op, a, group, grad_input, grad_downs, grad_ups, hidden);
  const std::vector<BlockLoraMemberShape> members = members_of(op, "grads", a, group, grads);
  const DeviceScope scope(input.get_device_index());
  with_lora_launchers(input, [&](const auto& launchers) {
    calls_of(op, launchers, a, group, members)
        .backward({grad_input, grad_downs, grad_ups, grads, accumulate}, hidden);
  });
}

}  // namespace partune
