// Family block_lora's CUDA kernels but float64's.
#include "block_lora.cuh"
#include "launchers.h"

namespace partune {

const BlockLoraLaunchers<float> block_lora_float32 = BlockLora<float, float>::launchers();
const BlockLoraLaunchers<float> block_lora_bfloat16 = BlockLora<BFloat16, float>::launchers();
const BlockLoraLaunchers<float> block_lora_half = BlockLora<Half, float>::launchers();

}  // namespace partune
