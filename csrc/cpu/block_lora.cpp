// Family block_lora on the CPU: adapters as thin matrices, forward by tiles of tokens, backward by blocks of
// them, whose sums are added up in their order.
#include "../binding/block_lora.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <memory>
#include <new>

#include "../kernels/block_lora_cpu.h"
#include "isa.h"
#include "scalars.h"

namespace partune {
namespace {

// Below that many elements a second thread costs more than it saves.
constexpr int64_t kLoraGrain = 65536;
// Blocks of tokens that leave sums of their own, and how much memory these may take.
constexpr int64_t kMostBlocks = 32;
constexpr int64_t kPartialBytes = int64_t{64} << 20;
constexpr int64_t kFewestTokens = 128;

template <typename Body>
void by_columns(int64_t columns, int64_t rows, const Body& body) {
  torch::stable::parallel_for(0, columns, kLoraGrain / (rows + 1) + 1, body);
}

// Memory that begins with a line, whose loads cross none.
struct FreeLines {
  void operator()(void* lines) const { ::operator delete(lines, std::align_val_t{kLineBytes}); }
};
template <typename Real>
using Lines = std::unique_ptr<Real[], FreeLines>;

template <typename Real>
Lines<Real> make_lines(int64_t count) {
  void* lines = ::operator new(size_t(count) * sizeof(Real), std::align_val_t{kLineBytes});
  return Lines<Real>(static_cast<Real*>(lines));
}

// A task with the adapters packed; `matrices` are the outputs or their gradients.
template <typename Real>
class PackedTask {
 public:
  PackedTask(const char* op, const BlockLoraBodies<Real>& bodies, const BlockLoraArguments& a,
             const BlockLoraGroup& group, const char* name, const LoraTensors& matrices)
      : members_(matrices.size()) {
    const BlockLoraShape& shape = group.shape;
    const std::vector<BlockLoraMemberShape> shapes = members_of(op, name, a, group, matrices);
    pack_downs(a, shape);
    int64_t columns = 0, begin = 0;
    for (const BlockLoraMemberShape& m : shapes) columns += m.rank * pitch_of<Real>(m.out);
    ups_ = make_lines<Real>(columns);
    for (size_t i = 0; i < shapes.size(); ++i) {
      const BlockLoraMemberShape& m = shapes[i];
      const int64_t pitch = pitch_of<Real>(m.out);
      Real* packed = ups_.get() + begin;
      begin += m.rank * pitch;
      const BlockLoraUp<Real> up{static_cast<const Real*>(a.ups[i].const_data_ptr()),
                                 group.arms,
                                 m.out,
                                 m.rank,
                                 pitch,
                                 Real(a.scales[i]),
                                 packed};
      by_columns(m.out, m.rank * group.arms, [&](int64_t b, int64_t e) { bodies.pack(up, b, e); });
      members_[i] = {matrices[i].mutable_data_ptr(), packed, m.out, pitch, nullptr, m.first, m.rank, 0};
    }
    task.shape = shape;
    task.input = a.input.const_data_ptr();
    task.members = members_.data();
    task.member_count = int64_t(members_.size());
    task.dropout = group.dropout;
    if (group.dropout.dropped && a.seed && a.step) {
      const uint64_t seed = uint64_t(integer_value(op, "seed", *a.seed));
      task.key = {uint32_t(seed), uint32_t(seed >> 32)};
      task.step = uint32_t(integer_value(op, "step", *a.step));
    }
  }

  // Lays out a block's sums; how many blocks there are.
  int64_t lay_out_blocks(bool down_grad, bool up_grad) {
    const BlockLoraShape& shape = task.shape;
    int64_t sums = down_grad ? shape.ranks * task.down_pitch : 0;
    for (BlockLoraMember<Real>& m : members_) {
      m.partial = sums;
      if (up_grad) sums += m.rank * m.pitch;
    }
    int64_t most = kPartialBytes / (sums * int64_t(sizeof(Real)) + 1);
    most = most < 1 ? 1 : most > kMostBlocks ? kMostBlocks : most;
    // As many as keep an even number of threads equally busy.
    int64_t blocks = (shape.tokens / kFewestTokens + 1) / 2 * 2;
    blocks = blocks < 1 ? 1 : blocks > most ? most : blocks;
    task.block_tokens = shape.tokens > blocks ? (shape.tokens + blocks - 1) / blocks : 1;
    task.grad_hidden = sums;
    task.partial_size = sums + pitch_of<Real>(task.block_tokens * shape.ranks);
    task.down_grad = down_grad;
    task.up_grad = up_grad;
    return (shape.tokens + task.block_tokens - 1) / task.block_tokens;
  }

  // For products that are rounded to bfloat16, where the machine multiplies pairs of it.
  void pair_ups(const BlockLoraBodies<Real>& bodies) {
    for (BlockLoraMember<Real>& m : members_) {
      m.up_pairs = paired(bodies, m.up, m.rank, m.out, m.pitch);
    }
  }
  void pair_downs(const BlockLoraBodies<Real>& bodies) {
    task.down_pairs = paired(bodies, task.down, task.shape.ranks, task.shape.width, task.down_pitch);
  }

  const BlockLoraMember<Real>& member(size_t i) const { return members_[i]; }

  BlockLoraTask<Real> task{};

 private:
  const Real* paired(const BlockLoraBodies<Real>& bodies, const Real* thin, int64_t ranks, int64_t columns,
                     int64_t pitch) {
    if (!bodies.pair || ranks > kMostPairedRanks) return nullptr;
    pairs_.push_back(make_lines<Real>((ranks + 1) / 2 * pitch));
    const BlockLoraPairs<Real> pairs{thin, ranks, pitch, pairs_.back().get()};
    by_columns(columns, ranks, [&](int64_t b, int64_t e) { bodies.pair(pairs, b, e); });
    return pairs.pairs;
  }

  void pack_downs(const BlockLoraArguments& a, const BlockLoraShape& shape) {
    task.down_pitch = pitch_of<Real>(shape.width);
    downs_ = make_lines<Real>(shape.ranks * task.down_pitch);
    Real* to = downs_.get();
    for (const Tensor& down : a.downs) {
      const Real* from = static_cast<const Real*>(down.const_data_ptr());
      for (int64_t i = 0; i < down.size(0) && shape.width > 0; ++i) {
        __builtin_memcpy(to, from + i * shape.width, size_t(shape.width) * sizeof(Real));
        to += task.down_pitch;
      }
    }
    task.down = downs_.get();
  }

  Lines<Real> downs_, ups_;
  std::vector<Lines<Real>> pairs_;
  std::vector<BlockLoraMember<Real>> members_;
};

// body(bodies) with the table of a tensor's dtype.
template <typename Body>
void with_lora_bodies(const Tensor& tensor, const Body& body) {
  const BlockLoraCpu& table = PARTUNE_CPU_TABLE(block_lora_cpu);
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return body(table.float64);
    case ScalarType::Float:
      return body(table.float32);
    case ScalarType::BFloat16:
      return body(table.bfloat16);
    default:
      return body(table.half);
  }
}

template <typename Real>
void run_forward(const char* op, const BlockLoraBodies<Real>& bodies, const BlockLoraArguments& a,
                 const BlockLoraGroup& group, const LoraTensors& outputs, const Tensor& hidden) {
  PackedTask<Real> packed(op, bodies, a, group, "outputs", outputs);
  packed.task.hidden = static_cast<Real*>(hidden.mutable_data_ptr());
  packed.pair_ups(bodies);
  torch::stable::parallel_for(0, group.shape.tokens, kLoraTile,
                              [&](int64_t begin, int64_t end) { bodies.forward(packed.task, begin, end); });
}

Tensor block_lora_(LoraTensors outputs, Tensor input, LoraTensors downs, LoraTensors ups, LoraScales scales,
                   std::string share, double dropout, std::optional<Tensor> seed, std::optional<Tensor> step,
                   int64_t layer_id) {
  const char* op = "block_lora_";
  STD_TORCH_CHECK(input.is_cpu(), op, ": input must be on the CPU");
  const BlockLoraArguments a{input, downs, ups, scales, share, dropout, seed, step, layer_id};
  const BlockLoraGroup group = group_of(op, a);
  Tensor hidden = torch::stable::empty({group.shape.tokens, group.shape.ranks}, lora_type(input),
                                       std::nullopt, input.device());
  with_lora_bodies(input, [&](const auto& bodies) { run_forward(op, bodies, a, group, outputs, hidden); });
  return hidden;
}

struct BackwardTensors {
  const std::optional<Tensor>& grad_input;
  const LoraTensors &grad_downs, &grad_ups, &grads;
  const Tensor& hidden;
  bool accumulate;
};

template <typename Real>
void sum_grads(const BlockLoraBodies<Real>& bodies, const BlockLoraArguments& a, const BlockLoraGroup& group,
               const BackwardTensors& b, const PackedTask<Real>& packed, int64_t blocks) {
  const BlockLoraTask<Real>& task = packed.task;
  const auto run = [&](const BlockLoraSum<Real>& sum) {
    by_columns(sum.columns, sum.rows * (blocks + 1),
               [&](int64_t begin, int64_t end) { bodies.sum(sum, begin, end); });
  };
  const int64_t width = group.shape.width;
  for (size_t i = 0; i < a.downs.size(); ++i) {
    const BlockLoraMember<Real>& m = packed.member(i);
    if (!b.grad_downs.empty()) {
      run({task.partial + m.first * task.down_pitch, blocks, task.partial_size, m.rank, width,
           task.down_pitch, Real(1), static_cast<Real*>(b.grad_downs[i].mutable_data_ptr()), width, 1, 1, 0});
    }
    if (!b.grad_ups.empty()) {
      run({task.partial + m.partial, blocks, task.partial_size, m.rank, m.out, m.pitch, Real(a.scales[i]),
           static_cast<Real*>(b.grad_ups[i].mutable_data_ptr()), 1, m.rank, group.arms, m.out * m.rank});
    }
  }
}

template <typename Real>
void run_backward(const char* op, const BlockLoraBodies<Real>& bodies, const BlockLoraArguments& a,
                  const BlockLoraGroup& group, const BackwardTensors& b) {
  PackedTask<Real> packed(op, bodies, a, group, "grads", b.grads);
  BlockLoraTask<Real>& task = packed.task;
  task.hidden = static_cast<Real*>(b.hidden.mutable_data_ptr());
  task.grad_input = b.grad_input ? b.grad_input->mutable_data_ptr() : nullptr;
  task.accumulate = b.accumulate;
  if (b.grad_input) packed.pair_downs(bodies);
  const int64_t blocks = packed.lay_out_blocks(!b.grad_downs.empty(), !b.grad_ups.empty());
  const Lines<Real> partial = make_lines<Real>(blocks * task.partial_size);
  task.partial = partial.get();
  torch::stable::parallel_for(0, blocks, 1,
                              [&](int64_t begin, int64_t end) { bodies.backward(task, begin, end); });
  sum_grads(bodies, a, group, b, packed, blocks);
}

void block_lora_backward_(std::optional<Tensor> grad_input, LoraTensors grad_downs, LoraTensors grad_ups,
                          LoraTensors grads, Tensor input, Tensor hidden, LoraTensors downs, LoraTensors ups,
                          LoraScales scales, std::string share, double dropout, std::optional<Tensor> seed,
                          std::optional<Tensor> step, int64_t layer_id, bool accumulate) {
  const char* op = "block_lora_backward_";
  STD_TORCH_CHECK(input.is_cpu(), op, ": input must be on the CPU");
  const BlockLoraArguments a{input, downs, ups, scales, share, dropout, seed, step, layer_id};
  const BlockLoraGroup group = group_of(op, a);
  check_backward_tensors(op, a, group, grad_input, grad_downs, grad_ups, hidden);
  const BackwardTensors tensors{grad_input, grad_downs, grad_ups, grads, hidden, accumulate};
  with_lora_bodies(input, [&](const auto& bodies) { run_backward(op, bodies, a, group, tensors); });
}

}  // namespace
}  // namespace partune

STABLE_TORCH_LIBRARY_IMPL(partune, CPU, library) {
  library.impl("block_lora_", TORCH_BOX(&partune::block_lora_));
  library.impl("block_lora_backward_", TORCH_BOX(&partune::block_lora_backward_));
}
