// The asynchronous instructions of Ampere and Hopper, and what orders them.
//
//   barrier_init            mbarrier.init: a barrier that expects so many arrivals in each phase
//   barrier_init_fence      fence.mbarrier_init: copies, and blocks that wait for the cluster
//   later,
//                           find the barriers that the thread has initialised
//   barrier_expect          mbarrier.arrive.expect_tx: an arrival, and so many more bytes
//   barrier_arrive          mbarrier.arrive
//   barrier_wait            mbarrier.try_wait.parity in a loop, until the phase is complete
//   copy_bulk               cp.async.bulk: the bytes count at the barrier as they land
//   fence_before_copy       fence.proxy.async: copies that the thread asks for later come after
//                           what it did and what it was ordered after
//   copy_16                 cp.async of 16 bytes
//   copies_commit           cp.async.commit_group
//   copies_wait<n>          cp.async.wait_group: all but the thread's latest n groups have landed
//   cluster_arrive          barrier.cluster.arrive.relaxed: it orders no memory
//   cluster_wait            barrier.cluster.wait
//   send<n>                 st.async of n words to a block of the cluster, and to its barrier
//
// To TSan an engine makes each copy.  It knows what its thread knew at the last
// fence_before_copy(), or when it called copy_16() or send().  Threads know of the copy once they
// have waited.
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
