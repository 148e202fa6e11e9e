/* Selection by magnitude over any number of vectors in two passes over memory, and the masks and scores made by rows.
 *
 * A sample brackets the answer first (Floyd & Rivest, 1975). The first pass counts nearly everything by comparisons alone and
 * collects the few magnitudes within the bracket, among which a histogram that zooms in finds the answer; the second pass writes
 * the mask. If the bracket missed, or holds too many (equal values), the histogram passes over everything instead. Exact in every
 * case: a sample only decides where to look.
 */
#include <stdlib.h>

#include "../fastcore.h"
#include "../parallel.h"

enum {
    LARGE = 1 << 18, /* from here on, sample */
    FEW_BUCKETS = 1 << 8,
    MANY_BUCKETS = 1 << 11,
    SMALL = 1 << 13, /* up to here few buckets do */
    SEGMENT = 16,    /* a sample takes whole cache lines */
    MOST_SEGMENTS = 1 << 13,
    GRAIN = 1 << 14,   /* elements that are worth a thread */
    MEMBER_SHARE = 16, /* a bracket may hold one in so many */
    SPARE = 16,        /* members that a kernel may overwrite */
};

/* Magnitudes low <= bits < low + width. */
typedef struct window {
    uint32_t low, width;
} window;
static const window everything = {0, 1u << 31};

/* ---- vectors as one ---- */

/* What of element range [begin, end) lies in the next vector: `at` is that vector, begin moves on. */
typedef struct cursor {
    const fc_vectors *vectors;
    int64_t vector, start; /* the whole's index of the vector's first element */
    int64_t begin, end;
} cursor;

typedef struct piece {
    int64_t vector, offset, n;
} piece;

static cursor cursor_at(const fc_vectors *vectors, int64_t begin, int64_t end) {
    cursor c = {vectors, 0, 0, begin, end};
    while (c.vector < vectors->count && c.start + vectors->n[c.vector] <= begin) c.start += vectors->n[c.vector++];
    return c;
}

/* The next piece; 0 after the last. */
static int next_piece(cursor *c, piece *p) {
    if (c->begin >= c->end) return 0;
    while (c->start + c->vectors->n[c->vector] <= c->begin) c->start += c->vectors->n[c->vector++];
    const int64_t last = c->start + c->vectors->n[c->vector], end = last < c->end ? last : c->end;
    *p = (piece){c->vector, c->begin - c->start, end - c->begin};
    c->begin = end;
    return 1;
}

static const float *address(const fc_vectors *vectors, piece p) { return vectors->x[p.vector] + p.offset; }

/* ---- histograms ---- */

typedef struct count_pass {
    const fc_vectors *x;
    uint32_t low;
    int shift;
    int64_t buckets;
    fc_magnitude_counts *counts; /* one per rank */
} count_pass;

static void count_share(const void *args, int rank, int size) {
    const count_pass *p = args;
    int64_t begin, end;
    piece at;
    fc_partition(p->x->total, GRAIN, rank, size, &begin, &end);
    for (cursor c = cursor_at(p->x, begin, end); next_piece(&c, &at);)
        fc_kernels.count_magnitudes_f32(address(p->x, at), at.n, p->low, p->shift, p->buckets, &p->counts[rank]);
}

/* Run one pass; the sum over ranks ends in counts[0]. */
static void count_all(const count_pass *p, int threads) {
    for (int i = 0; i < threads; i++) {
        p->counts[i].below = p->counts[i].nan = 0;
        memset(p->counts[i].buckets, 0, (size_t)p->buckets * sizeof(int64_t));
    }
    if (threads == 1)
        count_share(p, 0, 1);
    else
        fc_run_step(count_share, p, threads);
    for (int i = 1; i < threads; i++) {
        p->counts[0].below += p->counts[i].below;
        p->counts[0].nan += p->counts[i].nan;
        for (int64_t b = 0; b < p->buckets; b++) p->counts[0].buckets[b] += p->counts[i].buckets[b];
    }
}

/* Narrow the window down to the one magnitude of rank k, `most` buckets at a time. */
static fc_status zoom(const fc_vectors *x, int64_t k, window w, int64_t most, fc_magnitude_counts *counts, int threads,
                      fc_selection *found) {
    count_pass p = {.x = x, .counts = counts};
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

static int64_t buckets_for(int64_t n) { return n <= SMALL ? FEW_BUCKETS : MANY_BUCKETS; }

static fc_status select_within(const fc_vectors *x, int64_t k, window w, int threads, fc_selection *found) {
    const int64_t most = buckets_for(x->total);
    fc_magnitude_counts *counts = malloc((size_t)threads * sizeof *counts);
    int64_t *buckets = malloc((size_t)threads * (size_t)most * sizeof *buckets);
    fc_status status = FC_NO_MEMORY;
    if (counts && buckets) {
        for (int i = 0; i < threads; i++) counts[i].buckets = buckets + i * most;
        status = zoom(x, k, w, most, counts, threads, found);
    }
    free(buckets);
    free(counts);
    return status;
}

/* ---- the bracket, and what lies within ---- */

static fc_vectors one_vector(const float *const *x, const int64_t *n) { return (fc_vectors){x, n, 1, *n}; }

static void copy_elements(const fc_vectors *x, int64_t begin, int64_t n, float *out) {
    piece at;
    for (cursor c = cursor_at(x, begin, begin + n); next_piece(&c, &at); out += at.n)
        memcpy(out, address(x, at), (size_t)at.n * sizeof *out);
}

/* A window that holds rank k of x unless the sample is unlucky: five standard deviations to both sides. */
static fc_status bracket(const fc_vectors *x, int64_t k, window *w) {
    const int64_t wanted = x->total / 64 / SEGMENT, segments = wanted < MOST_SEGMENTS ? wanted : MOST_SEGMENTS;
    const int64_t size = segments * SEGMENT, stride = x->total / segments;
    float *sample = malloc((size_t)size * sizeof *sample);
    if (!sample) return FC_NO_MEMORY;
    for (int64_t i = 0; i < segments; i++) copy_elements(x, i * stride, SEGMENT, sample + i * SEGMENT);
    const float *const first = sample;
    const fc_vectors sampled = one_vector(&first, &size);
    const double share = (double)k / (double)x->total, centre = share * (double)size;
    const double margin = 5.0 * __builtin_sqrt((double)size * share * (1.0 - share)) + SEGMENT;
    fc_selection low = {0, 0, 0}, high = {(1u << 31) - 1, 0, 0};
    fc_status status = FC_OK;
    if (centre - margin >= 1.0) status = select_within(&sampled, (int64_t)(centre - margin), everything, 1, &low);
    if (status == FC_OK && centre + margin <= (double)size)
        status = select_within(&sampled, (int64_t)(centre + margin), everything, 1, &high);
    free(sample);
    *w = (window){low.bits, high.bits - low.bits + 1};
    return status;
}

/* Parts, not ranks, own members and ties, because two runs may have teams of different sizes. */
typedef struct collect_pass {
    const fc_vectors *x;
    window w;
    int parts;
    fc_magnitude_members *members; /* by part */
} collect_pass;

static void collect_parts(const void *args, int rank, int size) {
    const collect_pass *p = args;
    for (int part = rank; part < p->parts; part += size) {
        int64_t begin, end;
        piece at;
        fc_partition(p->x->total, GRAIN, part, p->parts, &begin, &end);
        for (cursor c = cursor_at(p->x, begin, end); next_piece(&c, &at);)
            fc_kernels.collect_magnitudes_f32(address(p->x, at), at.n, p->w.low, p->w.width, &p->members[part]);
    }
}

/* Find rank k among collected members. ties[parts] (or NULL) gets how many of each part equal it. */
static fc_status select_member(const collect_pass *p, int64_t k, fc_selection *found, int64_t *ties) {
    const float *x[p->parts];
    int64_t n[p->parts];
    fc_vectors members = {x, n, p->parts, 0};
    for (int i = 0; i < p->parts; i++) {
        x[i] = (const float *)p->members[i].member; /* the bits of positive floats */
        members.total += n[i] = p->members[i].inside;
    }
    const fc_status status = select_within(&members, k, p->w, 1, found);
    for (int i = 0; ties && status == FC_OK && i < p->parts; i++) {
        ties[i] = 0;
        fc_magnitude_counts counts = {0, 0, &ties[i]};
        fc_kernels.count_magnitudes_f32(x[i], n[i], found->bits, 0, 1, &counts);
    }
    return status;
}

/* One pass over all elements. *done stays 0 where the window does not hold the answer or holds too many: members are freed
 * anyway. */
static fc_status select_in_bracket(const fc_vectors *x, int64_t k, window w, int parts, fc_selection *found, int64_t *ties,
                                   int *done) {
    const int64_t capacity = x->total / MEMBER_SHARE;
    fc_magnitude_members members[parts];
    collect_pass p = {x, w, parts, members};
    uint32_t *memory = malloc((size_t)parts * (size_t)(capacity + SPARE) * sizeof *memory); /* touched where it is needed */
    if (!memory) return FC_NO_MEMORY;
    for (int i = 0; i < parts; i++) members[i] = (fc_magnitude_members){0, 0, 0, memory + i * (capacity + SPARE), capacity};
    fc_run_step(collect_parts, &p, parts);
    int64_t below = 0, inside = 0, nan = 0;
    int full = 0;
    for (int i = 0; i < parts; i++) {
        below += members[i].below, inside += members[i].inside, nan += members[i].nan;
        full |= members[i].inside > capacity;
    }
    fc_status status = nan ? FC_BAD_ARGUMENT : FC_OK;
    if (!nan && !full && below < k && k <= below + inside) {
        status = select_member(&p, k - below, found, ties);
        found->below += below;
        *done = 1;
    }
    free(memory);
    return status;
}

static int useful_parts(int64_t n, int threads) {
    enum { MOST = 256 };
    const int64_t most = n / GRAIN + 1;
    const int wanted = threads < 1 ? 1 : threads < MOST ? threads : MOST;
    return wanted > most ? (int)most : wanted;
}

/* *tied says whether ties[parts] was filled. */
static fc_status select_parts(const fc_vectors *x, int64_t k, int parts, fc_selection *found, int64_t *ties, int *tied) {
    *tied = 0;
    window w = everything;
    if (x->total >= LARGE) {
        fc_status status = bracket(x, k, &w);
        if (status == FC_OK && w.width < everything.width) status = select_in_bracket(x, k, w, parts, found, ties, tied);
        if (status != FC_OK || *tied) return status;
    }
    return select_within(x, k, w, parts, found);
}

fc_status fc_select_magnitude(const fc_vectors *x, int64_t k, int threads, fc_selection *found) {
    int tied;
    return select_parts(x, k, useful_parts(x->total, threads), found, NULL, &tied);
}

/* ---- masks ---- */

typedef struct mask_pass {
    const fc_vectors *x;
    uint32_t threshold;
    int parts;
    int64_t *drop; /* by part: first how many ties it has, then how many of them go */
    uint8_t *const *masks;
} mask_pass;

static void count_ties(const void *args, int rank, int size) {
    const mask_pass *p = args;
    for (int part = rank; part < p->parts; part += size) {
        int64_t begin, end;
        piece at;
        fc_partition(p->x->total, GRAIN, part, p->parts, &begin, &end);
        p->drop[part] = 0;
        fc_magnitude_counts counts = {0, 0, &p->drop[part]};
        for (cursor c = cursor_at(p->x, begin, end); next_piece(&c, &at);)
            fc_kernels.count_magnitudes_f32(address(p->x, at), at.n, p->threshold, 0, 1, &counts);
    }
}

static void write_mask(const void *args, int rank, int size) {
    const mask_pass *p = args;
    for (int part = rank; part < p->parts; part += size) {
        int64_t begin, end, drop = p->drop[part];
        piece at;
        fc_partition(p->x->total, GRAIN, part, p->parts, &begin, &end);
        for (cursor c = cursor_at(p->x, begin, end); next_piece(&c, &at);)
            drop = fc_kernels.mask_magnitudes_f32(address(p->x, at), at.n, p->threshold, drop, p->masks[at.vector] + at.offset);
    }
}

/* Turn how many ties each part has into how many of them go: `left` in all, the first ones. */
static void share_ties(int64_t *ties, int parts, int64_t left) {
    for (int i = 0; i < parts; i++) {
        if (ties[i] > left) ties[i] = left;
        left -= ties[i];
    }
}

fc_status fc_magnitude_mask(const fc_vectors *x, int64_t drop, int threads, uint8_t *const *masks) {
    if (x->total == 0) return FC_OK;
    const int parts = useful_parts(x->total, threads);
    int64_t ties[parts];
    int tied;
    fc_selection found;
    const fc_status status = select_parts(x, drop ? drop : 1, parts, &found, ties, &tied);
    if (status != FC_OK) return status;
    mask_pass p = {x, found.bits, parts, ties, masks};
    const int64_t left = drop ? drop - found.below : 0;
    /* Which part holds which tie matters only if some ties go and others stay. */
    if (left == 0 || left == found.equal || parts == 1) {
        for (int i = 0; i < parts; i++) ties[i] = left;
    } else {
        if (!tied) fc_run_step(count_ties, &p, parts);
        share_ties(ties, parts, left);
    }
    fc_run_step(write_mask, &p, parts);
    return FC_OK;
}

typedef struct rows_pass {
    const float *x;
    int64_t rows, columns, drop;
    uint8_t *mask;
    int64_t *buckets;  /* buckets_for(columns) for each rank */
    fc_status *status; /* by rank */
} rows_pass;

static fc_status mask_row(const rows_pass *p, int64_t row, fc_magnitude_counts *counts) {
    const float *const x = p->x + row * p->columns;
    const fc_vectors vectors = one_vector(&x, &p->columns);
    fc_selection found;
    const fc_status status = zoom(&vectors, p->drop ? p->drop : 1, everything, buckets_for(p->columns), counts, 1, &found);
    if (status != FC_OK) return status;
    fc_kernels.mask_magnitudes_f32(x, p->columns, found.bits, p->drop ? p->drop - found.below : 0, p->mask + row * p->columns);
    return FC_OK;
}

static void mask_rows(const void *args, int rank, int size) {
    const rows_pass *p = args;
    int64_t begin, end;
    fc_magnitude_counts counts = {0, 0, p->buckets + rank * buckets_for(p->columns)};
    fc_partition(p->rows, 1, rank, size, &begin, &end);
    for (int64_t row = begin; row < end && p->status[rank] == FC_OK; row++) p->status[rank] = mask_row(p, row, &counts);
}

fc_status fc_magnitude_mask_rows(const float *x, int64_t rows, int64_t columns, int64_t drop, int threads, uint8_t *mask) {
    if (rows * columns == 0) return FC_OK;
    const int parts = useful_parts(rows * columns, threads);
    fc_status by_rank[parts], status = FC_OK;
    rows_pass p = {x, rows, columns, drop, mask, NULL, by_rank};
    p.buckets = malloc((size_t)parts * (size_t)buckets_for(columns) * sizeof *p.buckets);
    if (!p.buckets) return FC_NO_MEMORY;
    for (int i = 0; i < parts; i++) by_rank[i] = FC_OK;
    fc_run_step(mask_rows, &p, parts);
    for (int i = 0; i < parts; i++)
        if (by_rank[i] != FC_OK) status = by_rank[i];
    free(p.buckets);
    return status;
}

typedef struct groups_pass {
    const float *x;
    int64_t n, keep, of;
    uint8_t *mask;
    int *nan; /* by rank */
} groups_pass;

static void mask_groups(const void *args, int rank, int size) {
    const groups_pass *p = args;
    int64_t begin, end;
    fc_partition(p->n / p->of, GRAIN, rank, size, &begin, &end);
    p->nan[rank] |=
        fc_kernels.mask_n_of_m_f32(p->x + begin * p->of, (end - begin) * p->of, p->keep, p->of, p->mask + begin * p->of);
}

fc_status fc_n_of_m_mask(const float *x, int64_t n, int64_t keep, int64_t of, int threads, uint8_t *mask) {
    const int parts = useful_parts(n / of, threads);
    int by_rank[parts], nan = 0;
    const groups_pass p = {x, n, keep, of, mask, by_rank};
    memset(by_rank, 0, (size_t)parts * sizeof *by_rank);
    fc_run_step(mask_groups, &p, parts);
    for (int i = 0; i < parts; i++) nan |= by_rank[i];
    return nan ? FC_BAD_ARGUMENT : FC_OK;
}

/* ---- by rows of blocks ---- */

void fc_block_magnitudes(const void *args, int rank, int size) {
    const fc_block_grid *grid = args;
    const int64_t columns = grid->k / grid->block_cols;
    int64_t begin, end;
    fc_partition(grid->n / grid->block_rows, 1, rank, size, &begin, &end);
    for (int64_t g = begin; g < end; g++)
        fc_kernels.sum_block_squares_f32(grid->weight + g * grid->block_rows * grid->k, grid->norms, columns, grid->block_rows,
                                         grid->block_cols, grid->out + g * columns);
}

void fc_channel_magnitudes(const void *args, int rank, int size) {
    const fc_block_grid *grid = args;
    int64_t begin, end;
    fc_partition(grid->n, 1, rank, size, &begin, &end);
    for (int64_t row = begin; row < end; row++)
        fc_kernels.scale_magnitudes_f32(grid->weight + row * grid->k, grid->norms, grid->k, grid->out + row * grid->k);
}

void fc_apply_mask(const void *args, int rank, int size) {
    const fc_block_grid *grid = args;
    const int64_t columns = grid->k / grid->block_cols;
    int64_t begin, end;
    fc_partition(grid->n, 1, rank, size, &begin, &end);
    for (int64_t row = begin; row < end; row++)
        fc_kernels.apply_mask_f32(grid->weight + row * grid->k, grid->mask + row / grid->block_rows * columns, columns,
                                  grid->block_cols);
}
