// The emulated mma and ldmatrix against the layouts that CuTe, CUTLASS's layout library, gives for the
// instructions: fragments are filled and read by its tables alone.
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>

#include <cstdio>
#include <cstring>
#include <vector>

#include "../../csrc/kernels/block_lora.cuh"
#include "options.h"

namespace {

using partune::ldmatrix_x4;
using partune::mma_bf16_16x8x16;

template <bool kShuffles>
__global__ void multiply(const uint32_t* a, const uint32_t* b, const float* c, float* d) {
  const int lane = int(threadIdx.x);
  uint32_t left[4], right[2];
  float added[4], sum[4];
  std::memcpy(left, a + 4 * lane, sizeof left);
  std::memcpy(right, b + 2 * lane, sizeof right);
  std::memcpy(added, c + 4 * lane, sizeof added);
  if (kShuffles) {
    std::memcpy(sum, added, sizeof sum);
    partune::multiply_by_shuffles(sum, left, right);
  } else {
    mma_bf16_16x8x16(sum, left, right, added);
  }
  std::memcpy(d + 4 * lane, sum, sizeof sum);
}

__global__ void load(const uint32_t* rows, uint32_t* fragments) {
  SHARED(uint4, shared, [32]);
  const int lane = int(threadIdx.x);
  std::memcpy(&shared[lane], rows + 4 * lane, sizeof(uint4));
  __syncthreads();
  uint32_t r[4];
  ldmatrix_x4(r, &shared[lane]);
  std::memcpy(fragments + 4 * lane, r, sizeof r);
}

// Small integers, so that every product and sum is exact.
int number(int seed, int i) { return (i * 7919 + seed * 104729) % 31 - 15; }

uint16_t bf16(int value) {
  const float wide = float(value);
  uint32_t bits;
  std::memcpy(&bits, &wide, sizeof bits);
  return uint16_t(bits >> 16);
}

// How many of the product's elements are not where CuTe looks for them.
template <bool kShuffles>
int wrong_in_mma() {
  using Traits = cute::MMA_Traits<cute::SM80_16x8x16_F32BF16BF16F32_TN>;
  // (lane, value) to the element's number, columns of a, b and c one after the other.
  constexpr Traits::ALayout a_layout;
  constexpr Traits::BLayout b_layout;
  constexpr Traits::CLayout c_layout;
  std::vector<uint16_t> a(32 * 8), b(32 * 4);
  std::vector<float> c(32 * 4), d(32 * 4);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 8; ++i) a[size_t(lane * 8 + i)] = bf16(number(1, int(a_layout(lane, i))));
    for (int i = 0; i < 4; ++i) b[size_t(lane * 4 + i)] = bf16(number(2, int(b_layout(lane, i))));
    for (int i = 0; i < 4; ++i) c[size_t(lane * 4 + i)] = float(number(3, int(c_layout(lane, i))));
  }
  LAUNCH(multiply<kShuffles>, dim3(1), dim3(32), 0, nullptr, reinterpret_cast<const uint32_t*>(a.data()),
         reinterpret_cast<const uint32_t*>(b.data()), c.data(), d.data());
  int wrong = 0;
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int element = int(c_layout(lane, i)), row = element % 16, column = element / 16;
      int sum = number(3, element);
      for (int k = 0; k < 16; ++k) sum += number(1, row + 16 * k) * number(2, column + 8 * k);
      wrong += d[size_t(lane * 4 + i)] != float(sum);
    }
  }
  return wrong;
}

int wrong_in_ldmatrix() {
  using Traits = cute::Copy_Traits<cute::SM75_U32x4_LDSM_N>;
  constexpr Traits::SrcLayout source;       // (lane, bit of its row) to a number
  constexpr Traits::DstLayout destination;  // (lane, bit of its registers) to the same
  std::vector<uint32_t> rows(32 * 4), fragments(32 * 4);
  for (size_t i = 0; i < rows.size(); ++i) rows[i] = uint32_t(i) * 0x9E3779B9u + 1;
  LAUNCH(load, dim3(1), dim3(32), 0, nullptr, rows.data(), fragments.data());
  std::vector<bool> bits(32 * 128);
  const auto bit = [](const std::vector<uint32_t>& words, int lane, int i) {
    return (words[size_t(lane * 4 + i / 32)] >> (i % 32) & 1u) != 0;
  };
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 128; ++i) bits[size_t(int(source(lane, i)))] = bit(rows, lane, i);
  }
  int wrong = 0;
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 128; ++i) wrong += bits[size_t(int(destination(lane, i)))] != bit(fragments, lane, i);
  }
  return wrong;
}

}  // namespace

int main() {
  emulator_set_arch(80);
  const int mma = wrong_in_mma<false>(), shuffles = wrong_in_mma<true>(), ldmatrix = wrong_in_ldmatrix();
  std::printf("mma: %d of 128 wrong\nshuffles: %d of 128 wrong\nldmatrix: %d of 4096 bits wrong\n", mma,
              shuffles, ldmatrix);
  return mma + shuffles + ldmatrix == 0 ? 0 : 1;
}
