// The yardstick of the benchmark: the arithmetic of the losses in plain loops, vectorised by hand.
//
// It shows what a core can do.  It leaves out what the losses must keep: there are no rules for NaN
// and infinite logits, no exact values near zero, no options.  build.py compiles it with -DW=n for
// vectors of n floats, and -DDTYPE=float, Bf16 or F16.  The constants are those of losses.py.
#include "divergences.h"
#include "losses.h"

namespace {

// Compute the forward of rows into `kept`; or, given d, the gradient of g times their sum from it.
template <class Loss, class T>
void run(Row<T> r, int64_t rows, Kept* kept, float g, T* d) {
  for (int64_t i = 0; i < rows; ++i) {
    if (d) {
      Loss::backward(r, kept[i], g, d + i * r.classes);
    } else {
      kept[i] = Loss::forward(r);
    }
    r.x += r.classes, r.t += r.targets, r.y += r.targets;
  }
}

}  // namespace

#define LOSS(name, ...)                                                                   \
  extern "C" void name(const DTYPE* x, const DTYPE* t, const int64_t* y, int64_t rows,    \
                       int64_t classes, int64_t targets, Kept* kept, float g, DTYPE* d) { \
    run<__VA_ARGS__>(Row<DTYPE>{x, t, y, classes, targets}, rows, kept, g, d);            \
  }

LOSS(cross_entropy, LogProbAndEntropy<-1, 0>)
LOSS(cross_entropy_smoothed, Smoothed)
LOSS(cross_entropy_of_probs, OfProbs)
LOSS(kl_div, Kl)
LOSS(reverse_kl_div, ReverseKl)
LOSS(js_div, Divergence<Js>)
LOSS(skew_kl_div, Divergence<SkewKl>)
LOSS(alpha_div, Powers<Of::alpha>)
LOSS(renyi_div, Powers<Of::renyi>)
LOSS(tv_distance, Divergence<Tv>)
LOSS(hellinger_distance, Powers<Of::hellinger>)
LOSS(topk_kl_div, TopkKl)
LOSS(entropy, LogProbAndEntropy<0, 100>)
LOSS(log_prob, LogProbAndEntropy<1, 0>)
LOSS(log_prob_and_entropy, LogProbAndEntropy<-1, -1>)
