// Vectors of channels as the CPU bodies of family scale_shift take them, and what else its two bindings
// share.
#pragma once
#include <torch/csrc/stable/ops.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <vector>

#include "../binding/scale_shift.h"
#include "../kernels/scale_shift_cpu.h"

namespace partune {

// Below that many elements a second thread costs more than it saves.
constexpr int64_t kScaleShiftGrain = 16384;
// Results above that size are written around the caches: nobody would find them there. Not where they
// overwrite their input, whose lines are in the cache.
constexpr int64_t kStreamBytes = int64_t{32} << 20;

inline bool is_streamed(const Tensor& like) {
  return like.numel() * int64_t(like.element_size()) > kStreamBytes;
}

// Memory that glibc takes from the system anew at each call, and gives back: its largest threshold. What is
// smaller comes from a heap that keeps its pages; there, asking for huge ones made calls twice as slow.
constexpr uintptr_t kFreshBytes = uintptr_t{32} << 20;

// An uninitialised tensor like another. Where its pages are new the system is asked for huge ones: at
// 4 KiB a page faults cost more than the kernel.
inline Tensor empty_output(const Tensor& like) {
  Tensor output = torch::stable::empty_like(like);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  const uintptr_t bytes = uintptr_t(like.numel()) * like.element_size();
  if (bytes >= kFreshBytes) {
    char* data = static_cast<char*>(output.mutable_data_ptr());
    const uintptr_t before = -reinterpret_cast<uintptr_t>(data) & (kPage - 1);
    madvise(data + before, (bytes - before) & ~(kPage - 1), MADV_HUGEPAGE);
  }
#endif
  return output;
}

// A vector in the computing type: itself, or a widened copy, or a constant where there is none.
template <typename Real>
class WideVector {
 public:
  WideVector(const OptionalTensor& vector, int64_t channels, Real missing) {
    if (!vector) {
      copy_.assign(size_t(channels), missing);
    } else if (int64_t(vector->element_size()) == int64_t(sizeof(Real))) {
      data_ = static_cast<const Real*>(vector->const_data_ptr());
    } else if (vector->scalar_type() == ScalarType::BFloat16) {
      widen_all(static_cast<const BFloat16*>(vector->const_data_ptr()), channels);
    } else {
      widen_all(static_cast<const Half*>(vector->const_data_ptr()), channels);
    }
  }

  const Real* data() const { return data_ ? data_ : copy_.data(); }
  Real* own(int64_t channels) {
    if (data_) copy_.assign(data_, data_ + channels);
    data_ = nullptr;
    return copy_.data();
  }

 private:
  template <typename Stored>
  void widen_all(const Stored* stored, int64_t channels) {
    copy_.resize(size_t(channels));
    for (int64_t i = 0; i < channels; ++i) copy_[size_t(i)] = Real(widen(stored[i]));
  }

  const Real* data_ = nullptr;
  std::vector<Real> copy_;
};

inline Tensor empty_vector(const Tensor& like, int64_t size) {
  return torch::stable::empty({size}, like.scalar_type(), std::nullopt, like.device());
}

// body(bodies) with the table of a tensor's dtype.
template <typename Table, typename Body>
auto with_bodies(const Table& table, const Tensor& tensor, const Body& body) {
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

// Sums partial rows into the gradients of scale and shift, on all threads.
template <typename Real>
void sum_partial_rows(const ScaleShiftBodies<Real>& bodies, const ColumnSums<Real>& sums) {
  const int64_t grain = kScaleShiftGrain / (2 * sums.rows + 1) + 1;
  torch::stable::parallel_for(0, sums.channels, grain,
                              [&](int64_t begin, int64_t end) { bodies.sum_columns(sums, begin, end); });
}

}  // namespace partune
