/* The team, its barrier, and the rule for contended cores.
 *
 * One team per process, held by a lease: a run that finds it taken works alone. After a run that lost its core to somebody
 * else (ru_nivcsw), the next runs use one thread for a while: a lone thread is slowed by its share of the core, a team by the
 * slowest share at every barrier. A forked child has no team: libgomp's threads stay behind in the parent, and a region would
 * wait for them for ever.
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
    FIRST_PENALTY_NS = 20000000, /* work alone for 20 ms after the first preemption seen ... */
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
static pthread_once_t watching_forks = PTHREAD_ONCE_INIT;
/* Guarded by the lease. */
static int64_t alone_until_ns, penalty_ns;

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static long preemptions(void) {
    struct rusage usage;
    return getrusage(RUSAGE_SELF, &usage) == 0 ? usage.ru_nivcsw : 0;
}

/* A few preemptions in a long run are the daily business of any system; more than one in 25 ms are a neighbour. */
static void judge_contention(int64_t started_ns, int64_t ended_ns, long lost) {
    if (lost > 0 && lost > (ended_ns - started_ns) / 25000000) {
        penalty_ns = penalty_ns ? penalty_ns * 2 : FIRST_PENALTY_NS;
        if (penalty_ns > LAST_PENALTY_NS) penalty_ns = LAST_PENALTY_NS;
        alone_until_ns = ended_ns + penalty_ns;
    } else {
        penalty_ns /= 2;
    }
}

static void note_fork(void) { atomic_store(&is_forked_child, 1); }

static void watch_forks(void) { pthread_atfork(NULL, NULL, note_fork); }

/* libgomp ends the process when it cannot start a thread. */
static int affordable(int threads) {
    const long cores = sysconf(_SC_NPROCESSORS_ONLN), most = cores > 64 ? 4 * cores : 256;
    return threads < most ? threads : (int)most;
}

/* Take the lease of the team; 0 if this run is to work alone. */
static int take_team(int threads) {
    pthread_once(&watching_forks, watch_forks);
    if (threads <= 1 || atomic_load(&is_forked_child)) return 0;
    return !atomic_flag_test_and_set_explicit(&team_taken, memory_order_acquire);
}

static void give_team_back(void) { atomic_flag_clear_explicit(&team_taken, memory_order_release); }

static void run_together(fc_team_fn *body, void *context, int threads) {
#pragma omp parallel num_threads(affordable(threads))
    body(context, omp_get_thread_num(), omp_get_num_threads());
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
        const long before = preemptions();
        run_together(body, context, threads);
        judge_contention(started_ns, now_ns(), preemptions() - before);
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
