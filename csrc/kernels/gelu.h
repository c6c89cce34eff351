// GELU and its derivative, of the same few operations on every machine: no libm.
//
// Both forms are max(z, 0) - a·tail(a) with a = |z|, where tail falls from 1/2 to 0, and take one
// exponential and one quotient. Exact GELU has tail(a) = Phi(-a) = exp(-a²/2)·R(a); R falls smoothly from
// 1/2, and is a polynomial in (a - k)/(a + k), fitted here to mpmath's erfc with relative errors weighted
// alike (1e-8 in float32, 1e-17 in float64). Evaluated in float32 it adds up to 5 units in the last
// place. The exponent's square is rounded after its whole part has gone, where multiply_add is fused, so
// the lower tail keeps its relative accuracy.
//
// All of it takes one number or the lanes of a register (lanes.h).
#pragma once
#include "platform.h"

namespace partune {

template <typename Real>
struct GeluConstants;

template <>
struct GeluConstants<float> {
  static constexpr int kExpDegree = 6;
  static constexpr int kNewtonSteps = 3;
  static constexpr float kRoundingShift = 12582912.0f;  // 1.5·2^23: adding it rounds to an integer
  static constexpr float kHalfLog2E = 0.721347520f;
  static constexpr float kTwoLn2High = 1.38629150f;
  static constexpr float kTwoLn2Low = 2.85721364e-6f;
  static constexpr float kTailLimit = 13.1875f;  // there exp(-a²/2) is still a normal number
  static constexpr float kTailCentre = 3.0f;
  static constexpr int kTailDegree = 9;
  static constexpr float kTanhLimit = 9.9375f;  // and here exp(-v)
};

template <>
struct GeluConstants<double> {
  static constexpr int kExpDegree = 13;
  static constexpr int kNewtonSteps = 5;
  static constexpr double kRoundingShift = 6755399441055744.0;  // 1.5·2^52
  static constexpr double kHalfLog2E = 0.7213475204444817;
  static constexpr double kTwoLn2High = 1.3862943607382476;
  static constexpr double kTwoLn2Low = 3.8164298585411754e-10;
  static constexpr double kTailLimit = 37.5;
  static constexpr double kTailCentre = 4.5;
  static constexpr int kTailDegree = 22;
  static constexpr double kTanhLimit = 21.0;
};

// exp(-x/2) by powers of x, |x| <= ln(2): fitted, or Taylor's.
PARTUNE_FN float exp_coefficient(int power, float) {
  constexpr float kCoefficients[] = {
      1.0f,
      -5.000000000e-01f,
      1.249999851e-01f,
      -2.083314955e-02f,
      2.604268258e-03f,
      -2.615281846e-04f,
      2.159238102e-05f,
  };
  return kCoefficients[power];
}
PARTUNE_FN double exp_coefficient(int power, double) {
  double coefficient = 1;
  PARTUNE_UNROLL
  for (int k = 1; k <= power; ++k) coefficient /= -2.0 * k;
  return coefficient;
}

// Ascending powers of (a - kTailCentre)/(a + kTailCentre).
PARTUNE_FN float tail_coefficient(int power, float) {
  constexpr float kCoefficients[] = {
      1.215139478e-01f, -2.064026147e-01f, 1.232250109e-01f,  -4.621335864e-02f, 6.132292561e-03f,
      2.904900350e-03f, -9.845132008e-04f, -3.403090232e-04f, 1.163488196e-04f,  5.447281728e-05f,
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

// p·2^n, for a p near 1 and a normal result, from n + kRoundingShift, whose lowest bits count n.
PARTUNE_FN float scale_by_power(float p, float shifted) {
  return float_from_bits(float_bits(p) + (float_bits(shifted) << 23));
}
PARTUNE_FN double scale_by_power(double p, double shifted) {
  return double_from_bits(double_bits(p) + (double_bits(shifted) << 52));
}

// 1/d for a normal d > 0, within an eighth: subtracting bits negates the exponent.
PARTUNE_FN float near_reciprocal(float d) { return float_from_bits(0x7ef311c7u - float_bits(d)); }
PARTUNE_FN double near_reciprocal(double d) { return double_from_bits(0x7fde623822fc16e6u - double_bits(d)); }

// numerator/d for a d in [1, 100], to the last place. Without a division: CUDA's has a branch for other
// numbers, and eight of them in a row ran out of barriers. For every float32 quotient that is asked for
// below it has the bits of the division (all were tried).
template <typename Number>
PARTUNE_FN Number quotient(Number numerator, Number d) {
  Number reciprocal = near_reciprocal(d);
  PARTUNE_UNROLL
  for (int i = 0; i < GeluConstants<ScalarOf<Number>>::kNewtonSteps; ++i) {
    reciprocal = multiply_add(reciprocal, multiply_add(-reciprocal, d, Number(1)), reciprocal);
  }
  const Number near = multiply(numerator, reciprocal);
  return multiply_add(multiply_add(-near, d, numerator), reciprocal, near);
}

// exp(-a·b/2) for an a·b >= 0 that leaves it normal.
template <typename Number>
PARTUNE_FN Number exp_of_minus_half(Number a, Number b) {
  using Real = ScalarOf<Number>;
  using C = GeluConstants<Real>;
  const Number shifted = multiply_add(multiply(a, b), Number(-C::kHalfLog2E), Number(C::kRoundingShift));
  const Number n = shifted - Number(C::kRoundingShift);
  const Number near = multiply_add(a, b, multiply(n, Number(C::kTwoLn2High)));
  const Number r = multiply_add(n, Number(C::kTwoLn2Low), near);
  Number sum = Number(exp_coefficient(C::kExpDegree, Real()));
  PARTUNE_UNROLL
  for (int power = C::kExpDegree - 1; power >= 0; --power) {
    sum = multiply_add(sum, r, Number(exp_coefficient(power, Real())));
  }
  return scale_by_power(sum, shifted);
}

// Value and derivative of a function.
template <typename Number>
struct ValueAndSlope {
  Number value, slope;
};

// Of max(z, 0) - size·tail, from bend = -d(size·tail)/d(size). Beyond where `size` ends tail is as good
// as 0.
template <typename Number>
PARTUNE_FN ValueAndSlope<Number> less_its_tail(Number z, Number size, Number tail, Number bend) {
  return {multiply_add(-size, tail, positive_part(z)), where_negative(z, -bend, Number(1) + bend)};
}

template <typename Number>
PARTUNE_FN ValueAndSlope<Number> gelu(Number z) {
  using Real = ScalarOf<Number>;
  using C = GeluConstants<Real>;
  const Number a = magnitude_up_to(z, C::kTailLimit);
  const Number density = exp_of_minus_half(a, a);
  const Number t = quotient(a - Number(C::kTailCentre), a + Number(C::kTailCentre));
  Number ratio = Number(tail_coefficient(C::kTailDegree, Real()));
  PARTUNE_UNROLL
  for (int power = C::kTailDegree - 1; power >= 0; --power) {
    ratio = multiply_add(ratio, t, Number(tail_coefficient(power, Real())));
  }
  const Number inverse_root = Number(Real(0.3989422804014327));  // 1/sqrt(2·pi)
  return less_its_tail(z, a, multiply(density, ratio),
                       multiply(density, multiply_add(a, inverse_root, -ratio)));
}

// z·logistic(v), v = sqrt(8/pi)·(z + 0.044715·z³), which is z·(1 + tanh(v/2))/2. Its tail is
// logistic(-|v|).
template <typename Number>
PARTUNE_FN ValueAndSlope<Number> gelu_tanh(Number z) {
  using Real = ScalarOf<Number>;
  const Real root = Real(1.5957691216057308), cubic = Real(0.07135481627260025);  // root·0.044715
  const Number a = magnitude_up_to(z, GeluConstants<Real>::kTanhLimit);
  const Number square = multiply(a, a);
  const Number factor = multiply_add(square, Number(2 * cubic), Number(2 * root));
  const Number e = exp_of_minus_half(a, factor);
  const Number tail = quotient(e, Number(1) + e);
  const Number slope = multiply_add(square, Number(3 * cubic), Number(root));
  const Number bend = multiply(tail, multiply_add(multiply(a, slope), Number(1) - tail, Number(-1)));
  return less_its_tail(z, a, tail, bend);
}

}  // namespace partune
