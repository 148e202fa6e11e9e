/* Steps of the nn family: who does which rows, columns or elements. No result depends on the number of threads: rows and
 * elements are independent, column sums are split by columns, and losses are summed over fixed chunks.
 */
#include <math.h>

#include "../fastcore.h"
#include "../parallel.h"

enum {
    SMALLEST_SHARE = 4096, /* elements that one thread alone does faster than two with a barrier */
    LINE = 16,             /* floats of a cache line: no two threads write one */
};

/* This rank's elements, in whole cache lines; `cost` is 1 for what memory bounds, more for what computes. */
static void share_elements(int64_t n, int cost, int rank, int size, int64_t *begin, int64_t *end) {
    fc_partition(n, SMALLEST_SHARE / cost, rank, size, begin, end);
}

static void share_rows(int64_t m, int64_t n, int cost, int rank, int size, int64_t *begin, int64_t *end) {
    const int64_t rows = SMALLEST_SHARE / cost / (n > 0 ? n : 1);
    fc_partition(m, rows > 0 ? rows : 1, rank, size, begin, end);
}

static void share_columns(int64_t m, int64_t n, int rank, int size, int64_t *begin, int64_t *end) {
    const int64_t lines = SMALLEST_SHARE / LINE / (m > 0 ? m : 1);
    fc_partition(n, LINE * (lines > 0 ? lines : 1), rank, size, begin, end);
}

/* ---- elementwise ---- */

enum { CHEAP = 1, COSTLY = 4 };

static int cost_of(fc_activation kind) { return kind == FC_IDENTITY || kind == FC_RELU ? CHEAP : COSTLY; }

void fc_nn_activate(const void *args, int rank, int size) {
    const fc_elementwise *e = args;
    int64_t i, end;
    share_elements(e->n, cost_of(e->kind), rank, size, &i, &end);
    fc_kernels.activate_f32(e->kind, e->a + i, end - i, e->out + i);
}

void fc_nn_activate_grad(const void *args, int rank, int size) {
    const fc_elementwise *e = args;
    int64_t i, end;
    share_elements(e->n, cost_of(e->kind), rank, size, &i, &end);
    fc_kernels.activate_grad_f32(e->kind, e->a + i, e->b + i, end - i, e->out + i);
}

static void combine(const fc_elementwise *e, fc_add_f32_fn *kernel, int rank, int size) {
    int64_t i, end;
    share_elements(e->n, CHEAP, rank, size, &i, &end);
    while (i < end) {
        const int64_t at = i % e->period, left = e->period - at, n = end - i < left ? end - i : left;
        kernel(e->a + i, e->b + at, n, e->out + i);
        i += n;
    }
}

void fc_nn_add(const void *args, int rank, int size) { combine(args, fc_kernels.add_f32, rank, size); }

void fc_nn_multiply(const void *args, int rank, int size) { combine(args, fc_kernels.multiply_f32, rank, size); }

void fc_nn_scale(const void *args, int rank, int size) {
    const fc_elementwise *e = args;
    int64_t i, end;
    share_elements(e->n, CHEAP, rank, size, &i, &end);
    fc_kernels.scale_f32(e->a + i, e->factor, end - i, e->out + i);
}

/* ---- rows ---- */

void fc_nn_column_sum(const void *args, int rank, int size) {
    const fc_rows *a = args;
    int64_t j, end;
    share_columns(a->m, a->n, rank, size, &j, &end);
    if (j < end) fc_kernels.column_sum_f32(a->x + j, a->m, end - j, a->n, a->out + j);
}

void fc_nn_layer_norm(const void *args, int rank, int size) {
    const fc_rows *a = args;
    int64_t i, end;
    share_rows(a->m, a->n, CHEAP, rank, size, &i, &end);
    fc_kernels.layer_norm_f32(a->x + i * a->n, end - i, a->n, a->gamma, a->beta, a->epsilon, a->out + i * a->n);
}

void fc_nn_layer_norm_lanes(const void *args, int rank, int size) {
    const fc_rows *a = args;
    int64_t i, end;
    fc_partition(a->m, LINE, rank, size, &i, &end);
    fc_kernels.layer_norm_lanes_f32(a->x + i, a->m, end - i, a->n, a->gamma, a->beta, a->epsilon, a->out + i);
}

void fc_nn_layer_norm_grad(const void *args, int rank, int size) {
    const fc_rows *a = args;
    int64_t i, end;
    share_rows(a->m, a->n, CHEAP, rank, size, &i, &end);
    float *stats = a->stats ? a->stats + 2 * i : NULL;
    const int64_t at = i * a->n;
    fc_kernels.layer_norm_grad_f32(a->dy + at, a->x + at, end - i, a->n, a->gamma, a->epsilon, a->out + at, stats);
}

void fc_nn_layer_norm_grad_columns(const void *args, int rank, int size) {
    const fc_rows *a = args;
    int64_t j, end;
    share_columns(a->m, a->n, rank, size, &j, &end);
    if (j == end) return;
    if (a->dgamma) fc_kernels.layer_norm_gamma_f32(a->dy + j, a->x + j, a->stats, a->m, end - j, a->n, a->dgamma + j);
    if (a->dbeta) fc_kernels.column_sum_f32(a->dy + j, a->m, end - j, a->n, a->dbeta + j);
}

void fc_nn_softmax(const void *args, int rank, int size) {
    const fc_rows *a = args;
    int64_t i, end;
    share_rows(a->m, a->n, COSTLY, rank, size, &i, &end);
    fc_kernels.softmax_f32(a->x + i * a->n, end - i, a->n, 1.0f, 1.0f, a->out + i * a->n);
}

void fc_nn_softmax_grad(const void *args, int rank, int size) {
    const fc_rows *a = args;
    int64_t i, end;
    share_rows(a->m, a->n, CHEAP, rank, size, &i, &end);
    fc_kernels.softmax_grad_f32(a->dy + i * a->n, a->x + i * a->n, end - i, a->n, a->out + i * a->n);
}

/* A block's lines on both sides fit the first two cache levels until they are whole. Its rows lie pages apart, where no hardware
 * prefetcher follows, so each strip of 16 columns also asks for its share of the block below. */
enum { BLOCK_ROWS = 64, BLOCK_COLUMNS = 128, STRIP = LINE, CACHED = 1 << 18 };

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* Ask for a strip's share of the block whose rows begin at i: 8 of its rows to read, the strip's own 16 rows of out to write. */
static void fetch_strip(const fc_rows *a, int64_t i, int64_t row_end, int64_t j, int64_t strip, int64_t column_end) {
    const int64_t share = BLOCK_ROWS * STRIP / BLOCK_COLUMNS, first = i + (strip - j) / STRIP * share;
    for (int64_t r = first; r < smaller(first + share, row_end); r++)
        for (int64_t c = j; c < smaller(j + BLOCK_COLUMNS, column_end); c += LINE) __builtin_prefetch(a->x + r * a->n + c, 0, 2);
    for (int64_t c = strip; c < smaller(strip + STRIP, column_end); c++)
        for (int64_t r = i; r < smaller(i + BLOCK_ROWS, row_end); r += LINE) __builtin_prefetch(a->out + c * a->m + r, 1, 2);
}

void fc_nn_transpose(const void *args, int rank, int size) {
    const fc_rows *a = args;
    int64_t row = 0, row_end = a->m, column = 0, column_end = a->n;
    const int fetch = a->m > CACHED / smaller(a->n > 0 ? a->n : 1, CACHED);
    if (a->n >= a->m)
        fc_partition(a->n, BLOCK_ROWS, rank, size, &column, &column_end);
    else
        fc_partition(a->m, BLOCK_ROWS, rank, size, &row, &row_end);
    for (int64_t j = column; j < column_end; j += BLOCK_COLUMNS)
        for (int64_t i = row; i < row_end; i += BLOCK_ROWS) {
            const int64_t high = smaller(BLOCK_ROWS, row_end - i), end = smaller(j + BLOCK_COLUMNS, column_end);
            for (int64_t c = j; c < end; c += STRIP) {
                if (fetch) fetch_strip(a, i + BLOCK_ROWS, row_end, j, c, column_end);
                const float *from = a->x + i * a->n + c;
                fc_kernels.transpose_f32(from, a->n, high, smaller(STRIP, end - c), a->out + c * a->m + i, a->m);
            }
        }
}

/* ---- losses ---- */

static int is_class(int64_t label, int64_t classes) { return 0 <= label && label < classes; }

/* This rank's chunks and the rows in them. */
static void share_chunks(const fc_loss *a, int64_t *chunk, int64_t *end, int rank, int size) {
    share_rows(a->chunks, FC_LOSS_ROWS * a->n, COSTLY, rank, size, chunk, end);
}

static int64_t last_row(const fc_loss *a, int64_t chunk) {
    const int64_t last = (chunk + 1) * FC_LOSS_ROWS;
    return last < a->m ? last : a->m;
}

static double cross_entropy_of_row(const float *x, int64_t n, int64_t label) {
    float maximum;
    if (!is_class(label, n)) return NAN;
    const double sum = fc_kernels.exp_sum_f32(x, n, &maximum);
    return log(sum) + ((double)maximum - (double)x[label]);
}

void fc_nn_cross_entropy(const void *args, int rank, int size) {
    const fc_loss *a = args;
    int64_t chunk, end;
    share_chunks(a, &chunk, &end, rank, size);
    for (; chunk < end; chunk++) {
        double sum = 0;
        for (int64_t i = chunk * FC_LOSS_ROWS; i < last_row(a, chunk); i++)
            sum += cross_entropy_of_row(a->x + i * a->n, a->n, a->labels[i]);
        a->partials[chunk] = sum;
    }
}

static void fill_nan(float *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] = NAN;
}

static void cross_entropy_grad_of_row(const float *x, int64_t n, int64_t label, float gain, float *dx) {
    if (!is_class(label, n)) {
        fill_nan(dx, n);
        return;
    }
    fc_kernels.softmax_f32(x, 1, n, 1.0f, gain, dx);
    dx[label] -= gain;
}

void fc_nn_cross_entropy_grad(const void *args, int rank, int size) {
    const fc_loss *a = args;
    const float gain = (float)((double)*a->dloss / (double)a->count);
    int64_t i, end;
    share_rows(a->m, a->n, COSTLY, rank, size, &i, &end);
    for (; i < end; i++) cross_entropy_grad_of_row(a->x + i * a->n, a->n, a->labels[i], gain, a->out + i * a->n);
}

void fc_nn_squared_error(const void *args, int rank, int size) {
    const fc_loss *a = args;
    int64_t chunk, end;
    fc_partition(a->chunks, 1, rank, size, &chunk, &end);
    for (; chunk < end; chunk++) {
        const int64_t i = chunk * FC_LOSS_ITEMS, left = a->n - i;
        a->partials[chunk] = fc_kernels.squared_error_f32(a->x + i, a->target + i, left < FC_LOSS_ITEMS ? left : FC_LOSS_ITEMS);
    }
}

void fc_nn_squared_error_grad(const void *args, int rank, int size) {
    const fc_loss *a = args;
    const float factor = (float)(2.0 * (double)*a->dloss / (double)a->count);
    int64_t i, end;
    share_elements(a->n, CHEAP, rank, size, &i, &end);
    fc_kernels.scaled_difference_f32(a->x + i, a->target + i, factor, end - i, a->out + i);
}

static double distillation_of_row(const fc_loss *a, int64_t i) {
    const float *x = a->x + i * a->n, *teacher = a->target + i * a->n;
    double loss = 0;
    if (a->alpha != 0) {
        float sums[3];
        fc_kernels.distillation_f32(x, teacher, a->n, (float)(1 / a->temperature), sums);
        const double divergence = (double)sums[2] / (double)sums[1] + log((double)sums[0]) - log((double)sums[1]);
        loss += a->alpha * a->temperature * a->temperature * divergence;
    }
    if (a->alpha != 1) loss += (1 - a->alpha) * cross_entropy_of_row(x, a->n, a->labels[i]);
    return loss;
}

void fc_nn_distillation(const void *args, int rank, int size) {
    const fc_loss *a = args;
    int64_t chunk, end;
    share_chunks(a, &chunk, &end, rank, size);
    for (; chunk < end; chunk++) {
        double sum = 0;
        for (int64_t i = chunk * FC_LOSS_ROWS; i < last_row(a, chunk); i++) sum += distillation_of_row(a, i);
        a->partials[chunk] = sum;
    }
}

void fc_nn_distillation_grad(const void *args, int rank, int size) {
    const fc_loss *a = args;
    const double gain = (double)*a->dloss / (double)a->count;
    const float soft = (float)(gain * a->alpha * a->temperature), hard = (float)(gain * (1 - a->alpha));
    int64_t i, end;
    share_rows(a->m, a->n, COSTLY, rank, size, &i, &end);
    for (; i < end; i++) {
        const float *x = a->x + i * a->n, *teacher = a->target + i * a->n;
        float *dx = a->out + i * a->n;
        if (a->alpha == 0) {
            cross_entropy_grad_of_row(x, a->n, a->labels[i], hard, dx);
        } else if (a->alpha != 1 && !is_class(a->labels[i], a->n)) {
            fill_nan(dx, a->n);
        } else {
            fc_kernels.distillation_grad_f32(x, teacher, a->n, (float)(1 / a->temperature), soft, hard, dx);
            if (a->alpha != 1) dx[a->labels[i]] -= hard;
        }
    }
}

void fc_nn_loss_mean(const void *args, int rank, int size) {
    const fc_loss *a = args;
    (void)size;
    if (rank != 0) return;
    double sum = 0;
    for (int64_t i = 0; i < a->chunks; i++) sum += a->partials[i];
    *a->out = (float)(sum / (double)a->count);
}
