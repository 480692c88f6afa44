// The yardstick of the benchmark: the arithmetic of the losses in plain loops, vectorised by hand.
//
// It shows what a core can do.  It leaves out what the losses must keep: there are no rules for NaN
// and infinite logits, no exact values near zero, no options.  build.py compiles it with -DW=n for
// vectors of n floats, and -DDTYPE=float, Bf16 or F16.  The constants are those of losses.py.
#include <thread>
#include <vector>

#include "divergences.h"
#include "losses.h"

namespace {

// Compute the forward of rows [begin, end) into `kept`; or, given d, the gradient of g times their
// sum from it.
template <class Loss, class T>
void run(Row<T> r, int64_t begin, int64_t end, Kept* kept, float g, T* d) {
  r.x += begin * r.classes, r.t += begin * r.targets, r.y += begin * r.targets;
  for (int64_t i = begin; i < end; ++i) {
    if (d) {
      Loss::backward(r, kept[i], g, d + i * r.classes);
    } else {
      kept[i] = Loss::forward(r);
    }
    r.x += r.classes, r.t += r.targets, r.y += r.targets;
  }
}

// Divide the rows among threads, of which the calling one is the first.
template <class Loss, class T>
void run_on_threads(int64_t threads, Row<T> r, int64_t rows, Kept* kept, float g, T* d) {
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; ++i)
    others.emplace_back(run<Loss, T>, r, rows * i / threads, rows * (i + 1) / threads, kept, g, d);
  run<Loss>(r, 0, rows / threads, kept, g, d);
  for (std::thread& other : others) other.join();
}

}  // namespace

#define LOSS(name, ...)                                                                            \
  extern "C" void name(int64_t threads, const DTYPE* x, const DTYPE* t, const int64_t* y,          \
                       int64_t rows, int64_t classes, int64_t targets, Kept* kept, float g,        \
                       DTYPE* d) {                                                                 \
    run_on_threads<__VA_ARGS__>(threads, Row<DTYPE>{x, t, y, classes, targets}, rows, kept, g, d); \
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
LOSS(topk_kl_div, Topk<KlOfNamed>)
LOSS(topk_kl_div_tail, TopkKlTail)
LOSS(topk_reverse_kl_div, Topk<ReverseKlOfNamed>)
LOSS(topk_js_div, Topk<JsOfNamed>)
LOSS(entropy, LogProbAndEntropy<0, 100>)
LOSS(log_prob, LogProbAndEntropy<1, 0>)
LOSS(log_prob_and_entropy, LogProbAndEntropy<-1, -1>)
