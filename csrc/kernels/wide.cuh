// 16 bytes of neighbours in memory, read and written in one access where they are aligned to that.
#pragma once
#include "kit.cuh"

namespace partune {

template <typename T>
constexpr int kPackSize = 16 / int(sizeof(T));

// Neighbours in memory, read and written in one access: 16 bytes, or one element.
template <typename T, int kPack>
struct alignas(kPack * sizeof(T)) Neighbours {
  T at[kPack];
};

template <int kPack, typename T>
PARTUNE_FN Neighbours<T, kPack> load_neighbours(const T* from) {
  return *reinterpret_cast<const Neighbours<T, kPack>*>(from);
}

template <typename T, int kPack>
PARTUNE_FN void store_neighbours(const Neighbours<T, kPack>& pack, T* to) {
  if constexpr (kPack == kPackSize<T>) {
    uint4 words;
    __builtin_memcpy(&words, &pack, sizeof words);
    __stcg(reinterpret_cast<uint4*>(to), words);  // the compiler stores an assigned struct in parts
  } else {
    *reinterpret_cast<Neighbours<T, kPack>*>(to) = pack;
  }
}

template <typename T>
PARTUNE_FN bool is_wide_aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// A pack of which some elements may lie behind a row's end.
template <typename T>
using WidePack = Neighbours<T, kPackSize<T>>;

template <typename T>
PARTUNE_FN WidePack<T> load_wide(const T* from, int64_t count, bool aligned) {
  if (aligned && count >= kPackSize<T>) return load_neighbours<kPackSize<T>>(from);
  WidePack<T> pack = {};
  PARTUNE_UNROLL
  for (int i = 0; i < kPackSize<T>; ++i) {
    if (i < count) pack.at[i] = from[i];
  }
  return pack;
}

template <typename T>
PARTUNE_FN void store_wide(const WidePack<T>& pack, T* to, int64_t count, bool aligned) {
  if (aligned && count >= kPackSize<T>) {
    store_neighbours(pack, to);
    return;
  }
  PARTUNE_UNROLL
  for (int i = 0; i < kPackSize<T>; ++i) {
    if (i < count) to[i] = pack.at[i];
  }
}

}  // namespace partune
