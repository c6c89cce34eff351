// The CPU bodies of family half_mask, as a table: one is built per ISA.
#pragma once
#include "half_mask.h"
#include "sparse_adamw_cpu.h"

namespace partune {

struct HalfMaskCpu {
  // Steps tiles [first, last) of one matrix: of kHalfTile live entries for rows and columns, of
  // kHalfTile entries for elements.
  void (*step[kSparseAdamWTypesCount])(const HalfMatrix&, const SparseAdamWStep&, PhiloxKey mask_key,
                                       int64_t first, int64_t last);
  // Draws the words of tiles [first, last) of a mask of `count` entries, whole counters at a time.
  void (*draw)(int64_t first, int64_t last, int64_t count, uint32_t mask_id, PhiloxKey mask_key,
               uint32_t* mask);
  // Counts the live entries of tiles [first, last) among `count`.
  void (*count)(const uint32_t* mask, int64_t first, int64_t last, int64_t count, int64_t* counts);
};

namespace baseline {
extern const HalfMaskCpu half_mask_cpu;
}
namespace avx2 {
extern const HalfMaskCpu half_mask_cpu;
}
namespace avx512 {
extern const HalfMaskCpu half_mask_cpu;
}
namespace avx512_bf16 {  // nothing in it for these bodies
using avx512::half_mask_cpu;
}

}  // namespace partune
