// The CPU bodies of family select, as a table: one is built per ISA.
#pragma once
#include "select.h"

namespace partune {

// Keys in [first, last].
template <typename Key>
struct KeyRange {
  Key first, last;
};

template <typename Real>
struct SelectBodies {
  using Key = typename KeyOf<Real>::Type;
  // counts[(key - range.first) >> shift] += 1 for each score whose key lies in the range.
  void (*histogram)(const Real* scores, int64_t count, bool largest, KeyRange<Key> range, int shift,
                    int64_t* counts);
  // How many keys of a row lie above the range and inside it; those inside are also listed in order,
  // unless keys is null.
  void (*collect)(const Real* scores, int64_t count, bool largest, KeyRange<Key> range, int64_t* above,
                  int64_t* inside, Key* keys);
  // Columns of the keys above the threshold and of the first `ties` keys equal to it, ascending.
  void (*emit)(const Real* scores, int64_t count, bool largest, Key threshold, int64_t ties,
               int32_t* columns);
  // out [rows, columns] = |left [rows, rank] @ right [rank, columns]|, each entry one chain of fused
  // multiply-adds in ascending rank, whatever the blocking; packed holds packed_size(rank) numbers.
  void (*product)(const Real* left, const Real* right, int64_t rows, int64_t rank, int64_t columns,
                  Real* packed, Real* out);
  int64_t (*packed_size)(int64_t rank);
};

struct SelectCpu {
  SelectBodies<float> float32;
  SelectBodies<double> float64;
  void (*widen_bfloat16)(const BFloat16* scores, int64_t count, float* out);
  void (*widen_half)(const Half* scores, int64_t count, float* out);
  void (*random)(int64_t begin, int64_t end, uint32_t step, uint32_t parameter_id, PhiloxKey key,
                 float* scores);
};

namespace baseline {
extern const SelectCpu select_cpu;
}
namespace avx2 {
extern const SelectCpu select_cpu;
}
namespace avx512 {
extern const SelectCpu select_cpu;
}
namespace avx512_bf16 {  // nothing in it for these bodies
using avx512::select_cpu;
}

}  // namespace partune
