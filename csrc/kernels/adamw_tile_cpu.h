// What the CPU bodies that take AdamW steps share: a tile of entries side by side, which fits the L1
// cache, stepped in loops that the compiler turns into vectors.
#pragma once
#include "philox_cpu.h"
#include "sparse_adamw_cpu.h"

#ifndef PARTUNE_ISA
#error "PARTUNE_ISA names the namespace, and so the instruction set, that this file is built for"
#endif

namespace partune {
namespace PARTUNE_ISA {
namespace {  // NOLINT(misc-anonymous-namespace-in-header): each ISA has its own

// Values to compute with: those stored, where there is nothing to widen.
template <typename Stored, typename Real>
Real* widened(Stored* stored, int count, Real* out) {
  if constexpr (sizeof(Stored) == sizeof(Real)) {
    return stored;
  } else {
    for (int i = 0; i < count; ++i) out[i] = widen(stored[i]);
    return out;
  }
}

template <typename Stored>
void scatter(const Stored* values, const int64_t* offsets, int count, Stored* to) {
  for (int i = 0; i < count; ++i) {
    asm volatile("");  // keeps the loop scalar: the machine's scatter instructions are slower
    to[offsets[i]] = values[i];
  }
}

template <typename Stored, typename Real>
void round_tile(const Real* values, const uint32_t* random, int count, Stored* out) {
  if (random) {
    for (int i = 0; i < count; ++i) round_stochastic(values[i], random[i], out[i]);
  } else {
    for (int i = 0; i < count; ++i) round_nearest(values[i], out[i]);
  }
}

template <int kTile>
struct TileRandom {
  uint32_t weight[kTile], exp_avg[kTile], exp_avg_sq[kTile];
};

// Draws whole vectors: index has kTile places, those beyond count are drawn for nothing.
template <int kTile>
void draw(const int64_t* index, int count, bool for_state, uint32_t step, uint32_t parameter_id,
          PhiloxKey key, TileRandom<kTile>& random) {
  for (int i = 0; i < count; i += kWords) {
    const Words indices = load_words(reinterpret_cast<const uint64_t*>(index + i));
    const PhiloxWords drawn = philox(indices, step, parameter_id, key);
    store_low_halves(drawn.word[0], random.weight + i);
    if (for_state) {
      store_low_halves(drawn.word[1], random.exp_avg + i);
      store_low_halves(drawn.word[2], random.exp_avg_sq + i);
    }
  }
}

// Values stay in registers until all are known: read back after a store that crosses a cache line, they
// took three times as long.
template <typename Real>
void update(const Real* grad, Real* weight, Real* exp_avg, Real* exp_avg_sq, int count,
            const AdamWCoefficients<Real>& coefficients) {
  const AdamWCoefficients<Real> c = coefficients;
#pragma GCC ivdep
  for (int i = 0; i < count; ++i) {
    Real w = weight[i], m = exp_avg[i], v = exp_avg_sq[i];
    adamw_update(grad[i], w, m, v, c);
    weight[i] = w;
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
  }
}

template <typename Real>
AdamWCoefficients<Real> coefficients_of(const SparseAdamWMatrix& m, const SparseAdamWStep& s) {
  const AdamWHyperparameters<double>& h = s.hyperparameters;
  const AdamWHyperparameters<Real> narrowed{Real(h.beta1),        Real(h.one_minus_beta1),
                                            Real(h.beta2),        Real(h.one_minus_beta2),
                                            Real(h.weight_decay), Real(h.eps),
                                            h.corrected,          h.maximize,
                                            h.stochastic};
  return adamw_coefficients(narrowed, Real(s.lr), Real(s.grad_scale), uint32_t(*m.state_step));
}

// Steps entries of one matrix whose weights, gradients and state each lie side by side.
template <typename Weight, typename Grad, typename State, typename Real, int kTile>
class TileStepper {
  static constexpr bool kRoundedState = sizeof(State) < sizeof(Real);
  static constexpr bool kRoundedWeight = sizeof(Weight) < sizeof(Real);

 public:
  TileStepper(const SparseAdamWMatrix& m, const SparseAdamWStep& s)
      : m_(m),
        stochastic_(kRoundedWeight && !m.master && s.hyperparameters.stochastic),
        coefficients_(coefficients_of<Real>(m, s)),
        key_(s.key),
        draw_step_(uint32_t(*m.state_step) + s.offset) {}

  bool has_master() const { return kRoundedWeight && m_.master; }
  // Whether step() reads `index`.
  bool draws() const { return stochastic_ || kRoundedState; }

  // Steps up to kTile entries, of which the first has its state at `position`. index: where each is in
  // the matrix, row·columns + column, in an array of kTile. With a master, weights are only written.
  void step(int64_t position, int count, Weight* stored_weight, Grad* stored_grad, const int64_t* index) {
    State* stored_exp_avg = static_cast<State*>(m_.exp_avg) + position;
    State* stored_exp_avg_sq = static_cast<State*>(m_.exp_avg_sq) + position;
    const Real* grad = widened(stored_grad, count, grad_);
    Real* weight = nullptr;
    if constexpr (kRoundedWeight) {
      weight = m_.master ? m_.master + position : widened(stored_weight, count, weight_);
    } else {
      weight = stored_weight;
    }
    Real* exp_avg = widened(stored_exp_avg, count, exp_avg_);
    Real* exp_avg_sq = widened(stored_exp_avg_sq, count, exp_avg_sq_);
    update(grad, weight, exp_avg, exp_avg_sq, count, coefficients_);

    if (draws()) draw(index, count, kRoundedState, draw_step_, m_.parameter_id, key_, random_);
    if constexpr (kRoundedState) {
      round_tile(exp_avg, random_.exp_avg, count, stored_exp_avg);
      round_tile(exp_avg_sq, random_.exp_avg_sq, count, stored_exp_avg_sq);
    }
    if constexpr (kRoundedWeight) {
      round_tile(weight, stochastic_ ? random_.weight : nullptr, count, stored_weight);
    }
  }

 private:
  const SparseAdamWMatrix& m_;
  const bool stochastic_;
  const AdamWCoefficients<Real> coefficients_;
  const PhiloxKey key_;
  const uint32_t draw_step_;
  Real grad_[kTile], weight_[kTile], exp_avg_[kTile], exp_avg_sq_[kTile];
  TileRandom<kTile> random_;
};

}  // namespace
}  // namespace PARTUNE_ISA
}  // namespace partune
