/* The team, its barrier, and the rule for contended cores.
 *
 * One team per process, held by a lease: a run that finds it taken works alone. After runs that lost a core to somebody
 * else (seen by the time that even the busiest thread did not run), the next runs use one thread for a while: a lone thread is
 * slowed by its share of the core, a team by the slowest share at every barrier. A forked child has no team: libgomp's threads
 * stay behind in the parent, and a region would wait for them for ever.
 */
#define _GNU_SOURCE
#include "parallel.h"

#ifdef _OPENMP
#include <omp.h>
#include <pthread.h>
#endif
#include <sched.h>
#include <time.h>
#include <unistd.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

enum {
    SPINS = 2000,                /* some 20-40 us of pause: longer than a balanced step's skew */
    LEAST_LOSS_NS = 200000,      /* a shorter absence is none of our business, */
    FORGIVEN_NS = 25000000,      /* nor is one in such a time */
    FIRST_PENALTY_NS = 20000000, /* work alone for 20 ms once a neighbour is seen ... */
    LAST_PENALTY_NS = 320000000, /* ... doubled up to this while it is seen again */
};

static void relax(void) {
#ifdef FC_X86
    _mm_pause();
#endif
}

static void sleep_while(atomic_int *word, int value) {
#ifdef __linux__
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
#else
    (void)word, (void)value;
    sched_yield();
#endif
}

static void wake_all(atomic_int *word) {
#ifdef __linux__
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1 << 30, NULL, NULL, 0);
#else
    (void)word;
#endif
}

void fc_barrier_wait(fc_barrier *barrier, int size) {
    if (size == 1) return;
    const int round = atomic_load_explicit(&barrier->round, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&barrier->waiting, 1, memory_order_acq_rel) == size - 1) {
        atomic_store_explicit(&barrier->waiting, 0, memory_order_relaxed);
        atomic_store(&barrier->round, round + 1);
        if (atomic_load(&barrier->sleepers)) wake_all(&barrier->round);
        return;
    }
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(&barrier->round, memory_order_acquire) != round) return;
        relax();
    }
    atomic_fetch_add(&barrier->sleepers, 1);
    while (atomic_load(&barrier->round) == round) sleep_while(&barrier->round, round);
    atomic_fetch_sub(&barrier->sleepers, 1);
}

#ifdef _OPENMP
static atomic_flag team_taken = ATOMIC_FLAG_INIT;
static atomic_int is_forked_child;
static pthread_once_t prepared = PTHREAD_ONCE_INIT;
/* Guarded by the lease. */
static int64_t alone_until_ns, penalty_ns, judged_ns, allowance_ns;

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* The time for which the calling thread has had a core. */
static int64_t thread_ns(void) {
#ifdef CLOCK_THREAD_CPUTIME_ID
    struct timespec t;
    if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t) == 0) return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
#endif
    return now_ns();
}

/* Was nobody at work for a real part of a run? Then a neighbour had a core, or the whole team shares one. A rank that waits for
 * another is no loss; housekeeping takes some tens of microseconds, a neighbour a slice of milliseconds. */
static int is_lost(int64_t wall_ns, int64_t busiest_ns) {
    const int64_t idle = wall_ns - busiest_ns;
    return idle > LEAST_LOSS_NS && idle > wall_ns / 8;
}

/* One lost run in 25 ms is forgiven, and, where there was no penalty, two at once: a team that slept often wakes on one
 * core. More are a neighbour. */
static void judge_contention(int64_t ended_ns, int lost) {
    allowance_ns += ended_ns - judged_ns;
    judged_ns = ended_ns;
    const int64_t most = penalty_ns ? FORGIVEN_NS : 2 * FORGIVEN_NS;
    if (allowance_ns > most) allowance_ns = most;
    if (!lost) {
        penalty_ns /= 2;
        return;
    }
    allowance_ns -= FORGIVEN_NS;
    if (allowance_ns < 0) {
        allowance_ns = 0;
        penalty_ns = penalty_ns ? penalty_ns * 2 : FIRST_PENALTY_NS;
        if (penalty_ns > LAST_PENALTY_NS) penalty_ns = LAST_PENALTY_NS;
        alone_until_ns = ended_ns + penalty_ns;
    }
}

static void note_fork(void) { atomic_store(&is_forked_child, 1); }

/* libgomp ends the process when it cannot start a thread. */
static int most_threads;

/* Once: sysconf reads a file, which takes longer than a small run. */
static void prepare(void) {
    const long cores = sysconf(_SC_NPROCESSORS_ONLN);
    most_threads = cores > 64 ? 4 * (int)cores : 256;
    pthread_atfork(NULL, NULL, note_fork);
}

/* Take the lease of the team; 0 if this run is to work alone. */
static int take_team(int threads) {
    pthread_once(&prepared, prepare);
    if (threads <= 1 || atomic_load(&is_forked_child)) return 0;
    return !atomic_flag_test_and_set_explicit(&team_taken, memory_order_acquire);
}

static void give_team_back(void) { atomic_flag_clear_explicit(&team_taken, memory_order_release); }

/* Returns the most time that any rank had a core. */
static int64_t run_together(fc_team_fn *body, void *context, int threads) {
    int64_t busiest = 0;
#pragma omp parallel num_threads(threads < most_threads ? threads : most_threads) reduction(max : busiest)
    {
        const int64_t before = thread_ns();
        body(context, omp_get_thread_num(), omp_get_num_threads());
        busiest = thread_ns() - before;
    }
    return busiest;
}

void fc_team_run(fc_team_fn *body, void *context, int threads) {
    if (!take_team(threads)) {
        body(context, 0, 1);
        return;
    }
    const int64_t started_ns = now_ns();
    if (started_ns < alone_until_ns) {
        body(context, 0, 1);
    } else {
        const int64_t busiest_ns = run_together(body, context, threads), ended_ns = now_ns();
        judge_contention(ended_ns, is_lost(ended_ns - started_ns, busiest_ns));
    }
    give_team_back();
}

void fc_pool_run(fc_team_fn *body, void *context, int threads) {
    if (!take_team(threads)) {
        body(context, 0, 1);
        return;
    }
    run_together(body, context, threads);
    give_team_back();
}
#else
void fc_pool_run(fc_team_fn *body, void *context, int threads) {
    (void)threads;
    body(context, 0, 1);
}

void fc_team_run(fc_team_fn *body, void *context, int threads) {
    (void)threads;
    body(context, 0, 1);
}
#endif
