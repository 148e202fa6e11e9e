/* Steps of the text family: who does which rows or columns. No result depends on the number of threads: rows are independent,
 * and what is added up over rows (pooling, the scatter-add of a table's gradient) is split by columns.
 */
#include <math.h>
#include <string.h>

#include "../fastcore.h"
#include "../parallel.h"

enum {
    SMALLEST_SHARE = 4096, /* elements that one thread alone moves faster than two with a barrier */
    LINE = 16,             /* floats of a cache line: no two threads write one */
};

static int64_t at_least_one(int64_t n) { return n > 0 ? n : 1; }

static void share_rows(int64_t m, int64_t n, int rank, int size, int64_t *begin, int64_t *end) {
    fc_partition(m, at_least_one(SMALLEST_SHARE / at_least_one(n)), rank, size, begin, end);
}

/* This rank's columns of m rows of n. */
static void share_columns(int64_t m, int64_t n, int rank, int size, int64_t *begin, int64_t *end) {
    fc_partition(n, LINE * at_least_one(SMALLEST_SHARE / LINE / at_least_one(m)), rank, size, begin, end);
}

static void fill_nan(float *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] = NAN;
}

static void fill_zero(float *x, int64_t n) { memset(x, 0, (size_t)n * sizeof *x); }

static void copy(float *to, const float *from, int64_t n) { memcpy(to, from, (size_t)n * sizeof *to); }

/* ---- rows by index ---- */

/* The place that an index means, or -1 where there is none. */
static int64_t place_of(const fc_indices *indices, int64_t i, int64_t places) {
    const int64_t value = indices->wide ? ((const int64_t *)indices->values)[i] : ((const int32_t *)indices->values)[i];
    const int64_t place = value < 0 ? value + places : value;
    return 0 <= place && place < places ? place : -1;
}

void fc_text_gather(const void *args, int rank, int size) {
    const fc_gather *g = args;
    int64_t row, end;
    share_rows(g->outer * g->count, g->inner, rank, size, &row, &end);
    for (; row < end; row++) {
        const int64_t o = row / g->count, place = place_of(&g->indices, row % g->count, g->places);
        if (place < 0)
            fill_nan(g->out + row * g->inner, g->inner);
        else if (g->table)
            fc_kernels.expand_u4_f32(g->table, place, 0, g->out + row * g->inner);
        else
            copy(g->out + row * g->inner, g->data + (o * g->places + place) * g->inner, g->inner);
    }
}

void fc_text_gather_grad(const void *args, int rank, int size) {
    const fc_gather *g = args;
    int64_t j, end;
    share_columns(g->outer * g->places, g->inner, rank, size, &j, &end);
    if (j == end) return;
    for (int64_t o = 0; o < g->outer; o++) {
        float *grad = g->out + o * g->places * g->inner;
        const float *dy = g->data + o * g->count * g->inner;
        if (end - j == g->inner)
            fill_zero(grad, g->places * g->inner);
        else
            for (int64_t place = 0; place < g->places; place++) fill_zero(grad + place * g->inner + j, end - j);
        for (int64_t i = 0; i < g->count; i++) {
            const int64_t place = place_of(&g->indices, i, g->places);
            float *to = grad + place * g->inner + j;
            if (place >= 0) fc_kernels.add_f32(to, dy + i * g->inner + j, end - j, to);
        }
    }
}

void fc_text_lookups(const void *args, int rank, int size) {
    const fc_lookups *a = args;
    int64_t row, end;
    share_rows(a->count, a->n, rank, size, &row, &end);
    for (; row < end; row++) {
        float *out = a->out + row * a->n;
        for (int64_t t = 0; t < a->tables; t++) {
            const int64_t place = place_of(&a->indices[t], row, a->places[t]);
            if (place < 0) {
                fill_nan(out, a->n);
                break;
            }
            if (a->packed[t])
                fc_kernels.expand_u4_f32(a->packed[t], place, t > 0, out);
            else if (t == 0)
                copy(out, a->data[t] + place * a->n, a->n);
            else
                fc_kernels.add_f32(out, a->data[t] + place * a->n, a->n, out);
        }
    }
}

/* ---- pooling ---- */

/* One sequence: rows [begin, end) of x, and the mask's row unless all of them count. */
typedef struct sequence {
    int64_t begin, end;
    const void *mask;
} sequence;

static int64_t clamp(int64_t value, int64_t low, int64_t high) { return value < low ? low : value > high ? high : value; }

static sequence sequence_of(const fc_token_pool *p, int64_t segment) {
    if (p->offsets) {
        const int64_t begin = clamp(p->offsets[segment], 0, p->rows);
        return (sequence){begin, clamp(p->offsets[segment + 1], begin, p->rows), NULL};
    }
    const char *mask = (const char *)p->mask + segment * p->length * p->mask_bytes;
    return (sequence){segment * p->length, (segment + 1) * p->length, mask};
}

static int counts(const fc_token_pool *p, const sequence *s, int64_t row) {
    if (!s->mask) return 1;
    return p->mask_bytes == 8 ? ((const int64_t *)s->mask)[row - s->begin] != 0 : ((const char *)s->mask)[row - s->begin] != 0;
}

/* What the weights of a sequence's rows are divided by; 0 for one without tokens. */
static double divisor(const fc_token_pool *p, const sequence *s) {
    double tokens = 0, places = 0;
    for (int64_t row = s->begin; row < s->end; row++)
        if (counts(p, s, row)) tokens += 1, places += (double)(row - s->begin + 1);
    return p->mode == FC_POOL_SQRT ? sqrt(tokens) : p->mode == FC_POOL_WEIGHTED ? places : p->mode == FC_POOL_MEAN ? tokens : 1;
}

static float weight_of(const fc_token_pool *p, const sequence *s, int64_t row, double total) {
    return (float)((p->mode == FC_POOL_WEIGHTED ? (double)(row - s->begin + 1) : 1) / total);
}

static void pool_sequence(const fc_token_pool *p, const sequence *s, int64_t j, int64_t columns, float *out) {
    const double total = divisor(p, s);
    int some = 0;
    fill_zero(out, columns);
    for (int64_t row = s->begin; row < s->end; row++) {
        const float *x = p->x + row * p->n + j;
        if (!counts(p, s, row)) continue;
        if (p->mode == FC_POOL_FIRST || (p->mode == FC_POOL_MAX && !some))
            copy(out, x, columns);
        else if (p->mode == FC_POOL_MAX)
            fc_kernels.maximum_f32(x, columns, out);
        else
            fc_kernels.accumulate_f32(x, weight_of(p, s, row, total), columns, out);
        if (p->mode == FC_POOL_FIRST) break;
        some = 1;
    }
}

void fc_text_pool(const void *args, int rank, int size) {
    const fc_token_pool *p = args;
    int64_t j, end;
    share_columns(p->rows, p->n, rank, size, &j, &end);
    if (j == end) return;
    for (int64_t b = 0; b < p->segments; b++) {
        const sequence s = sequence_of(p, b);
        pool_sequence(p, &s, j, end - j, p->out + b * p->n + j);
    }
}

/* The gradient of a maximum goes to the first row that reaches it, NaN being the largest. */
static void max_grad_of_column(const fc_token_pool *p, const sequence *s, int64_t j, float dy) {
    int64_t best = -1;
    for (int64_t row = s->begin; row < s->end; row++) {
        if (!counts(p, s, row)) continue;
        const float x = p->x[row * p->n + j], top = best < 0 ? 0 : p->x[best * p->n + j];
        if (best < 0 || x > top || (isnan(x) && !isnan(top))) best = row;
    }
    if (best >= 0) p->out[best * p->n + j] = dy;
}

void fc_text_pool_grad(const void *args, int rank, int size) {
    const fc_token_pool *p = args;
    int64_t begin, end;
    share_columns(p->rows, p->n, rank, size, &begin, &end);
    if (begin == end) return;
    for (int64_t row = 0; row < p->rows; row++) fill_zero(p->out + row * p->n + begin, end - begin);
    for (int64_t b = 0; b < p->segments; b++) {
        const sequence s = sequence_of(p, b);
        const float *dy = p->dy + b * p->n;
        const double total = divisor(p, &s);
        for (int64_t j = begin; p->mode == FC_POOL_MAX && j < end; j++) max_grad_of_column(p, &s, j, dy[j]);
        for (int64_t row = s.begin; p->mode != FC_POOL_MAX && row < s.end; row++) {
            if (!counts(p, &s, row)) continue;
            fc_kernels.scale_f32(dy + begin, weight_of(p, &s, row, total), end - begin, p->out + row * p->n + begin);
            if (p->mode == FC_POOL_FIRST) break;
        }
    }
}

/* ---- norms and cosines ---- */

/* Whether a sum of squares lost nothing to the range of float32. */
static int in_range(float square) { return square > 0x1p-80f && square < 0x1p80f; }

static void wide_dots(const float *x, const float *y, int64_t n, double sums[3]) {
    sums[0] = sums[1] = sums[2] = 0;
    for (int64_t j = 0; j < n; j++) {
        sums[0] += (double)x[j] * x[j];
        sums[1] += (double)x[j] * y[j];
        sums[2] += (double)y[j] * y[j];
    }
}

/* {x . x, x . y, y . y}, in double where float32 has not the range. */
static void dots(const float *x, const float *y, int64_t n, double sums[3]) {
    float narrow[3];
    fc_kernels.dots_f32(x, y, n, narrow);
    for (int i = 0; i < 3; i++) sums[i] = (double)narrow[i];
    if (!in_range(narrow[0]) || !in_range(narrow[2])) wide_dots(x, y, n, sums);
}

static int fits_float(double factor) { return factor == 0 || (fabs(factor) > 0x1p-120 && fabs(factor) < 0x1p120); }

/* out = a * x + b * y, in double where a factor leaves the range of float32. */
static void combine(const float *x, double a, const float *y, double b, int64_t n, float *out) {
    if (fits_float(a) && fits_float(b))
        fc_kernels.combine_f32(x, (float)a, y, (float)b, n, out);
    else
        for (int64_t j = 0; j < n; j++) out[j] = (float)(a * x[j] + b * y[j]);
}

void fc_text_normalize(const void *args, int rank, int size) {
    const fc_rows *a = args;
    int64_t i, end;
    share_rows(a->m, a->n, rank, size, &i, &end);
    for (; i < end; i++) {
        const float *x = a->x + i * a->n;
        double sums[3];
        dots(x, x, a->n, sums);
        const double inverse = sums[0] == 0 ? 0 : 1 / sqrt(sums[0]);
        if (fits_float(inverse))
            fc_kernels.scale_f32(x, (float)inverse, a->n, a->out + i * a->n);
        else
            for (int64_t j = 0; j < a->n; j++) a->out[i * a->n + j] = (float)(x[j] * inverse);
    }
}

void fc_text_normalize_grad(const void *args, int rank, int size) {
    const fc_rows *a = args;
    int64_t i, end;
    share_rows(a->m, a->n, rank, size, &i, &end);
    for (; i < end; i++) {
        const float *x = a->x + i * a->n, *dy = a->dy + i * a->n;
        double sums[3];
        dots(x, dy, a->n, sums);
        const double inverse = sums[0] == 0 ? 0 : 1 / sqrt(sums[0]);
        combine(dy, inverse, x, -(sums[1] * inverse) * inverse * inverse, a->n, a->out + i * a->n);
    }
}

void fc_text_cosine(const void *args, int rank, int size) {
    const fc_loss *a = args;
    int64_t chunk, end;
    share_rows(a->chunks, FC_LOSS_ROWS * a->n, rank, size, &chunk, &end);
    for (; chunk < end; chunk++) {
        const int64_t last = clamp((chunk + 1) * FC_LOSS_ROWS, 0, a->m);
        double sum = 0, sums[3];
        for (int64_t i = chunk * FC_LOSS_ROWS; i < last; i++) {
            dots(a->x + i * a->n, a->target + i * a->n, a->n, sums);
            sum += sums[0] == 0 || sums[2] == 0 ? 1 : 1 - sums[1] / (sqrt(sums[0]) * sqrt(sums[2]));
        }
        a->partials[chunk] = sum;
    }
}

void fc_text_cosine_grad(const void *args, int rank, int size) {
    const fc_loss *a = args;
    const double gain = -(double)*a->dloss / (double)a->count;
    int64_t i, end;
    share_rows(a->m, a->n, rank, size, &i, &end);
    for (; i < end; i++) {
        const float *x = a->x + i * a->n, *target = a->target + i * a->n;
        double sums[3];
        dots(x, target, a->n, sums);
        const int none = sums[0] == 0 || sums[2] == 0;
        const double along = none ? 0 : gain / (sqrt(sums[0]) * sqrt(sums[2]));
        combine(target, along, x, none ? 0 : -along * (sums[1] / sums[0]), a->n, a->out + i * a->n);
    }
}
