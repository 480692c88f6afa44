// What every loss is made of: its numbers, and the defaults a policy starts from.
#pragma once

#include "losses/record.h"
#include "losses/registry.h"

namespace fastdiv {

// The options of a loss that are numbers; a policy keeps those it has a use for.
struct LossParams {
  LossId loss;
  double param;  // beta, skew or alpha of a divergence
  double
      confidence;  // hard target: what the label weighs; soft target: factor of its probabilities
  double smoothing_per_class;  // what label smoothing gives to every class
  double z_loss;               // factor of lse^2
  Target target;               // what the target is, where a policy takes several kinds
};

// Of the target class of a row: its shifted scaled logit and its class weight.
template <class real>
struct TargetLogit {
  real lx, weight;
};

template <class real>
struct Outputs {
  real value, entropy;  // where a loss has two outputs, `entropy` is the second, whatever it holds
};

// A loss of one row of logits, with a label or a soft target: cross entropy, entropy.
template <class Real, Target target = Target::kNone>
struct Loss {
  using real = Real;
  static constexpr Target kTarget = target;
  static constexpr bool kDivergence = false;
  static constexpr bool kTopK = false;        // reads k classes of a teacher, by their indices
  static constexpr bool kReadsLabel = false;  // reads the class index
  static constexpr bool kWeights = false;     // reads a weight for every class
  static constexpr bool kTwoOutputs = false;  // a second one, with its own upstream gradient
  static constexpr bool kStats = false;
  static constexpr bool kSoftcap = false;      // takes softcapped logits
  static constexpr bool kTilted = false;       // keeps a log-sum-exp of a mixture of both rows
  static constexpr bool kDirectTerms = false;  // has terms of a DirectPair
  static constexpr bool kExactRatio = false;   // sums Column::ratio as its value
  static constexpr int kSums = 0;              // how many of Sums it uses, the first ones

  static constexpr bool takes(Target given) { return given == target; }

  FD_FN explicit Loss(const LossParams&) {}
  FD_FN Sums<real> partial(const Column<real>&) const { return {}; }
  FD_FN void rebase(Sums<real>&, Shift<real>, Shift<real>) const {}
};

// Whether a second pass can give the loss and its gradients, from terms of each class.
template <class P>
constexpr bool has_terms() {
  return P::kDivergence && !P::kTilted;
}

// What a loss wants to be given, for the torch side.
struct LossTraits {
  bool reads_label, two_outputs, stats, softcap, topk;
};
template <class P>
constexpr LossTraits traits_of() {
  return {P::kReadsLabel, P::kTwoOutputs, P::kStats, P::kSoftcap, P::kTopK};
}

}  // namespace fastdiv
