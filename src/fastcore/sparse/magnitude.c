/* Selection by magnitude: a histogram of the bits that zooms in on the k-th value, and the masks made from it.
 *
 * A sample brackets the answer first (Floyd & Rivest, 1975), so that in a large array the first pass counts nearly everything by
 * a comparison alone and its histogram already covers few magnitudes; a second pass resolves one bucket. If the bracket missed,
 * the passes start over from the whole range. Exact in every case: a sample only decides where to look.
 */
#include <stdlib.h>

#include "../fastcore.h"
#include "../parallel.h"

enum {
    LARGE = 1 << 18, /* from here on, sample and use the wide histogram */
    FEW_BUCKETS = 1 << 11,
    MANY_BUCKETS = 1 << 16,
    SEGMENT = 16, /* a sample takes whole cache lines */
    MOST_SEGMENTS = 1 << 13,
    GRAIN = 1 << 14, /* elements that are worth a thread */
};

/* Magnitudes low <= bits < low + width. */
typedef struct window {
    uint32_t low, width;
} window;
static const window everything = {0, 1u << 31};

typedef struct count_pass {
    const float *x;
    int64_t n;
    uint32_t low;
    int shift;
    int64_t buckets;
    fc_magnitude_counts *counts; /* one per rank */
} count_pass;

static void count_share(const void *args, int rank, int size) {
    const count_pass *p = args;
    int64_t begin, end;
    fc_partition(p->n, GRAIN, rank, size, &begin, &end);
    if (begin < end) fc_kernels.count_magnitudes_f32(p->x + begin, end - begin, p->low, p->shift, p->buckets, &p->counts[rank]);
}

/* Run one pass; the sum over ranks ends in counts[0]. */
static void count_all(const count_pass *p, int threads) {
    for (int i = 0; i < threads; i++) {
        p->counts[i].below = p->counts[i].nan = 0;
        memset(p->counts[i].buckets, 0, (size_t)p->buckets * sizeof(int64_t));
    }
    fc_run_step(count_share, p, threads);
    for (int i = 1; i < threads; i++) {
        p->counts[0].below += p->counts[i].below;
        p->counts[0].nan += p->counts[i].nan;
        for (int64_t b = 0; b < p->buckets; b++) p->counts[0].buckets[b] += p->counts[i].buckets[b];
    }
}

/* Narrow the window down to the one magnitude of rank k. */
static fc_status zoom(const float *x, int64_t n, int64_t k, window w, int64_t most, fc_magnitude_counts *counts, int threads,
                      fc_selection *found) {
    count_pass p = {.x = x, .n = n, .counts = counts};
    do {
        p.shift = 0;
        while ((w.width - 1) >> p.shift >= (uint64_t)most) p.shift++;
        p.buckets = (int64_t)((w.width - 1) >> p.shift) + 1;
        const uint64_t span = (uint64_t)p.buckets << p.shift, highest = (UINT64_C(1) << 31) - span;
        p.low = w.low < highest ? w.low : (uint32_t)highest;
        count_all(&p, threads);
        if (counts->nan) return FC_BAD_ARGUMENT;
        int64_t below = counts->below, b = 0;
        while (b < p.buckets && below + counts->buckets[b] < k) below += counts->buckets[b++];
        if (counts->below >= k || b == p.buckets) {
            w = everything;
            p.shift = 31;
            continue;
        }
        w = (window){p.low + ((uint32_t)b << p.shift), 1u << p.shift};
        *found = (fc_selection){w.low, below, counts->buckets[b]};
    } while (p.shift > 0);
    return FC_OK;
}

static fc_status select_within(const float *x, int64_t n, int64_t k, window w, int64_t most, int threads, fc_selection *found) {
    fc_magnitude_counts *counts = malloc((size_t)threads * sizeof *counts);
    int64_t *buckets = malloc((size_t)threads * (size_t)most * sizeof *buckets);
    fc_status status = FC_NO_MEMORY;
    if (counts && buckets) {
        for (int i = 0; i < threads; i++) counts[i].buckets = buckets + i * most;
        status = zoom(x, n, k, w, most, counts, threads, found);
    }
    free(buckets);
    free(counts);
    return status;
}

/* A window that holds rank k of x unless the sample is unlucky: five standard deviations to both sides. */
static fc_status bracket(const float *x, int64_t n, int64_t k, window *w) {
    const int64_t wanted = n / 64 / SEGMENT, segments = wanted < MOST_SEGMENTS ? wanted : MOST_SEGMENTS;
    const int64_t size = segments * SEGMENT;
    float *sample = malloc((size_t)size * sizeof *sample);
    if (!sample) return FC_NO_MEMORY;
    const int64_t stride = n / segments;
    for (int64_t i = 0; i < segments; i++) memcpy(sample + i * SEGMENT, x + i * stride, SEGMENT * sizeof *sample);
    const double share = (double)k / (double)n, margin = 5.0 * __builtin_sqrt((double)size * share * (1.0 - share)) + SEGMENT;
    const double centre = share * (double)size;
    fc_selection low = {0, 0, 0}, high = {(1u << 31) - 1, 0, 0};
    fc_status status = FC_OK;
    if (centre - margin >= 1.0)
        status = select_within(sample, size, (int64_t)(centre - margin), everything, FEW_BUCKETS, 1, &low);
    if (status == FC_OK && centre + margin <= (double)size)
        status = select_within(sample, size, (int64_t)(centre + margin), everything, FEW_BUCKETS, 1, &high);
    free(sample);
    *w = (window){low.bits, high.bits - low.bits + 1};
    return status;
}

static int useful_threads(int64_t n, int threads) {
    const int64_t most = n / GRAIN + 1;
    return threads < 1 ? 1 : threads > most ? (int)most : threads;
}

fc_status fc_select_magnitude(const float *x, int64_t n, int64_t k, int threads, fc_selection *found) {
    window w = everything;
    if (n >= LARGE) {
        const fc_status status = bracket(x, n, k, &w);
        if (status != FC_OK) return status;
    }
    const int64_t most = w.width > FEW_BUCKETS * FEW_BUCKETS ? MANY_BUCKETS : FEW_BUCKETS;
    return select_within(x, n, k, w, n >= LARGE ? most : FEW_BUCKETS, useful_threads(n, threads), found);
}

/* Parts, not ranks, own the ties, because two runs may have teams of different sizes. */
typedef struct mask_pass {
    const float *x;
    int64_t n;
    uint32_t threshold;
    int parts;
    int64_t *drop; /* by part: first how many ties it has, then how many of them go */
    uint8_t *mask;
} mask_pass;

static void count_ties(const void *args, int rank, int size) {
    const mask_pass *p = args;
    for (int part = rank; part < p->parts; part += size) {
        int64_t begin, end;
        fc_partition(p->n, GRAIN, part, p->parts, &begin, &end);
        fc_magnitude_counts counts = {0, 0, &p->drop[part]};
        fc_kernels.count_magnitudes_f32(p->x + begin, end - begin, p->threshold, 0, 1, &counts);
    }
}

static void write_mask(const void *args, int rank, int size) {
    const mask_pass *p = args;
    for (int part = rank; part < p->parts; part += size) {
        int64_t begin, end;
        fc_partition(p->n, GRAIN, part, p->parts, &begin, &end);
        fc_kernels.mask_magnitudes_f32(p->x + begin, end - begin, p->threshold, p->drop[part], p->mask + begin);
    }
}

fc_status fc_magnitude_mask(const float *x, int64_t n, int64_t drop, int threads, uint8_t *mask) {
    if (n == 0) return FC_OK;
    fc_selection found;
    const fc_status status = fc_select_magnitude(x, n, drop ? drop : 1, threads, &found);
    if (status != FC_OK) return status;
    mask_pass p = {.x = x, .n = n, .threshold = found.bits, .parts = useful_threads(n, threads), .mask = mask};
    p.drop = calloc((size_t)p.parts, sizeof *p.drop);
    if (!p.drop) return FC_NO_MEMORY;
    int64_t left = drop ? drop - found.below : 0;
    /* Which part holds which tie matters only if some ties go and others stay. */
    if (left > 0 && left < found.equal && p.parts > 1) {
        fc_run_step(count_ties, &p, threads);
        for (int i = 0; i < p.parts; i++) {
            if (p.drop[i] > left) p.drop[i] = left;
            left -= p.drop[i];
        }
    } else {
        for (int i = 0; i < p.parts; i++) p.drop[i] = left;
    }
    fc_run_step(write_mask, &p, threads);
    free(p.drop);
    return FC_OK;
}

void fc_block_magnitudes(const void *args, int rank, int size) {
    const fc_block_grid *grid = args;
    const int64_t columns = grid->k / grid->block_cols;
    int64_t begin, end;
    fc_partition(grid->n / grid->block_rows, 1, rank, size, &begin, &end);
    for (int64_t g = begin; g < end; g++)
        fc_kernels.sum_block_squares_f32(grid->weight + g * grid->block_rows * grid->k, columns, grid->block_rows,
                                         grid->block_cols, grid->out + g * columns);
}
