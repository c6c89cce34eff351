// GELU and its derivative, of the same few operations on every machine: no libm.
//
// Both forms take one exponential and one quotient. Exact GELU is z·Phi(z) with Phi(-a) =
// exp(-a²/2)·R(a); R falls smoothly from 1/2, and is a polynomial in (a - k)/(a + k), fitted here to
// mpmath's erfc with relative errors weighted alike (1e-9 in float32, 1e-17 in float64). Evaluated in
// float32 it adds up to 5 units in the last place. The square's rounding error is put back into the
// exponential where multiply_add is fused, so the lower tail keeps its relative accuracy.
#pragma once
#include "platform.h"

namespace partune {

template <typename Real>
struct GeluConstants;

template <>
struct GeluConstants<float> {
  static constexpr int kExpDegree = 7;
  static constexpr int kNewtonSteps = 3;
  static constexpr float kRoundingShift = 12582912.0f;  // 1.5·2^23: adding it rounds to an integer
  static constexpr float kLog2E = 1.44269504f;
  static constexpr float kLn2High = 0.693145752f;
  static constexpr float kLn2Low = 1.42860677e-6f;
  static constexpr float kLargestExponent = 87.0f;  // exp(-87) is still a normal number
  static constexpr float kTailLimit = 13.1875f;     // below -13.19 Phi is subnormal
  static constexpr float kTailCentre = 3.5f;
  static constexpr int kTailDegree = 10;
};

template <>
struct GeluConstants<double> {
  static constexpr int kExpDegree = 13;
  static constexpr int kNewtonSteps = 5;
  static constexpr double kRoundingShift = 6755399441055744.0;  // 1.5·2^52
  static constexpr double kLog2E = 1.4426950408889634;
  static constexpr double kLn2High = 0.69314718036912382;
  static constexpr double kLn2Low = 1.9082149292705877e-10;
  static constexpr double kLargestExponent = 708.0;
  static constexpr double kTailLimit = 37.5;
  static constexpr double kTailCentre = 4.5;
  static constexpr int kTailDegree = 22;
};

// Ascending powers of (a - kTailCentre)/(a + kTailCentre).
PARTUNE_FN float tail_coefficient(int power, float) {
  constexpr float kCoefficients[] = {
      1.063451543e-01f, -1.871397048e-01f, 1.258552521e-01f,  -6.163945049e-02f,
      1.906568557e-02f, -1.561190002e-03f, -1.381743932e-03f, 3.893340763e-04f,
      1.339213195e-04f, -5.113341831e-05f, -2.040489926e-05f,
  };
  return kCoefficients[power];
}
PARTUNE_FN double tail_coefficient(int power, double) {
  constexpr double kCoefficients[] = {
      8.48033921078003433e-02,  -1.55943143246980054e-01, 1.20745586367588684e-01,  -7.77327018896256799e-02,
      4.05027107245563497e-02,  -1.61393247497563577e-02, 4.23277106240840893e-03,  -2.74975867435413269e-04,
      -2.96286347008274751e-04, 1.02680846405370352e-04,  1.17402127968428868e-05,  -1.42195151992833670e-05,
      1.88408756147114050e-07,  1.93618209248532662e-06,  -1.15946182215283664e-07, -2.93540423169785920e-07,
      1.27670765205613301e-08,  4.87277211656821112e-08,  1.59791521036507550e-09,  -7.78794961031414696e-09,
      -1.20651977100855392e-09, 8.41936936373307468e-10,  2.51598141522817976e-10,
  };
  return kCoefficients[power];
}

PARTUNE_FN double double_from_bits(uint64_t bits) {
#ifdef __CUDACC__
  return __longlong_as_double(static_cast<long long>(bits));
#else
  double x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

// 2^n from n + kRoundingShift, whose lowest bits count n.
PARTUNE_FN float power_of_two(float shifted) { return float_from_bits((float_bits(shifted) + 127u) << 23); }
PARTUNE_FN double power_of_two(double shifted) {
  return double_from_bits((double_bits(shifted) + 1023u) << 52);
}

// 1/d for a normal d > 0, within an eighth: subtracting bits negates the exponent.
PARTUNE_FN float near_reciprocal(float d) { return float_from_bits(0x7ef311c7u - float_bits(d)); }
PARTUNE_FN double near_reciprocal(double d) { return double_from_bits(0x7fde623822fc16e6u - double_bits(d)); }

// numerator/d for a d in [1, 100], to the last place. Without a division: CUDA's has a branch for other
// numbers, and eight of them in a row ran out of barriers.
template <typename Real>
PARTUNE_FN Real quotient(Real numerator, Real d) {
  Real reciprocal = near_reciprocal(d);
  PARTUNE_UNROLL
  for (int i = 0; i < GeluConstants<Real>::kNewtonSteps; ++i) {
    reciprocal = multiply_add(reciprocal, multiply_add(-reciprocal, d, Real(1)), reciprocal);
  }
  const Real near = multiply(numerator, reciprocal);
  return multiply_add(multiply_add(-near, d, numerator), reciprocal, near);
}

// exp(x) for -kLargestExponent <= x <= 0: by a Taylor series within ln(2)/2 of 0.
template <typename Real>
PARTUNE_FN Real exp_of_negative(Real x) {
  using C = GeluConstants<Real>;
  const Real shifted = multiply_add(x, C::kLog2E, C::kRoundingShift);
  const Real n = shifted - C::kRoundingShift;
  const Real r = multiply_add(-n, C::kLn2Low, multiply_add(-n, C::kLn2High, x));
  Real sum = Real(1);
  PARTUNE_UNROLL
  for (int k = C::kExpDegree; k >= 1; --k) sum = multiply_add(multiply(r, Real(1.0 / k)), sum, Real(1));
  return multiply(sum, power_of_two(shifted));
}

// Value and derivative of a function.
template <typename Real>
struct ValueAndSlope {
  Real value, slope;
};

template <typename Real>
PARTUNE_FN ValueAndSlope<Real> gelu(Real z) {
  using C = GeluConstants<Real>;
  const Real size = z < Real(0) ? -z : z;
  const Real a = size < C::kTailLimit ? size : C::kTailLimit;
  const Real square = multiply(a, a);
  const Real error = multiply_add(a, a, -square);
  Real density = exp_of_negative(multiply(Real(-0.5), square));
  density = multiply_add(density, multiply(Real(-0.5), error), density);
  density = size > C::kTailLimit ? Real(0) : density;
  const Real t = quotient(a - C::kTailCentre, a + C::kTailCentre);
  Real ratio = tail_coefficient(C::kTailDegree, Real());
  PARTUNE_UNROLL
  for (int power = C::kTailDegree - 1; power >= 0; --power) {
    ratio = multiply_add(ratio, t, tail_coefficient(power, Real()));
  }
  const Real tail = multiply(density, ratio);
  const Real cdf = z < Real(0) ? tail : Real(1) - tail;
  const Real inverse_root = Real(0.3989422804014327);  // 1/sqrt(2·pi)
  return {multiply(z, cdf), multiply_add(z, multiply(density, inverse_root), cdf)};
}

// z·logistic(v), v = sqrt(8/pi)·(z + 0.044715·z³), which is z·(1 + tanh(v/2))/2.
template <typename Real>
PARTUNE_FN ValueAndSlope<Real> gelu_tanh(Real z) {
  using C = GeluConstants<Real>;
  const Real root = Real(1.5957691216057308), cubic = Real(0.044715), cubic3 = Real(0.134145);
  const Real square = multiply(z, z);
  const Real v = multiply(multiply(root, z), multiply_add(cubic, square, Real(1)));
  const Real size = v < Real(0) ? -v : v;
  const bool beyond = size > C::kLargestExponent;
  const Real e =
      beyond ? Real(0) : exp_of_negative(size < C::kLargestExponent ? -size : -C::kLargestExponent);
  const Real upper = quotient(Real(1), Real(1) + e);
  const Real lower = multiply(e, upper);
  const Real logistic = v < Real(0) ? lower : upper;
  const Real slope = multiply(root, multiply_add(cubic3, square, Real(1)));
  const Real bend = beyond ? Real(0) : multiply(multiply(z, slope), multiply(lower, upper));
  return {multiply(z, logistic), logistic + bend};
}

}  // namespace partune
