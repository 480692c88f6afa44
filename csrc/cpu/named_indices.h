// Checks of the indices of named classes on a CPU, before they are used.
#pragma once

#include "losses/row_args.h"

namespace fastdiv {

// Throw for the first row with an index that is out of range, or that occurs twice where that is
// not allowed.  Padding is allowed; ignored rows are not checked.
void check_indices(const RowArgs& a, ParallelFor parallel_for);

}  // namespace fastdiv
