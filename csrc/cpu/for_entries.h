// Work on a list of matrices, split by entries, not by rows or matrices: principal rows are skewed, and a
// list mixes large matrices with small ones.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

namespace partune {

constexpr int64_t kEntryGrain = 8192;  // entries: below that a second thread costs more than it saves

// body(matrix number, begin, end) over all entries of a list, on all threads.
template <typename Matrix, typename Body>
void for_entries(const std::vector<Matrix>& matrices, const Body& body) {
  std::vector<int64_t> starts{0};  // [matrices + 1]
  for (const Matrix& matrix : matrices) starts.push_back(starts.back() + matrix.nnz);
  torch::stable::parallel_for(0, starts.back(), kEntryGrain, [&](int64_t begin, int64_t end) {
    size_t i = size_t(std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin()) - 1;
    for (; i < matrices.size() && starts[i] < end; ++i) {
      body(i, std::max(begin - starts[i], int64_t(0)), std::min(end, starts[i + 1]) - starts[i]);
    }
  });
}

}  // namespace partune
