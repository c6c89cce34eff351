// The emulated twins of kit.cuh's inline PTX; what they mean is told there.
#pragma once
#include <cstdint>
#include <cstring>

#include "core.h"

namespace emulator {

template <int Bytes>
inline void cp_async(void* shared, const void* global, bool valid, EMULATOR_CALL_SITE) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "what the hardware copies at once");
  copy_async(shared, global, Bytes, valid, site);
}

inline void cp_async_commit() { commit_copies(); }

template <int Keep>
inline void cp_async_wait() {
  static_assert(Keep >= 0, "a number of groups");
  wait_for_copies(Keep);
}

inline bool has_bf16_mma() { return arch() >= 80; }

struct MmaFragments {
  uint32_t a[4], b[2];
  float c[4], d[4];
};

inline float bf16_of_pair(uint32_t pair, int which) {
  const uint32_t bits = (which ? pair >> 16 : pair & 0xffffu) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// In which order the hardware adds is not specified; here the sum is exact but for its last rounding.
inline void exchange_mma(void* const* slots, unsigned) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const MmaFragments& own = *static_cast<MmaFragments*>(slots[lane]);
    const int group = lane / 4, pair = 2 * (lane % 4);
    for (int which = 0; which < 2; ++which) {
      for (int i = 0; i < 4; ++i) {
        a[group + 8 * (i % 2)][pair + which + 8 * (i / 2)] = bf16_of_pair(own.a[i], which);
      }
      for (int i = 0; i < 2; ++i) b[pair + which + 8 * i][group] = bf16_of_pair(own.b[i], which);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    MmaFragments& own = *static_cast<MmaFragments*>(slots[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      double sum = double(own.c[i]);
      for (int k = 0; k < 16; ++k) sum += double(a[row][k]) * double(b[k][column]);
      own.d[i] = float(sum);
    }
  }
}

inline void mma_bf16_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             const float (&c)[4], EMULATOR_CALL_SITE) {
  if (arch() < 80) fail("mma of bf16 needs sm_80", site);
  MmaFragments own;
  std::memcpy(own.a, a, sizeof a);
  std::memcpy(own.b, b, sizeof b);
  std::memcpy(own.c, c, sizeof c);
  warp_collective("mma", exchange_mma, kFullMask, &own, site);
  std::memcpy(d, own.d, sizeof d);
}

struct MatrixRows {
  uint32_t row[4];
  uint32_t r[4];
};

inline void exchange_ldmatrix(void* const* slots, unsigned) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const MatrixRows& owner = *static_cast<MatrixRows*>(slots[8 * i + lane / 4]);
      static_cast<MatrixRows*>(slots[lane])->r[i] = owner.row[lane % 4];
    }
  }
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, EMULATOR_CALL_SITE) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("ldmatrix of a row not aligned to 16 bytes", site);
  MatrixRows own;
  // Read by the lane that names the row, so that the sanitizers see who reads what.
  const uint32_t* words = static_cast<const uint32_t*>(row);
  for (int i = 0; i < 4; ++i) own.row[i] = words[i];
  warp_collective("ldmatrix", exchange_ldmatrix, kFullMask, &own, site);
  std::memcpy(r, own.r, sizeof r);
}

}  // namespace emulator
