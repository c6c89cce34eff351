// What every kernel body may lean on, on the CPU and under nvcc: function attributes, the 16-bit
// storage types with their roundings, and one fused multiply-add.
//
// Functions have internal linkage: a body is built once per ISA, and a symbol shared between two
// builds would let the linker keep the wrong one.
#pragma once
#include <stdint.h>

#ifdef __CUDACC__
#define PARTUNE_FN static __device__ __forceinline__
#define PARTUNE_MEMBER __device__ __forceinline__
#define PARTUNE_UNROLL _Pragma("unroll")
#else
#define PARTUNE_FN static inline __attribute__((always_inline))
#define PARTUNE_MEMBER inline __attribute__((always_inline))
#define PARTUNE_UNROLL _Pragma("GCC unroll 16")
#endif

namespace partune {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

PARTUNE_FN int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

PARTUNE_FN uint32_t float_bits(float x) {
#ifdef __CUDACC__
  return __float_as_uint(x);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

PARTUNE_FN uint64_t double_bits(double x) {
#ifdef __CUDACC__
  return uint64_t(__double_as_longlong(x));
#else
  uint64_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

PARTUNE_FN float float_from_bits(uint32_t bits) {
#ifdef __CUDACC__
  return __uint_as_float(bits);
#else
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

// a·b + c, rounded once wherever the machine can.
#ifdef __CUDACC__
PARTUNE_FN float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
PARTUNE_FN float multiply(float a, float b) { return __fmul_rn(a, b); }
PARTUNE_FN float divide(float a, float b) { return __fdiv_rn(a, b); }
PARTUNE_FN float square_root(float x) { return __fsqrt_rn(x); }
PARTUNE_FN double multiply_add(double a, double b, double c) { return __fma_rn(a, b, c); }
PARTUNE_FN double multiply(double a, double b) { return __dmul_rn(a, b); }
PARTUNE_FN double divide(double a, double b) { return __ddiv_rn(a, b); }
PARTUNE_FN double square_root(double x) { return __dsqrt_rn(x); }
#else
#if defined(__FMA__) || defined(__aarch64__)
PARTUNE_FN float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
PARTUNE_FN double multiply_add(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
PARTUNE_FN float multiply_add(float a, float b, float c) { return a * b + c; }
PARTUNE_FN double multiply_add(double a, double b, double c) { return a * b + c; }
#endif
PARTUNE_FN float multiply(float a, float b) { return a * b; }
PARTUNE_FN double multiply(double a, double b) { return a * b; }
PARTUNE_FN float divide(float a, float b) { return a / b; }
PARTUNE_FN double divide(double a, double b) { return a / b; }
PARTUNE_FN float square_root(float x) { return __builtin_sqrtf(x); }
PARTUNE_FN double square_root(double x) { return __builtin_sqrt(x); }
#endif

// ---- one number, as bodies that are written for one or for many lanes (lanes.h) see it ----

template <typename Number>
struct ScalarOfNumber {
  using Type = Number;
};
template <typename Number>
using ScalarOf = typename ScalarOfNumber<Number>::Type;

// A NaN stays one.
template <typename Real>
PARTUNE_FN Real magnitude_up_to(Real x, Real limit) {
  const Real size = x < Real(0) ? -x : x;
  return size > limit ? limit : size;
}
template <typename Real>
PARTUNE_FN Real positive_part(Real x) {
  return x < Real(0) ? Real(0) : x;
}
template <typename Real>
PARTUNE_FN Real where_negative(Real x, Real yes, Real no) {
  return x < Real(0) ? yes : no;
}

// ---- loading ----

PARTUNE_FN float widen(float x) { return x; }
PARTUNE_FN double widen(double x) { return x; }
PARTUNE_FN float widen(BFloat16 x) { return float_from_bits(uint32_t(x.bits) << 16); }

// Free of branches and of subnormal operands, so that it vectorises and survives flush-to-zero.
PARTUNE_FN float widen(Half x) {
  const uint32_t shifted = uint32_t(x.bits & 0x7fffu) << 13;
  const uint32_t exponent = shifted & 0x0f800000u;
  const uint32_t rebiased = shifted + (112u << 23);
  const float subnormal = float_from_bits(rebiased + (1u << 23)) - float_from_bits(113u << 23);
  const uint32_t magnitude = exponent == 0x0f800000u ? rebiased + (112u << 23)
                             : exponent == 0         ? float_bits(subnormal)
                                                     : rebiased;
  return float_from_bits(magnitude | uint32_t(x.bits & 0x8000u) << 16);
}

// ---- rounding to nearest, ties to even ----

PARTUNE_FN void round_nearest(float x, float& out) { out = x; }
PARTUNE_FN void round_nearest(double x, double& out) { out = x; }

PARTUNE_FN void round_nearest(float x, BFloat16& out) {
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out.bits = uint16_t(nan ? (bits >> 16 | 0x40u) : rounded);
}

PARTUNE_FN void round_nearest(float x, Half& out) {
  const uint32_t bits = float_bits(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + (0u - (112u << 23)) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  // Adding 1/2 puts the subnormal's last bit at the float's last bit: the addition rounds it.
  const uint32_t subnormal = float_bits(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t rounded = magnitude >= 0x47800000u ? special : magnitude < 0x38800000u ? subnormal : normal;
  out.bits = uint16_t(rounded | (bits >> 16 & 0x8000u));
}

// ---- stochastic rounding: up with the probability of the dropped fraction ----

PARTUNE_FN void round_stochastic(float x, uint32_t, float& out) { out = x; }
PARTUNE_FN void round_stochastic(double x, uint32_t, double& out) { out = x; }

PARTUNE_FN void round_stochastic(float x, uint32_t random, BFloat16& out) {
  const uint32_t bits = float_bits(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t finite = (bits + (random & 0xffffu)) >> 16;
  const uint32_t special = bits >> 16 | (magnitude > 0x7f800000u ? 0x40u : 0u);
  out.bits = uint16_t(magnitude < 0x7f800000u ? finite : special);
}

PARTUNE_FN void round_stochastic(float x, uint32_t random, Half& out) {
  const uint32_t bits = float_bits(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t raised = magnitude + (random & 0x1fffu);
  const uint32_t normal = raised >= 0x47800000u ? 0x7c00u : (raised - (112u << 23)) >> 13;
  // Below 2^-14 a half counts in units of 2^-24: `dropped` bits of the significand lie below that.
  const uint32_t exponent = magnitude >> 23;
  const uint32_t significand = (magnitude & 0x7fffffu) | (exponent ? 0x800000u : 0u);
  const uint32_t dropped = 126u - (exponent ? exponent : 1u);
  const uint32_t shift = dropped < 31u ? dropped : 31u;
  const uint32_t kept = (significand + (random & ((1u << shift) - 1u))) >> shift;
  const uint32_t subnormal = dropped <= 31u ? kept : 0u;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t rounded = magnitude >= 0x7f800000u ? special : magnitude < 0x38800000u ? subnormal : normal;
  out.bits = uint16_t(rounded | (bits >> 16 & 0x8000u));
}

}  // namespace partune
