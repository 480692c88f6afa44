// The record: eight numbers per row that the forward keeps for the backward.  The first four are
// those of Row; the others depend on the kind of loss.
#pragma once

#include "common/row_state.h"

namespace fastdiv {

constexpr int kRecordSize = 8;

template <class real>
struct CrossEntropyRecord : Row<real> {
  real own_weight;  // the row's weight that comes from its label, 1 for other rows
  real q_factor;    // factor of q in the gradient: own_weight (sum r + 2 z omega lse)
  real label_mass;  // what the gradient subtracts at the label
  real unused;
};

template <class real>
struct EntropyRecord : Row<real> {
  real unused;
  real entropy;
  real unused_too[2];
};

// A row with a target row beside it.
template <class real>
struct PairRecord : Row<real> {
  // For logits: log q - log p = ((x - t) - (x_max - t_max)) * scale - log_z_ratio.
  real log_z_ratio;
};

template <class real>
struct DivergenceRecord : PairRecord<real> {
  real sum_u, sum_v;
  real use_direct;  // 1 where the rows are well separated and a DirectPair is accurate; else 0
};

template <class real>
struct AlphaRecord : PairRecord<real> {
  real small_log_s;  // log S where it is close to 0, else infinity
  real slope;        // derivative of the value with respect to log S
  real tilted_logz;  // log-sum-exp of the tilt of the logits before normalisation
};

template <class real>
struct NamedRecord : Row<real> {
  real others;    // how many classes have no name
  real log_tail;  // log of their mass, or the mean of their log q
  real shift;     // what x_logz has too much of, so that e^(x - x_logz) is q / Q; else 0
  real unused;
};

}  // namespace fastdiv
