// Family sampled_grad on the CPU. Sampled: a block of tokens of both factors is packed, a column's tokens
// side by side, and each entry is a dot product of two packed columns.
#include "../binding/sampled_grad.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "../kernels/sampled_grad_cpu.h"
#include "isa.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace partune {
namespace {

constexpr int64_t kEntriesOfThread = 64;  // not worth dividing further
constexpr int64_t kPanelColumns = 640;    // at most: their packed tokens leave room in an L2 cache
constexpr int64_t kPartRows = 2048;       // about so many rows are packed at once, at most
constexpr int64_t kPanelBytes = int64_t(2) << 20;
constexpr int64_t kSampledColumns = 256;  // to divide the columns by

// Memory on huge pages where the system has them: packed columns are read in no order, and of small pages
// each would miss the TLB (measured: a fifth of the time at 4096 by 4096). Each thread keeps its own: the
// system clears new pages, and what another core has read is slow to write (measured: a third of the speed).
char* kept_workspace(int64_t bytes) {
  constexpr size_t kPage = size_t(2) << 20;
  thread_local std::unique_ptr<char, decltype(&std::free)> kept(nullptr, std::free);
  thread_local size_t kept_size = 0;
  if (size_t(bytes) <= kept_size) return kept.get();
  kept.reset();
  kept_size = 0;
  const size_t size = (size_t(bytes) + kPage - 1) / kPage * kPage;
  kept.reset(static_cast<char*>(std::aligned_alloc(kPage, size)));
  if (kept == nullptr) throw std::bad_alloc();
#if defined(__linux__)
  madvise(kept.get(), size, MADV_HUGEPAGE);
#endif
  kept_size = size;
  return kept.get();
}

// How the entries are divided: by their number into ranges of rows, and these into ranges of columns. Each
// part packs the rows and the columns that it needs, by itself: threads share nothing and wait for nobody.
struct Parts {
  int64_t of_rows;
  std::vector<int64_t> columns;  // bounds

  int64_t count() const { return of_rows * (int64_t(columns.size()) - 1); }
};

// Of some entries, ascending: parts between them have about as many. Golden steps meet no regular pattern.
std::vector<int32_t> sample_columns(const CsrView& csr) {
  std::vector<int32_t> sample;
  for (int64_t i = 0; i < kSampledColumns; ++i) {
    const double place = std::fmod(double(i) * 0.6180339887498949, 1.0) * double(csr.nnz);
    sample.push_back(csr.col_indices[std::min(int64_t(place), csr.nnz - 1)]);
  }
  std::sort(sample.begin(), sample.end());
  return sample;
}

Parts divide(const SampledGradCall& call) {
  const int64_t rows = call.grad.columns, columns = call.input.columns, nnz = call.csr.nnz;
  const int64_t threads =
      std::clamp(nnz / kEntriesOfThread, int64_t(1), int64_t(torch::stable::get_num_threads()));
  int64_t across = 1;  // parts of the columns: as many as leave each thread the least to pack
  for (int64_t i = 2; i <= threads; ++i) {
    if (threads % i == 0 &&
        rows * i + columns * (threads / i) < rows * across + columns * (threads / across)) {
      across = i;
    }
  }
  const int64_t down = std::max(threads / across, int64_t(1));
  const int64_t rounds = (rows + down * kPartRows - 1) / (down * kPartRows);
  Parts parts{down * rounds, {0}};
  if (across > 1) {
    const std::vector<int32_t> sample = sample_columns(call.csr);
    for (int64_t i = 1; i < across; ++i) {
      parts.columns.push_back(sample[size_t(i * kSampledColumns / across)] / call.side * call.side);
    }
  }
  parts.columns.push_back(columns);
  return parts;
}

template <typename Real>
class Sampled {
 public:
  Sampled(const SampledGradCall& call, int64_t element_size, const SampledGradBodies<Real>& bodies)
      : call_(call), element_size_(element_size), bodies_(bodies), parts_(divide(call)) {}

  void run() const {
    torch::stable::parallel_for(0, parts_.count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) run_part(part);
    });
  }

 private:
  void run_part(int64_t part) const {
    const int64_t across = int64_t(parts_.columns.size()) - 1;
    const int64_t begin = first_entry(part / across), end = first_entry(part / across + 1);
    const int64_t first_column = parts_.columns[size_t(part % across)];
    const int64_t last_column = parts_.columns[size_t(part % across + 1)];
    if (begin == end || first_column == last_column) return;
    const int64_t* crow = call_.csr.crow_indices;
    const int64_t side = call_.side;
    const int64_t first_row = row_of(crow, 0, call_.csr.rows - 1, begin) / side * side;
    const int64_t last_row = row_of(crow, first_row, call_.csr.rows - 1, end - 1) / side * side + side;
    const std::vector<int64_t> starts = starts_of(first_row, last_row, begin, end, first_column);
    std::vector<int64_t> cursors(starts.size());
    const int64_t columns = last_column - first_column;
    const int64_t panels = (columns + kPanelColumns - 1) / kPanelColumns;
    const int64_t panel_columns = (columns / side + panels - 1) / panels * side;
    char* grad = kept_workspace((last_row - first_row + panel_columns) * kPackedBytes);
    char* input = grad + (last_row - first_row) * kPackedBytes;
    for (int64_t token = 0; token < call_.tokens; token += bodies_.block_tokens) {
      pack(call_.grad, token, first_row, last_row, grad);
      std::copy(starts.begin(), starts.end(), cursors.begin());
      for (int64_t column = first_column; column < last_column; column += panel_columns) {
        const int64_t stop = std::min(column + panel_columns, last_column);
        pack(call_.input, token, column, stop, input);
        const bool last = stop == last_column;
        const int64_t next = last ? token + bodies_.block_tokens : token;
        const int64_t next_column = last ? first_column : stop;
        const SampledGradPanel<Real> panel{
            grad,
            input,
            tokens_of(token),
            column,
            stop,
            call_.csr,
            static_cast<Real*>(call_.values),
            {ahead(call_.grad, next, first_row, last ? last_row : first_row),
             ahead(call_.input, next, next_column, std::min(next_column + panel_columns, last_column))}};
        (side == 1 ? bodies_.product : bodies_.block_product)(panel, first_row, last_row, end,
                                                              cursors.data());
      }
    }
  }

  // Of a range of rows: a cut goes through no block.
  int64_t first_entry(int64_t range) const {
    const int64_t area = call_.side * call_.side;
    return range * (call_.csr.nnz / area) / parts_.of_rows * area;
  }

  // By row, or by a block row's first row, the first of the entries [begin, end) that isn't before a column.
  std::vector<int64_t> starts_of(int64_t first_row, int64_t last_row, int64_t begin, int64_t end,
                                 int64_t column) const {
    const int64_t side = call_.side;
    std::vector<int64_t> starts;
    for (int64_t row = first_row; row < last_row; row += side) {
      const int32_t* col = call_.csr.col_indices;
      const int64_t row_begin = call_.csr.crow_indices[row], row_end = call_.csr.crow_indices[row + side];
      const int64_t first = row_begin + (std::max(begin, row_begin) - row_begin) / side;
      const int64_t last = row_begin + (std::min(end, row_end) - row_begin) / side;
      starts.push_back(column == 0 ? first : std::lower_bound(col + first, col + last, column) - col);
    }
    return starts;
  }

  int64_t tokens_of(int64_t first) const { return std::min(bodies_.block_tokens, call_.tokens - first); }

  ReadAhead ahead(const Factor& factor, int64_t token, int64_t begin, int64_t end) const {
    if (token >= call_.tokens || begin == end) return {};
    const char* data =
        static_cast<const char*>(factor.data) + (token * factor.stride + begin) * element_size_;
    return {data, tokens_of(token), factor.stride * element_size_, (end - begin) * element_size_, 1, 0};
  }

  void pack(const Factor& factor, int64_t token, int64_t begin, int64_t end, char* packed) const {
    const char* data = static_cast<const char*>(factor.data) + token * factor.stride * element_size_;
    bodies_.pack(data, factor.stride, tokens_of(token), begin, end, packed);
  }

  const SampledGradCall& call_;
  int64_t element_size_;
  const SampledGradBodies<Real>& bodies_;
  Parts parts_;
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
