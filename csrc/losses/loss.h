// What every loss has: its options, and the defaults of a policy.
#pragma once

#include "losses/record.h"
#include "losses/registry.h"

namespace fastdiv {

// The options of a loss that are numbers.  A policy keeps those that it uses.
struct LossParams {
  LossId loss;
  double param;                // beta, skew or alpha of a divergence
  double confidence;           // weight of the label, or factor of soft target probabilities
  double smoothing_per_class;  // what label smoothing gives each class
  double z_loss;               // factor of lse^2
  bool by_probability;         // a row's weight is the probability of its label
  Target target;               // for policies that take several kinds
};

// Return an option as a number of the kernels.  A GPU keeps it in a register, rather than convert
// it wherever it is used.
template <class real>
FD_FN real option(double v) {
  real number = real(v);
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(real) == 4) asm volatile("" : "+f"(number));
#endif
  return number;
}

// The label of a row: its scaled logit minus the maximum, and its class weight.
template <class real>
struct TargetLogit {
  real lx, weight;
};

template <class real>
struct Outputs {
  real value, entropy;  // `entropy` is the second output of a loss that has two
};

// The base of all policies, with the defaults for a loss of one row of logits.
template <class Real, Target target = Target::kNone>
struct Loss {
  using real = Real;
  static constexpr Target kTarget = target;
  static constexpr bool kDivergence = false;   // compares the row with a target row
  static constexpr bool kNamed = false;        // has values of k classes, by their indices
  static constexpr bool kReadsLabel = false;   // reads a class index
  static constexpr bool kWeights = false;      // reads a weight for every class
  static constexpr bool kTwoOutputs = false;   // a second one, with its own upstream gradient
  static constexpr bool kStats = false;        // also returns statistics of each row
  static constexpr bool kSoftcap = false;      // takes softcapped logits
  static constexpr bool kTilted = false;       // keeps a log-sum-exp of a mixture of both rows
  static constexpr bool kDirectTerms = false;  // has terms from a DirectPair
  static constexpr int kSums = 0;              // how many of Sums it uses, the first ones

  static constexpr bool takes(Target given) { return given == target; }

  FD_FN explicit Loss(const LossParams&) {}
  FD_FN Sums<real> partial(const Column<real>&) const { return {}; }
  FD_FN void rebase(Sums<real>&, Shift<real>, Shift<real>) const {}
};

// Whether a second pass gives the loss and its gradients, from terms of each class.
template <class P>
constexpr bool has_terms() {
  return P::kDivergence && !P::kTilted;
}

// What the torch side has to know about a loss.
struct LossTraits {
  bool reads_label, two_outputs, stats, softcap, named;
};
template <class P>
constexpr LossTraits traits_of() {
  return {P::kReadsLabel, P::kTwoOutputs, P::kStats, P::kSoftcap, P::kNamed};
}

}  // namespace fastdiv
