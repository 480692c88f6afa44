// A region of code compiled for another instruction set than the rest of the file.
//
// Everything that the region uses from a header is included before it is opened: a header's
// function compiled inside could be chosen by the linker for code that runs on a lesser machine.
#pragma once

#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/dtype.h"
#include "cpu/kernels.h"
#include "losses/find_kernels.h"
#include "losses/gradient.h"
#include "losses/row.h"

#if defined(__clang__)
#define FD_BEGIN_ISA(isa) \
  FD_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define FD_END_ISA FD_PRAGMA(clang attribute pop)
#define FD_WIDE_VECTORS ""
#else
#define FD_BEGIN_ISA(isa) FD_PRAGMA(GCC push_options) FD_PRAGMA(GCC target(isa))
#define FD_END_ISA FD_PRAGMA(GCC pop_options)
#define FD_WIDE_VECTORS ",prefer-vector-width=512"
#endif
