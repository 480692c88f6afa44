// A region of a file that is compiled for another instruction set than the rest.
//
// Include all headers that the region uses before it begins.  The linker could choose a header's
// function compiled inside for code that runs on a machine without these instructions.
#pragma once

#include <string.h>

#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/dtype.h"
#include "cpu/kernels.h"
#include "cpu/memory.h"
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
