/* The team, its barrier, and the rule for contended cores.
 *
 * One team per process, held by a lease: a run that finds it taken works alone. After runs that lost a core to somebody
 * else (ru_nivcsw and time), the next runs use one thread for a while: a lone thread is slowed by its share of the core, a team
 * by the slowest share at every barrier. A forked child has no team: libgomp's threads stay behind in the parent, and a region
 * would wait for them for ever.
 */
#define _GNU_SOURCE
#include "parallel.h"

#ifdef _OPENMP
#include <omp.h>
#include <pthread.h>
#endif
#include <sched.h>
#include <sys/resource.h>
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

/* What one thread saw of a run: other threads on its core, and the time in which it did not run. */
typedef struct witness {
    int64_t wall_ns, cpu_ns;
    long switches;
} witness;

static witness look(void) {
    witness w = {now_ns(), 0, 0};
#ifdef RUSAGE_THREAD
    struct timespec cpu;
    struct rusage usage;
    if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &cpu) == 0) w.cpu_ns = (int64_t)cpu.tv_sec * 1000000000 + cpu.tv_nsec;
    if (getrusage(RUSAGE_THREAD, &usage) == 0) w.switches = usage.ru_nivcsw;
#endif
    return w;
}

/* Was a real part of the time between two looks spent off the core, and not by choice? A timer's housekeeping takes some tens of
 * microseconds, a neighbour a slice of milliseconds. */
static int lost_the_core(witness before, witness after) {
    const int64_t wall = after.wall_ns - before.wall_ns, away = wall - (after.cpu_ns - before.cpu_ns);
    return after.switches > before.switches && away > LEAST_LOSS_NS && away > wall / 8;
}

/* One lost run in 25 ms is forgiven, and two at once: a team that slept through a penalty often wakes on one core. More are a
 * neighbour. */
static void judge_contention(int64_t ended_ns, int lost) {
    allowance_ns += ended_ns - judged_ns;
    judged_ns = ended_ns;
    if (allowance_ns > 2 * FORGIVEN_NS) allowance_ns = 2 * FORGIVEN_NS;
    if (lost) allowance_ns -= FORGIVEN_NS;
    if (lost && allowance_ns < 0) {
        allowance_ns = 0;
        penalty_ns = penalty_ns ? penalty_ns * 2 : FIRST_PENALTY_NS;
        if (penalty_ns > LAST_PENALTY_NS) penalty_ns = LAST_PENALTY_NS;
        alone_until_ns = ended_ns + penalty_ns;
    } else {
        penalty_ns /= 2;
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

/* Returns whether a thread lost its core, from when the team was awake: waking moves threads between cores, which says nothing
 * about neighbours. */
static int run_together(fc_team_fn *body, void *context, int threads) {
    int lost = 0;
#pragma omp parallel num_threads(threads < most_threads ? threads : most_threads) reduction(| : lost)
    {
        const witness before = look();
        body(context, omp_get_thread_num(), omp_get_num_threads());
        lost = lost_the_core(before, look());
    }
    return lost;
}

void fc_team_run(fc_team_fn *body, void *context, int threads) {
    if (!take_team(threads)) {
        body(context, 0, 1);
        return;
    }
    if (now_ns() < alone_until_ns) {
        body(context, 0, 1);
    } else {
        const int lost = run_together(body, context, threads);
        judge_contention(now_ns(), lost);
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
