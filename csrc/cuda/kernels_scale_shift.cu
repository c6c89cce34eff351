// Family scale_shift's CUDA kernels but float64's.
#include "launchers.h"
#include "scale_shift.cuh"

namespace partune {

int64_t scale_shift_rows_of_sums(const ChannelLayout& layout) { return count_rows_of_sums(layout); }
int64_t scale_shift_norm_block_rows(int64_t rows) { return rows_of_norm_block(rows); }

const ScaleShiftLaunchers scale_shift_float32 = ScaleShift<float, float>::launchers();
const ScaleShiftLaunchers scale_shift_bfloat16 = ScaleShift<BFloat16, float>::launchers();
const ScaleShiftLaunchers scale_shift_half = ScaleShift<Half, float>::launchers();

}  // namespace partune
