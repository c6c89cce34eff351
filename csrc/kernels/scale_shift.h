// Family scale_shift: y = act(scale·(x + bias) + shift) per channel, and the same after a norm. What
// CPU and CUDA share: layouts, and the arithmetic of one element.
//
// Bytes moved per element of s bytes: forward 2s (x in, y out), in place the same; backward 3s (the
// output's gradient and x or y in, the input's gradient out). Norms: the same, a row staying in the
// cache between its passes. Vectors and column sums are 1/rows of that; a block of kBlockRows rows
// leaves two sums per channel, 2·4/kBlockRows bytes per element written and read once.
#pragma once
#include "gelu.h"

namespace partune {

enum class Activation { kNone, kGelu, kGeluTanh };

// A dense tensor seen as [outer, channels, inner]. Rows of channels have an inner of 1.
struct ChannelLayout {
  int64_t outer, channels, inner;
};

// act(z) and act'(z).
template <Activation kActivation, typename Real>
PARTUNE_FN ValueAndSlope<Real> activate(Real z) {
  if constexpr (kActivation == Activation::kGelu) {
    return gelu(z);
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    return gelu_tanh(z);
  } else {
    return {z, Real(1)};
  }
}

template <Activation kActivation, typename Real>
PARTUNE_FN Real scale_shift_element(Real x, Real bias, Real scale, Real shift) {
  return activate<kActivation>(multiply_add(x + bias, scale, shift)).value;
}

// The gradient behind the activation, and what scale's gradient sums its product with.
template <typename Real>
struct InnerGrad {
  Real grad, factor;
};

// `addend` is bias where the input was saved, and -shift where the output was: factor is x + bias, or
// scale·(x + bias), which the sum is divided by scale for.
template <Activation kActivation, typename Real>
PARTUNE_FN InnerGrad<Real> inner_grad(Real grad, Real saved, Real addend, Real scale, Real shift) {
  const Real factor = saved + addend;
  if constexpr (kActivation == Activation::kNone) {
    return {grad, factor};
  } else {
    return {multiply(grad, activate<kActivation>(multiply_add(factor, scale, shift)).slope), factor};
  }
}

// The normalised element, and a norm's backward: with g = grad·gain, dx = rstd·(g - mean(g) -
// x̂·mean(g·x̂)), where RMSNorm has no mean(g).
template <typename Real>
PARTUNE_FN Real normalised(Real x, Real mean, Real rstd) {
  return multiply(x - mean, rstd);
}
template <typename Real>
PARTUNE_FN Real norm_grad(Real gained, Real x_hat, Real mean_grad, Real mean_product, Real rstd) {
  return multiply(rstd, multiply_add(-x_hat, mean_product, gained - mean_grad));
}

}  // namespace partune
