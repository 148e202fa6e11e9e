/* Teams of threads: the only interface to OpenMP, and the static partition that every driver uses.
 *
 * A barrier spins briefly, then sleeps in the kernel: on a machine where two processes share two cores a spinning waiter keeps
 * its partner off the core that it waits for.
 */
#ifndef FC_PARALLEL_H
#define FC_PARALLEL_H

#include <stdatomic.h>
#include <stdint.h>

#include "isa.h"

typedef struct fc_barrier {
    _Alignas(64) atomic_int waiting;
    _Alignas(64) atomic_int round;
    atomic_int sleepers;
} fc_barrier;

FC_HIDDEN void fc_barrier_wait(fc_barrier *barrier, int size);

/* `body` runs once per rank of a team of at most `threads`; the true team size is passed in. */
typedef void fc_team_fn(void *context, int rank, int size);
FC_HIDDEN void fc_team_run(fc_team_fn *body, void *context, int threads);
/* The same for ranks that never wait for each other: one that loses its core holds up nobody, so that contention is no reason
 * to work alone. */
FC_HIDDEN void fc_pool_run(fc_team_fn *body, void *context, int threads);

/* This rank's range [*begin, *end) of n items, cut at multiples of grain. Ranks may get nothing. */
FC_INLINE void fc_partition(int64_t n, int64_t grain, int rank, int size, int64_t *begin, int64_t *end) {
    const int64_t chunks = (n + grain - 1) / grain;
    const int64_t first = chunks * rank / size * grain, last = chunks * (rank + 1) / size * grain;
    *begin = first < n ? first : n;
    *end = last < n ? last : n;
}

#endif
