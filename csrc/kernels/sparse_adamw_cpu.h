// The CPU bodies of family sparse_adamw, as a table: one is built per ISA.
#pragma once
#include "sparse_adamw.h"

namespace partune {

// Everything about a step that is no matrix. float64 holds both computing types without loss.
struct SparseAdamWStep {
  AdamWHyperparameters<double> hyperparameters;
  double lr, grad_scale;
  PhiloxKey key;
  uint32_t offset;
};

struct SparseAdamWCpu {
  // Steps entries [begin, end) of one matrix.
  void (*step[kSparseAdamWTypesCount])(const SparseAdamWMatrix&, const SparseAdamWStep&, int64_t begin,
                                       int64_t end);
  // Whether a gradient among entries [begin, end) is NaN or infinite; by the gradient's dtype.
  bool (*found_inf_float64)(const SparseAdamWMatrix&, int64_t begin, int64_t end);
  bool (*found_inf_float32)(const SparseAdamWMatrix&, int64_t begin, int64_t end);
  bool (*found_inf_bfloat16)(const SparseAdamWMatrix&, int64_t begin, int64_t end);
  bool (*found_inf_half)(const SparseAdamWMatrix&, int64_t begin, int64_t end);
};

namespace baseline {
extern const SparseAdamWCpu sparse_adamw_cpu;
}
namespace avx2 {
extern const SparseAdamWCpu sparse_adamw_cpu;
}
namespace avx512 {
extern const SparseAdamWCpu sparse_adamw_cpu;
}
namespace avx512_bf16 {  // nothing in it for these bodies
using avx512::sparse_adamw_cpu;
}

}  // namespace partune
