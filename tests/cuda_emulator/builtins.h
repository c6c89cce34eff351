// CUDA's builtins, as far as kernels here use them. What is missing on purpose doesn't compile:
// __activemask and cooperative groups hide who takes part, __reduce_*_sync needs sm_80.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "core.h"

#undef __launch_bounds__  // an attribute that the host compiler doesn't know
#define __launch_bounds__(...)

// ---- barriers and fences ----

inline void __syncthreads(EMULATOR_CALL_SITE) {
  emulator::sync_block("__syncthreads", emulator::Vote::kNone, false, site);
}
inline int __syncthreads_count(int predicate, EMULATOR_CALL_SITE) {
  return emulator::sync_block("__syncthreads_count", emulator::Vote::kCount, predicate != 0, site);
}
inline int __syncthreads_and(int predicate, EMULATOR_CALL_SITE) {
  return emulator::sync_block("__syncthreads_and", emulator::Vote::kAnd, predicate != 0, site);
}
inline int __syncthreads_or(int predicate, EMULATOR_CALL_SITE) {
  return emulator::sync_block("__syncthreads_or", emulator::Vote::kOr, predicate != 0, site);
}
inline void __syncwarp(unsigned mask = emulator::kFullMask, EMULATOR_CALL_SITE) {
  emulator::sync_warp(mask, site);
}
inline void __threadfence() { emulator::fence(); }
inline void __threadfence_block() { emulator::fence(); }

// ---- shuffles: a lane whose source is out of range keeps its own value ----

namespace emulator {

template <typename T>
struct ShuffleSlot {
  T value, result;
  int which, width;
  CallSite site;
};

// Source is a functor: (lane, first lane of its segment, width, argument) → source lane, or -1.
template <typename Source, typename T>
void exchange_shuffle(void* const* slots, unsigned lanes) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    auto& own = *static_cast<ShuffleSlot<T>*>(slots[lane]);
    const int source = Source{}(lane, lane & ~(own.width - 1), own.width, own.which);
    if (source >= 0 && !(lanes >> source & 1)) {
      fail("a shuffle reads lane " + std::to_string(source) + ", which doesn't take part,", own.site);
    }
    own.result = source < 0 ? own.value : static_cast<ShuffleSlot<T>*>(slots[source])->value;
  }
}

template <typename Source, typename T>
T shuffle(const char* name, unsigned mask, T value, int which, int width, CallSite site) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4, "CUDA shuffles 4 or 8 bytes");
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) fail("a shuffle of an impossible width", site);
  ShuffleSlot<T> slot{value, value, which, width, site};
  warp_collective(name, exchange_shuffle<Source, T>, mask, &slot, site);
  return slot.result;
}

struct SourceIndex {
  int operator()(int, int first, int width, int index) const { return first + (index & (width - 1)); }
};
struct SourceUp {
  int operator()(int lane, int first, int, int delta) const {
    return lane - delta >= first ? lane - delta : -1;
  }
};
struct SourceDown {
  int operator()(int lane, int first, int width, int delta) const {
    return lane + delta < first + width ? lane + delta : -1;
  }
};
struct SourceXor {
  int operator()(int lane, int first, int width, int bits) const {
    return (lane ^ bits) < first + width ? (lane ^ bits) : -1;
  }
};

}  // namespace emulator

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, EMULATOR_CALL_SITE) {
  // The hardware counts on from lane 0, which nobody means.
  if (lane < 0 || lane >= width) {
    emulator::fail("a shuffle of " + std::to_string(width) + " lanes reads lane " + std::to_string(lane),
                   site);
  }
  return emulator::shuffle<emulator::SourceIndex>("__shfl_sync", mask, value, lane, width, site);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_CALL_SITE) {
  return emulator::shuffle<emulator::SourceUp>("__shfl_up_sync", mask, value, int(delta), width, site);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_CALL_SITE) {
  return emulator::shuffle<emulator::SourceDown>("__shfl_down_sync", mask, value, int(delta), width, site);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EMULATOR_CALL_SITE) {
  return emulator::shuffle<emulator::SourceXor>("__shfl_xor_sync", mask, value, bits, width, site);
}

// ---- votes and matches ----

namespace emulator {

struct VoteSlot {
  uint64_t value;
  unsigned equal_lanes;
};

// Every lane learns which lanes of the group brought the value that it brought.
inline void exchange_votes(void* const* slots, unsigned lanes) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    VoteSlot& own = *static_cast<VoteSlot*>(slots[lane]);
    own.equal_lanes = 0;
    for (int other = 0; other < 32; ++other) {
      if ((lanes >> other & 1) && static_cast<VoteSlot*>(slots[other])->value == own.value) {
        own.equal_lanes |= 1u << other;
      }
    }
  }
}

inline unsigned lanes_of_equal_value(const char* name, unsigned mask, uint64_t value, CallSite site) {
  VoteSlot slot{value, 0};
  warp_collective(name, exchange_votes, mask, &slot, site);
  return slot.equal_lanes;
}

inline unsigned ballot(const char* name, unsigned mask, bool predicate, CallSite site) {
  const unsigned equal = lanes_of_equal_value(name, mask, predicate ? 1 : 0, site);
  return predicate ? equal : mask & ~equal;
}

}  // namespace emulator

inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_CALL_SITE) {
  return emulator::ballot("__ballot_sync", mask, predicate != 0, site);
}
inline int __any_sync(unsigned mask, int predicate, EMULATOR_CALL_SITE) {
  return emulator::ballot("__any_sync", mask, predicate != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, EMULATOR_CALL_SITE) {
  return emulator::ballot("__all_sync", mask, predicate != 0, site) == mask;
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value, EMULATOR_CALL_SITE) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4, "CUDA matches 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return emulator::lanes_of_equal_value("__match_any_sync", mask, bits, site);
}

// ---- atomics: real ones, so that the race checker knows them ----

namespace emulator {

template <typename T>
using Same = std::common_type_t<T>;  // nothing is deduced from this argument

// Replaces the value by update(value); the old one.
template <typename T, typename Update>
T replace_atomically(T* address, Update update, CallSite site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "what CUDA updates at once");
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) fail("a misaligned atomic", site);
  Bits* const place = reinterpret_cast<Bits*>(address);
  Bits before = __atomic_load_n(place, __ATOMIC_RELAXED), after;
  T old;
  do {
    std::memcpy(&old, &before, sizeof old);
    const T updated = update(old);
    std::memcpy(&after, &updated, sizeof after);
  } while (!__atomic_compare_exchange_n(place, &before, after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  note_atomic(address);
  return old;
}

template <typename T, typename... Wanted>
constexpr bool is_one_of = (std::is_same_v<T, Wanted> || ...);

}  // namespace emulator

template <typename T>
T atomicAdd(T* address, emulator::Same<T> value, EMULATOR_CALL_SITE) {
  static_assert(emulator::is_one_of<T, int, unsigned, unsigned long long, float, double>, "as in CUDA");
  if constexpr (std::is_same_v<T, int>) {  // wraps
    return emulator::replace_atomically(
        address, [=](T old) { return T(unsigned(old) + unsigned(value)); }, site);
  } else {
    return emulator::replace_atomically(address, [=](T old) { return old + value; }, site);
  }
}
template <typename T>
T atomicSub(T* address, emulator::Same<T> value, EMULATOR_CALL_SITE) {
  static_assert(emulator::is_one_of<T, int, unsigned>, "as in CUDA");
  return emulator::replace_atomically(
      address, [=](T old) { return T(unsigned(old) - unsigned(value)); }, site);
}
template <typename T>
T atomicMax(T* address, emulator::Same<T> value, EMULATOR_CALL_SITE) {
  static_assert(emulator::is_one_of<T, int, unsigned, long long, unsigned long long>, "as in CUDA");
  return emulator::replace_atomically(address, [=](T old) { return old < value ? value : old; }, site);
}
template <typename T>
T atomicMin(T* address, emulator::Same<T> value, EMULATOR_CALL_SITE) {
  static_assert(emulator::is_one_of<T, int, unsigned, long long, unsigned long long>, "as in CUDA");
  return emulator::replace_atomically(address, [=](T old) { return value < old ? value : old; }, site);
}
template <typename T>
T atomicAnd(T* address, emulator::Same<T> value, EMULATOR_CALL_SITE) {
  static_assert(emulator::is_one_of<T, int, unsigned, unsigned long long>, "as in CUDA");
  return emulator::replace_atomically(address, [=](T old) { return old & value; }, site);
}
template <typename T>
T atomicOr(T* address, emulator::Same<T> value, EMULATOR_CALL_SITE) {
  static_assert(emulator::is_one_of<T, int, unsigned, unsigned long long>, "as in CUDA");
  return emulator::replace_atomically(address, [=](T old) { return old | value; }, site);
}
template <typename T>
T atomicExch(T* address, emulator::Same<T> value, EMULATOR_CALL_SITE) {
  static_assert(emulator::is_one_of<T, int, unsigned, unsigned long long, float>, "as in CUDA");
  return emulator::replace_atomically(address, [=](T) { return value; }, site);
}
template <typename T>
T atomicCAS(T* address, emulator::Same<T> expected, emulator::Same<T> value, EMULATOR_CALL_SITE) {
  static_assert(emulator::is_one_of<T, int, unsigned, unsigned long long>, "as in CUDA");
  return emulator::replace_atomically(address, [=](T old) { return old == expected ? value : old; }, site);
}

// ---- loads and stores with a cache hint ----

template <typename T>
T __ldg(const T* from) {
  return *from;
}
template <typename T>
T __ldcg(const T* from) {
  return *from;
}
template <typename T>
T __ldcs(const T* from) {
  return *from;
}
template <typename T>
void __stcg(T* to, emulator::Same<T> value) {
  *to = value;
}
template <typename T>
void __stcs(T* to, emulator::Same<T> value) {
  *to = value;
}

// ---- bits ----

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll((unsigned long long)x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (x >> bit & 1u) << (31 - bit);
  return reversed;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline int __float_as_int(float x) { return int(__float_as_uint(x)); }
inline float __int_as_float(int bits) { return __uint_as_float(unsigned(bits)); }

// ---- arithmetic ----

inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
template <typename T>
T min(T a, emulator::Same<T> b) {
  return b < a ? b : a;
}
template <typename T>
T max(T a, emulator::Same<T> b) {
  return a < b ? b : a;
}
[[noreturn]] inline void __trap(EMULATOR_CALL_SITE) { emulator::fail("__trap()", site); }
