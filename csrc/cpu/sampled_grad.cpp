// Family sampled_grad on the CPU. Sampled: a block of tokens of both factors is packed, a column's tokens
// side by side, and each entry is a dot product of two packed columns. Threads share the entries.
#include "../binding/sampled_grad.h"

#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <memory>
#include <new>

#include "../kernels/sampled_grad_cpu.h"
#include "isa.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace partune {
namespace {

constexpr int64_t kPackColumns = 128;     // whose packed tokens are a small part of an L2 cache
constexpr int64_t kEntriesOfThread = 64;  // not worth dividing further
// Packed at once where a block of tokens takes less: threads wait for each other twice per packing.
constexpr int64_t kWorkspaceBytes = int64_t(16) << 20;
constexpr int64_t kPanelBytes = int64_t(2) << 20;

int64_t row_of(const CsrView& csr, int64_t entry) {
  return std::upper_bound(csr.crow_indices, csr.crow_indices + csr.rows + 1, entry) - csr.crow_indices - 1;
}

// Memory on huge pages where the system has them: packed columns are read in no order, and of small pages
// each would miss the TLB (measured: a fifth of the time at 4096 by 4096).
char* huge_pages(int64_t bytes) {
  constexpr size_t kPage = size_t(2) << 20;
  const size_t size = (size_t(bytes) + kPage - 1) / kPage * kPage;
  void* memory = std::aligned_alloc(kPage, size);
  if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__)
  madvise(memory, size, MADV_HUGEPAGE);
#endif
  return static_cast<char*>(memory);
}

template <typename Real>
class Sampled {
 public:
  Sampled(const SampledGradCall& call, int64_t element_size, const SampledGradBodies<Real>& bodies)
      : call_(call),
        element_size_(element_size),
        bodies_(bodies),
        block_bytes_((call.grad.columns + call.input.columns) * kPackedBytes),
        blocks_(std::clamp(kWorkspaceBytes / block_bytes_, int64_t(1),
                           (call.tokens + bodies.block_tokens - 1) / bodies.block_tokens)),
        packed_(huge_pages(blocks_ * block_bytes_), std::free) {}

  void run() const {
    for (int64_t first = 0; first < call_.tokens; first += blocks_ * bodies_.block_tokens) {
      const int64_t left = (call_.tokens - first + bodies_.block_tokens - 1) / bodies_.block_tokens;
      pack(first, std::min(blocks_, left));
      multiply(first, std::min(blocks_, left));
    }
  }

 private:
  int64_t tokens_of(int64_t first) const { return std::min(bodies_.block_tokens, call_.tokens - first); }

  void pack(int64_t first_token, int64_t blocks) const {
    const int64_t of_grad = (call_.grad.columns + kPackColumns - 1) / kPackColumns;
    const int64_t units = of_grad + (call_.input.columns + kPackColumns - 1) / kPackColumns;
    torch::stable::parallel_for(0, blocks * units, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t block = i / units, unit = i % units;
        const bool is_grad = unit < of_grad;
        const Factor& factor = is_grad ? call_.grad : call_.input;
        const int64_t column = (is_grad ? unit : unit - of_grad) * kPackColumns;
        const int64_t token = first_token + block * bodies_.block_tokens;
        const char* data = static_cast<const char*>(factor.data) + token * factor.stride * element_size_;
        char* packed = packed_.get() + block * block_bytes_ + (is_grad ? 0 : grad_bytes());
        bodies_.pack(data, factor.stride, tokens_of(token), column,
                     std::min(column + kPackColumns, factor.columns), packed);
      }
    });
  }

  void multiply(int64_t first_token, int64_t blocks) const {
    torch::stable::parallel_for(0, call_.csr.nnz, kEntriesOfThread, [&](int64_t begin, int64_t end) {
      const int64_t first_row = row_of(call_.csr, begin), last_row = row_of(call_.csr, end - 1) + 1;
      const std::unique_ptr<int64_t[]> cursors(new int64_t[size_t(last_row - first_row)]);
      for (int64_t i = 0; i < blocks; ++i) {
        const char* grad = packed_.get() + i * block_bytes_;
        const SampledGradBlock<Real> block{grad,
                                           grad + grad_bytes(),
                                           tokens_of(first_token + i * bodies_.block_tokens),
                                           call_.input.columns,
                                           call_.csr,
                                           static_cast<Real*>(call_.values)};
        bodies_.product(block, first_row, last_row, begin, end, cursors.get());
      }
    });
  }

  int64_t grad_bytes() const { return call_.grad.columns * kPackedBytes; }

  const SampledGradCall& call_;
  int64_t element_size_;
  const SampledGradBodies<Real>& bodies_;
  int64_t block_bytes_, blocks_;                        // of a block of tokens; blocks packed at once
  std::unique_ptr<char, decltype(&std::free)> packed_;  // [blocks, rows and columns, kPackedBytes]
};

template <typename Real>
void run_sampled_grad(const SampledGradCall& call, const Tensor& grad, const Tensor& input,
                      const SampledGradBodies<Real>& bodies) {
  if (!call.panels) return Sampled<Real>(call, int64_t(grad.element_size()), bodies).run();
  const CsrView& csr = call.csr;
  for_panels(grad, input, kPanelBytes, [&](const void* panel, int64_t first, int64_t last) {
    const int64_t begin = csr.crow_indices[first], end = csr.crow_indices[last];
    torch::stable::parallel_for(begin, end, kEntriesOfThread, [&](int64_t from, int64_t to) {
      bodies.compact(panel, call.input.columns, first, csr, from, to, static_cast<Real*>(call.values));
    });
  });
}

void sampled_grad_(Tensor values, Tensor grad, Tensor input, Tensor crow_indices, Tensor col_indices,
                   std::string route) {
  const char* op = "sampled_grad_";
  STD_TORCH_CHECK(values.is_cpu(), op, ": values must be on the CPU");
  const SampledGradCall call = sampled_grad_call(op, values, grad, input, crow_indices, col_indices, route);
  if (call.csr.nnz == 0 || call.tokens == 0) return;
  const SampledGradCpu& cpu = PARTUNE_CPU_TABLE(sampled_grad_cpu);
  switch (grad.scalar_type()) {
    case ScalarType::Double:
      return run_sampled_grad(call, grad, input, cpu.float64);
    case ScalarType::Float:
      return run_sampled_grad(call, grad, input, cpu.float32);
    case ScalarType::BFloat16:
      return run_sampled_grad(call, grad, input, cpu.bfloat16);
    default:
      return run_sampled_grad(call, grad, input, cpu.half);
  }
}

STABLE_TORCH_LIBRARY_IMPL(partune, CPU, m) { m.impl("sampled_grad_", TORCH_BOX(&sampled_grad_)); }

}  // namespace
}  // namespace partune
