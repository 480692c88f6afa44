// The asynchronous instructions of Ampere and Hopper.  See the files for what each does.
#pragma once

#include "bulk_copy.h"
#include "cluster.h"
#include "copy_16.h"

using cuda_on_cpu::barrier_arrive;
using cuda_on_cpu::barrier_expect;
using cuda_on_cpu::barrier_init;
using cuda_on_cpu::barrier_init_fence;
using cuda_on_cpu::barrier_wait;
using cuda_on_cpu::cluster_arrive;
using cuda_on_cpu::cluster_wait;
using cuda_on_cpu::copies_commit;
using cuda_on_cpu::copies_wait;
using cuda_on_cpu::copy_16;
using cuda_on_cpu::copy_bulk;
using cuda_on_cpu::fence_before_copy;
using cuda_on_cpu::send;
