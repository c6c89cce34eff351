// Family select on the CPU: radix selection. Histograms of the scores' keys narrow the range that
// holds the k-th best until few enough candidates are left to be listed; then the threshold is exact,
// and one more pass writes the CSR. The scores are read, or formed, a panel of rows at a time.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "../binding/select.h"
#include "../kernels/select_cpu.h"
#include "isa.h"
#include "scalars.h"

namespace partune {
namespace {

// ---- where scores come from: panel(first, last, workspace) gives rows [first, last) ----

template <typename Real>
struct StoredScores {
  using Score = Real;
  const Real* scores;
  int64_t columns;

  int64_t workspace_size(int64_t) const { return 0; }
  const Real* panel(int64_t first, int64_t, Real*) const { return scores + first * columns; }
};

template <typename Stored>
struct WidenedScores {
  using Score = float;
  const Stored* scores;
  int64_t columns;
  void (*widen)(const Stored*, int64_t, float*);

  int64_t workspace_size(int64_t rows) const { return rows * columns; }
  const float* panel(int64_t first, int64_t last, float* workspace) const {
    widen(scores + first * columns, (last - first) * columns, workspace);
    return workspace;
  }
};

template <typename Real>
struct FactorScores {
  using Score = Real;
  const Real *left, *right;
  int64_t rank, columns;
  const SelectBodies<Real>& bodies;

  int64_t workspace_size(int64_t rows) const { return bodies.packed_size(rank) + rows * columns; }
  const Real* panel(int64_t first, int64_t last, Real* workspace) const {
    Real* out = workspace + bodies.packed_size(rank);
    bodies.product(left + first * rank, right, last - first, rank, columns, workspace, out);
    return out;
  }
};

// ---- selection ----

template <typename Source>
class Selector {
  using Score = typename Source::Score;
  using Key = typename KeyOf<Score>::Type;
  static constexpr int kKeyBits = int(sizeof(Key)) * 8;

 public:
  Selector(const Source& source, const SelectBodies<Score>& bodies, int64_t rows, bool largest)
      : source_(source), bodies_(bodies), rows_(rows), columns_(source.columns), largest_(largest) {
    // A panel and its keys stay in the cache, and are a small part of what they stand for.
    const int64_t fitting = (int64_t(512) << 10) / int64_t(sizeof(Score)) / std::max<int64_t>(columns_, 1);
    const int64_t small = rows / 64;
    panel_rows_ = std::max<int64_t>(6, std::min(fitting, small) / 6 * 6);
    panels_ = (rows + panel_rows_ - 1) / panel_rows_;
  }

  Csr topk(int64_t k, const Tensor& like) {
    const int64_t total = rows_ * columns_;
    KeyRange<Key> range{0, Key(~Key(0))};
    int64_t wanted = k, inside = total;
    int digit_bits = 8;
    while (digit_bits < 14 && (total >> (digit_bits + 9)) > 0) ++digit_bits;
    const int64_t listable = std::max<int64_t>(1024, total / 64);
    for (int bits = kKeyBits; bits > 0 && inside > listable; bits -= std::min(bits, digit_bits)) {
      narrow(range, bits - std::min(bits, digit_bits), std::min(bits, digit_bits), wanted, inside);
    }
    collect(range);
    int64_t ties = wanted;
    const Key threshold = range.first == range.last ? range.first : exact_threshold(wanted, ties);
    return emit(threshold, ties, like);
  }

  Csr above(double threshold, const Tensor& like) {
    const Key key = score_key(last_excluded<Score>(threshold, largest_), largest_);
    collect({key, key});
    return emit(key, 0, like);
  }

 private:
  // body(panel number, first row, last row, scores)
  template <typename Body>
  void for_panels(const Body& body) const {
    torch::stable::parallel_for(0, panels_, 1, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<Score[]> workspace(new Score[size_t(source_.workspace_size(panel_rows_))]);
      for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t first = panel * panel_rows_, last = std::min(rows_, first + panel_rows_);
        body(panel, first, last, source_.panel(first, last, workspace.get()));
      }
    });
  }

  // Narrows the range to the digit's bucket that holds the `wanted`-th best key.
  void narrow(KeyRange<Key>& range, int shift, int digit_bits, int64_t& wanted, int64_t& inside) const {
    std::vector<int64_t> counts(size_t(1) << digit_bits, 0);
    std::mutex merging;
    torch::stable::parallel_for(0, panels_, 1, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<Score[]> workspace(new Score[size_t(source_.workspace_size(panel_rows_))]);
      std::vector<int64_t> here(counts.size(), 0);
      for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t first = panel * panel_rows_, last = std::min(rows_, first + panel_rows_);
        const Score* scores = source_.panel(first, last, workspace.get());
        bodies_.histogram(scores, (last - first) * columns_, largest_, range, shift, here.data());
      }
      const std::lock_guard<std::mutex> lock(merging);
      for (size_t i = 0; i < counts.size(); ++i) counts[i] += here[i];
    });
    size_t bucket = counts.size() - 1;
    while (bucket > 0 && counts[bucket] < wanted) wanted -= counts[bucket--];
    inside = counts[bucket];
    range.first += Key(bucket) << shift;
    range.last = range.first + ((Key(1) << shift) - 1);
  }

  // Per row, how many keys are above the range and inside it; lists those inside a range of several.
  void collect(KeyRange<Key> range) {
    above_.assign(size_t(rows_), 0);
    inside_.assign(size_t(rows_), 0);
    keys_.assign(size_t(panels_), {});
    const bool list = range.first != range.last;
    for_panels([&](int64_t panel, int64_t first, int64_t last, const Score* scores) {
      std::vector<Key> row_keys(list ? size_t(columns_) : 0);
      std::vector<Key>& keys = keys_[size_t(panel)];
      for (int64_t row = first; row < last; ++row) {
        bodies_.collect(scores + (row - first) * columns_, columns_, largest_, range, &above_[size_t(row)],
                        &inside_[size_t(row)], list ? row_keys.data() : nullptr);
        if (list) keys.insert(keys.end(), row_keys.begin(), row_keys.begin() + inside_[size_t(row)]);
      }
      keys.shrink_to_fit();
    });
  }

  // The `wanted`-th best of the listed keys. Counts in above_ and inside_ become those of keys above
  // it and equal to it; ties is how many of the equal ones are wanted.
  Key exact_threshold(int64_t wanted, int64_t& ties) {
    std::vector<Key> all;
    for (const std::vector<Key>& keys : keys_) all.insert(all.end(), keys.begin(), keys.end());
    if (all.empty()) return Key(~Key(0));  // an empty matrix
    const auto nth = all.begin() + (std::max<int64_t>(wanted, 1) - 1);
    std::nth_element(all.begin(), nth, all.end(), std::greater<Key>());
    const Key threshold = *nth;
    ties = wanted - std::count_if(all.begin(), nth, [&](Key key) { return key > threshold; });
    for (int64_t panel = 0; panel < panels_; ++panel) {
      const Key* keys = keys_[size_t(panel)].data();
      const int64_t first = panel * panel_rows_, last = std::min(rows_, first + panel_rows_);
      for (int64_t row = first; row < last; ++row) {
        const int64_t listed = inside_[size_t(row)];
        above_[size_t(row)] += std::count_if(keys, keys + listed, [&](Key key) { return key > threshold; });
        inside_[size_t(row)] = std::count(keys, keys + listed, threshold);
        keys += listed;
      }
    }
    return threshold;
  }

  Csr emit(Key threshold, int64_t ties, const Tensor& like) const {
    using torch::stable::empty;
    const auto device = like.device();
    Tensor crow_indices = empty({rows_ + 1}, ScalarType::Long, std::nullopt, device);
    int64_t* crow = crow_indices.mutable_data_ptr<int64_t>();
    std::vector<int64_t> row_ties(size_t(rows_), 0);
    crow[0] = 0;
    for (int64_t row = 0; row < rows_; ++row) {
      const int64_t taken = std::min(ties, inside_[size_t(row)]);
      row_ties[size_t(row)] = taken;
      ties -= taken;
      crow[row + 1] = crow[row] + above_[size_t(row)] + taken;
    }
    Tensor col_indices = empty({crow[rows_]}, ScalarType::Int, std::nullopt, device);
    int32_t* columns = col_indices.mutable_data_ptr<int32_t>();
    for_panels([&](int64_t, int64_t first, int64_t last, const Score* scores) {
      for (int64_t row = first; row < last; ++row) {
        if (crow[row] == crow[row + 1]) continue;
        bodies_.emit(scores + (row - first) * columns_, columns_, largest_, threshold, row_ties[size_t(row)],
                     columns + crow[row]);
      }
    });
    return {crow_indices, col_indices};
  }

  Source source_;
  const SelectBodies<Score>& bodies_;
  int64_t rows_, columns_, panel_rows_, panels_;
  bool largest_;
  std::vector<int64_t> above_, inside_;  // [rows]
  std::vector<std::vector<Key>> keys_;   // [panels], in row order
};

// select(selector) with the selector of the scores' dtype.
template <typename Select>
Csr with_selector(const char* op, const Tensor& scores, bool largest, const Select& select) {
  STD_TORCH_CHECK(scores.is_cpu(), op, ": scores must be on the CPU");
  check_matrix(op, "scores", scores);
  const SelectCpu& cpu = PARTUNE_CPU_TABLE(select_cpu);
  const int64_t rows = scores.size(0), columns = scores.size(1);
  const void* data = scores.const_data_ptr();
  switch (scores.scalar_type()) {
    case ScalarType::Double: {
      const StoredScores<double> source{static_cast<const double*>(data), columns};
      return select(Selector<StoredScores<double>>(source, cpu.float64, rows, largest));
    }
    case ScalarType::Float: {
      const StoredScores<float> source{static_cast<const float*>(data), columns};
      return select(Selector<StoredScores<float>>(source, cpu.float32, rows, largest));
    }
    case ScalarType::BFloat16: {
      const WidenedScores<BFloat16> source{static_cast<const BFloat16*>(data), columns, cpu.widen_bfloat16};
      return select(Selector<WidenedScores<BFloat16>>(source, cpu.float32, rows, largest));
    }
    default: {
      check_dtype(op, "scores", scores, {ScalarType::Half});
      const WidenedScores<Half> source{static_cast<const Half*>(data), columns, cpu.widen_half};
      return select(Selector<WidenedScores<Half>>(source, cpu.float32, rows, largest));
    }
  }
}

Csr topk_csr(Tensor scores, int64_t k, bool largest) {
  const char* op = "topk_csr";
  return with_selector(op, scores, largest, [&](auto selector) {
    check_k(op, k, scores.size(0), scores.size(1));
    return selector.topk(k, scores);
  });
}

Csr threshold_csr(Tensor scores, double threshold, bool largest) {
  const char* op = "threshold_csr";
  check_threshold(op, threshold);
  return with_selector(op, scores, largest, [&](auto selector) { return selector.above(threshold, scores); });
}

template <typename Real>
Csr topk_of_factors(const Tensor& left, const Tensor& right, int64_t k, const SelectBodies<Real>& bodies) {
  const FactorScores<Real> source{static_cast<const Real*>(left.const_data_ptr()),
                                  static_cast<const Real*>(right.const_data_ptr()), left.size(1),
                                  right.size(1), bodies};
  return Selector<FactorScores<Real>>(source, bodies, left.size(0), true).topk(k, left);
}

Csr topk_csr_factors(Tensor left, Tensor right, int64_t k) {
  const char* op = "topk_csr_factors";
  STD_TORCH_CHECK(left.is_cpu(), op, ": left must be on the CPU");
  check_factors(op, left, right, k);
  const SelectCpu& cpu = PARTUNE_CPU_TABLE(select_cpu);
  return left.scalar_type() == ScalarType::Double ? topk_of_factors<double>(left, right, k, cpu.float64)
                                                  : topk_of_factors<float>(left, right, k, cpu.float32);
}

Tensor random_scores(int64_t rows, int64_t columns, Tensor seed, Tensor step, int64_t parameter_id) {
  const char* op = "random_scores";
  check_random(op, rows, columns);
  const uint64_t key = uint64_t(integer_value(op, "seed", seed));
  const uint32_t draw = uint32_t(integer_value(op, "step", step));
  Tensor scores = torch::stable::empty({rows, columns}, ScalarType::Float, std::nullopt, seed.device());
  float* out = scores.mutable_data_ptr<float>();
  const auto body = PARTUNE_CPU_TABLE(select_cpu).random;
  torch::stable::parallel_for(0, rows * columns, 8192, [&](int64_t begin, int64_t end) {
    body(begin, end, draw, uint32_t(parameter_id), {uint32_t(key), uint32_t(key >> 32)}, out);
  });
  return scores;
}

}  // namespace
}  // namespace partune

STABLE_TORCH_LIBRARY_IMPL(partune, CPU, library) {
  library.impl("topk_csr", TORCH_BOX(&partune::topk_csr));
  library.impl("threshold_csr", TORCH_BOX(&partune::threshold_csr));
  library.impl("topk_csr_factors", TORCH_BOX(&partune::topk_csr_factors));
  library.impl("random_scores", TORCH_BOX(&partune::random_scores));
}
