/* Convolution: for each panel of output pixels and each slab of the depth [tap][channel], pack the slab's pixels, then multiply
 * every tile of filters with it. The slab (256 x 32 floats) is the only scratch. Threads share (panel, tile) pairs.
 *
 * Depthwise convolution and pooling: for each plane and band of output rows, stage the rows that the band's windows meet, padded
 * and split by the horizontal stride, so that every tap of a row is one pointer and no leaf knows of borders.
 */
#include <math.h>
#include <string.h>

#include "../fastcore.h"
#include "../parallel.h"

enum {
    MOST_RUNS = 64,     /* the widest panel, one pixel per run */
    BAND_FLOATS = 8192, /* staged rows of a band: 32 KiB, as far as one output row allows */
    ALIGNMENT = 64,
};

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t pieces(int64_t total, int64_t most) { return (total + most - 1) / most; }
static int64_t line(int64_t floats) { return (floats + 15) / 16 * 16; }

/* This rank's part of the scratch, or NULL; sets how many ranks have one. */
static float *carve(void *scratch, int64_t have, int64_t need, int rank, int size, int *team) {
    *team = (int)smaller(size, have / need);
    if (rank >= *team) return NULL;
    const uintptr_t address = (uintptr_t)scratch + (uintptr_t)(need * rank);
    return (float *)((address + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
}

/* ---- convolution ---- */

static int64_t taps_of(const fc_window *w) { return w->kernel_height * w->kernel_width; }

/* The even depth of the fewest slabs of at most gemm_depth. */
static int64_t slab_depth(int64_t depth) {
    return depth > fc_kernels.gemm_depth ? pieces(depth, pieces(depth, fc_kernels.gemm_depth)) : depth;
}

int64_t fc_convolution_scratch(const fc_window *window, int64_t channels, int64_t group) {
    const int64_t depth = channels / group * taps_of(window);
    return line(slab_depth(depth) * fc_kernels.gemm_cols) * (int64_t)sizeof(float) + ALIGNMENT;
}

static int64_t tile_count(int64_t filters) { return pieces(filters, fc_kernels.gemm_rows); }
static int64_t tile_row(int64_t filters, int64_t tile) { return filters * tile / tile_count(filters); }

void fc_pack_convolution(const void *args, int rank, int size) {
    const fc_pack_convolution_args *p = args;
    const int64_t filters = p->filters / p->group, tiles = tile_count(filters), channels = p->depth / p->taps;
    int64_t begin, end;
    fc_partition(p->group * tiles, 1, rank, size, &begin, &end);
    for (int64_t i = begin; i < end; i++) {
        const int64_t first = tile_row(filters, i % tiles), rows = tile_row(filters, i % tiles + 1) - first;
        const int64_t row = i / tiles * filters + first;
        const float *from = p->weight + row * p->depth;
        float *to = p->out + row * p->depth;
        for (int64_t tap = 0; tap < p->taps; tap++)
            for (int64_t c = 0; c < channels; c++)
                for (int64_t r = 0; r < rows; r++) *to++ = from[r * p->depth + c * p->taps + tap];
    }
}

/* The part of a panel that lies in one output row: lanes [at, at + count) are columns [col, col + count) of `row`. */
typedef struct segment {
    int64_t row, col, at, count;
} segment;

/* Cut pixels [pixel, pixel + cols) of the output at the ends of its rows; returns the number of segments. */
static int64_t cut_panel(const fc_window *w, int64_t pixel, int64_t cols, segment *segments) {
    int64_t found = 0, row = pixel / w->out_width, col = pixel % w->out_width;
    for (int64_t at = 0; at < cols; at += segments[found++].count, row++, col = 0)
        segments[found] = (segment){row, col, at, smaller(cols - at, w->out_width - col)};
    return found;
}

/* Where a panel reads at one tap; returns the number of runs. */
static int64_t find_runs(const fc_window *w, int64_t tap, const segment *segments, int64_t count, fc_run *runs) {
    const int64_t dy = tap / w->kernel_width * w->dilation_y - w->top, dx = tap % w->kernel_width * w->dilation_x - w->left;
    /* The columns whose element lies inside the image. */
    const int64_t first = dx < 0 ? pieces(-dx, w->stride_x) : 0;
    const int64_t last = dx < w->width ? pieces(w->width - dx, w->stride_x) : 0;
    int64_t found = 0;
    for (const segment *s = segments; s < segments + count; s++) {
        const int64_t y = s->row * w->stride_y + dy, from = larger(first, s->col), end = smaller(last, s->col + s->count);
        if (y >= 0 && y < w->height && from < end)
            runs[found++] = (fc_run){y * w->width + from * w->stride_x + dx, s->at + from - s->col, end - from};
    }
    return found;
}

/* A convolution of windows of one element that covers the image in order is a product with the planes themselves. */
static int is_pointwise(const fc_window *w) {
    return taps_of(w) == 1 && w->stride_y == 1 && w->stride_x == 1 && w->top == 0 && w->left == 0 && w->out_height == w->height &&
           w->out_width == w->width;
}

/* Pack depths [depth, depth + depths), counted [tap][channel], of a panel. */
static void pack_slab(const fc_window *w, const float *x, int64_t channels, int64_t depth, int64_t depths,
                      const segment *segments, int64_t count, float *out) {
    const int64_t plane = w->height * w->width, width = fc_kernels.gemm_cols;
    while (depths > 0) {
        const int64_t channel = depth % channels, some = smaller(depths, channels - channel);
        fc_run runs[MOST_RUNS];
        const int64_t found = find_runs(w, depth / channels, segments, count, runs);
        fc_kernels.pack_window_f32(x + channel * plane, plane, some, w->stride_x, runs, found, out, width);
        depth += some;
        depths -= some;
        out += some * width;
    }
}

static void finish_tile(const fc_convolution_args *a, float *c, int64_t filter, int64_t rows, int64_t cols) {
    const int64_t plane = a->window.out_height * a->window.out_width;
    if (a->bias || a->addend || a->low > -INFINITY || a->high < INFINITY)
        fc_kernels.bias_clip_f32(c, plane, rows, cols, a->bias ? a->bias + filter : NULL,
                                 a->addend ? a->addend + (c - a->out) : NULL, a->low, a->high);
    if (a->activation != FC_IDENTITY) fc_kernels.epilogue_f32(c, plane, rows, cols, NULL, a->activation, NULL, 0);
}

/* One panel of pixels of one image and group against filter tiles [tile, end). */
static void convolve_panel(const fc_convolution_args *a, int64_t image, int64_t g, int64_t pixel, int64_t tile, int64_t end,
                           float *slab) {
    const fc_window *w = &a->window;
    const int64_t channels = a->channels / a->group, filters = a->filters / a->group, depth = channels * taps_of(w);
    const int64_t plane = w->out_height * w->out_width, cols = smaller(fc_kernels.gemm_cols, plane - pixel);
    const float *x = a->x + (image * a->channels + g * channels) * w->height * w->width;
    const float *weight = a->weight + g * filters * depth;
    float *out = a->out + (image * a->filters + g * filters) * plane + pixel;
    const int64_t step = slab_depth(depth), width = fc_kernels.gemm_cols;
    segment segments[MOST_RUNS];
    const int64_t count = cut_panel(w, pixel, cols, segments);
    int64_t d = 0;
    do {
        const int64_t depths = smaller(step, depth - d);
        if (is_pointwise(w))
            fc_kernels.pack_columns_f32(x + d * plane + pixel, plane, cols, depths, slab, width);
        else
            pack_slab(w, x, channels, d, depths, segments, count, slab);
        for (int64_t t = tile; t < end; t++) {
            const int64_t first = tile_row(filters, t), rows = tile_row(filters, t + 1) - first;
            fc_kernels.gemm_f32(rows, cols, depths, weight + first * depth + d * rows, slab, width, 0, out + first * plane, plane,
                                d > 0);
            if (d + depths == depth) finish_tile(a, out + first * plane, g * filters + first, rows, cols);
        }
        d += depths;
    } while (d < depth);
}

void fc_convolution(const void *args, int rank, int size) {
    const fc_convolution_args *a = args;
    const fc_window *w = &a->window;
    const int64_t plane = w->out_height * w->out_width, panels = pieces(plane, fc_kernels.gemm_cols);
    const int64_t tiles = tile_count(a->filters / a->group);
    int team;
    float *slab = carve(a->scratch, a->scratch_bytes, fc_convolution_scratch(w, a->channels, a->group), rank, size, &team);
    if (!slab) return;
    int64_t item, end;
    fc_partition(a->images * a->group * panels * tiles, 1, rank, team, &item, &end);
    while (item < end) {
        const int64_t tile = item % tiles, last = smaller(tiles, tile + end - item), panel = item / tiles;
        convolve_panel(a, panel / panels / a->group, panel / panels % a->group, panel % panels * fc_kernels.gemm_cols, tile, last,
                       slab);
        item += last - tile;
    }
}

/* ---- bands of staged rows ---- */

static int64_t reach(int64_t kernel, int64_t dilation) { return (kernel - 1) * dilation + 1; }
/* Elements of one row at one phase of the horizontal stride. */
static int64_t phase_pitch(const fc_window *w) {
    return line(w->out_width + reach(w->kernel_width, w->dilation_x) / w->stride_x + 1);
}
static int64_t row_pitch(const fc_window *w) { return phase_pitch(w) * w->stride_x; }
static int64_t staged_rows(const fc_window *w, int64_t rows) {
    return (rows - 1) * w->stride_y + reach(w->kernel_height, w->dilation_y);
}
/* Output rows of a band. */
static int64_t band_rows(const fc_window *w) {
    const int64_t most = BAND_FLOATS / row_pitch(w), over = most - reach(w->kernel_height, w->dilation_y);
    return larger(1, smaller(w->out_height, over / w->stride_y + 1));
}

typedef struct staging {
    float *rows;
    float *ones, *columns; /* averages only: a factor per tap, a count per column */
    const float **taps;
} staging;

int64_t fc_staging_scratch(const fc_window *w) {
    const int64_t rows = staged_rows(w, band_rows(w)) * row_pitch(w);
    return (rows + line(taps_of(w)) + line(w->out_width)) * (int64_t)sizeof(float) + taps_of(w) * (int64_t)sizeof(float *) +
           ALIGNMENT;
}

static staging lay_out(const fc_window *w, float *scratch) {
    staging s = {.rows = scratch};
    s.ones = s.rows + staged_rows(w, band_rows(w)) * row_pitch(w);
    s.columns = s.ones + line(taps_of(w));
    s.taps = (const float **)(s.columns + line(w->out_width));
    return s;
}

/* One row of the image, or of padding where `in` is NULL: out[phase][i] = element i * stride + phase of the padded row. */
static void stage_row(const fc_window *w, const float *in, float fill, float *out) {
    const int64_t pitch = phase_pitch(w), stride = w->stride_x;
    for (int64_t phase = 0; phase < stride; phase++, out += pitch) {
        const int64_t before = w->left - phase; /* the image begins at element i with i * stride >= before */
        const int64_t first = smaller(pitch, before > 0 ? pieces(before, stride) : 0);
        const int64_t rest = w->width + before, last = in && rest > 0 ? smaller(pitch, pieces(rest, stride)) : first;
        for (int64_t i = 0; i < first; i++) out[i] = fill;
        if (stride == 1)
            memcpy(out + first, in ? in + first - before : out + first, (size_t)larger(0, last - first) * sizeof(float));
        else if (stride == 2) /* said apart, for the compiler makes shuffles of it */
            for (int64_t i = first; i < last; i++) out[i] = in[i * 2 - before];
        else
            for (int64_t i = first; i < last; i++) out[i] = in[i * stride - before];
        for (int64_t i = larger(first, last); i < pitch; i++) out[i] = fill;
    }
}

static void stage(const fc_window *w, const float *plane, int64_t row, int64_t rows, float fill, const staging *s) {
    const int64_t first = row * w->stride_y - w->top, count = staged_rows(w, rows);
    for (int64_t i = 0; i < count; i++) {
        const int64_t y = first + i;
        stage_row(w, y >= 0 && y < w->height ? plane + y * w->width : NULL, fill, s->rows + i * row_pitch(w));
    }
}

/* Point at every tap of the band's first output row. */
static void aim(const fc_window *w, const staging *s) {
    for (int64_t ky = 0; ky < w->kernel_height; ky++)
        for (int64_t kx = 0; kx < w->kernel_width; kx++) {
            const int64_t dx = kx * w->dilation_x;
            s->taps[ky * w->kernel_width + kx] =
                s->rows + ky * w->dilation_y * row_pitch(w) + dx % w->stride_x * phase_pitch(w) + dx / w->stride_x;
        }
}

static fc_rows_walk walk_of(const fc_window *w, int64_t rows) {
    return (fc_rows_walk){rows, w->stride_y * row_pitch(w), w->out_width, w->out_width};
}

void fc_depthwise(const void *args, int rank, int size) {
    const fc_convolution_args *a = args;
    const fc_window *w = &a->window;
    const int64_t bands = pieces(w->out_height, band_rows(w)), each = a->filters / larger(1, a->channels), taps = taps_of(w);
    int team;
    float *scratch = carve(a->scratch, a->scratch_bytes, fc_staging_scratch(w), rank, size, &team);
    if (!scratch || each == 0) return;
    const staging s = lay_out(w, scratch);
    aim(w, &s);
    int64_t item, end;
    fc_partition(a->images * a->channels * bands, 1, rank, team, &item, &end);
    for (; item < end; item++) {
        const int64_t plane = item / bands, row = item % bands * band_rows(w), rows = smaller(band_rows(w), w->out_height - row);
        stage(w, a->x + plane * w->height * w->width, row, rows, 0.0f, &s);
        for (int64_t f = plane * each; f < (plane + 1) * each; f++) {
            const int64_t filter = f % a->filters;
            float *out = a->out + (f * w->out_height + row) * w->out_width;
            fc_kernels.tap_sum_f32(s.taps, a->weight + filter * taps, taps, a->bias ? a->bias[filter] : 0.0f, out,
                                   walk_of(w, rows));
            const int64_t n = rows * w->out_width;
            if (a->addend || a->low > -INFINITY || a->high < INFINITY)
                fc_kernels.bias_clip_f32(out, n, 1, n, NULL, a->addend ? a->addend + (out - a->out) : NULL, a->low, a->high);
            if (a->activation != FC_IDENTITY) fc_kernels.epilogue_f32(out, n, 1, n, NULL, a->activation, NULL, 0);
        }
    }
}

/* ---- pooling ---- */

/* How many of a window's taps lie in [begin, end). */
static int64_t taps_inside(int64_t at, int64_t kernel, int64_t dilation, int64_t begin, int64_t end) {
    int64_t count = 0;
    for (int64_t k = 0; k < kernel; k++) count += at + k * dilation >= begin && at + k * dilation < end;
    return count;
}

/* Divide an output row by the number of elements of its windows that count. */
static void average_row(const fc_window_pool_args *p, int64_t row, const float *columns, float *out) {
    const fc_window *w = &p->window;
    const int64_t begin = p->include_pad ? -w->top : 0, end = w->height + (p->include_pad ? p->bottom : 0);
    const float rows = (float)taps_inside(row * w->stride_y - w->top, w->kernel_height, w->dilation_y, begin, end);
    for (int64_t j = 0; j < w->out_width; j++) {
        const float count = rows * columns[j];
        out[j] /= count > 1.0f ? count : 1.0f;
    }
}

void fc_window_pool(const void *args, int rank, int size) {
    const fc_window_pool_args *p = args;
    const fc_window *w = &p->window;
    const int64_t bands = pieces(w->out_height, band_rows(w)), taps = taps_of(w);
    int team;
    float *scratch = carve(p->scratch, p->scratch_bytes, fc_staging_scratch(w), rank, size, &team);
    if (!scratch) return;
    const staging s = lay_out(w, scratch);
    aim(w, &s);
    if (p->average) {
        const int64_t begin = p->include_pad ? -w->left : 0, last = w->width + (p->include_pad ? p->right : 0);
        for (int64_t t = 0; t < taps; t++) s.ones[t] = 1.0f;
        for (int64_t j = 0; j < w->out_width; j++)
            s.columns[j] = (float)taps_inside(j * w->stride_x - w->left, w->kernel_width, w->dilation_x, begin, last);
    }
    int64_t item, end;
    fc_partition(p->planes * bands, 1, rank, team, &item, &end);
    for (; item < end; item++) {
        const int64_t plane = item / bands, row = item % bands * band_rows(w), rows = smaller(band_rows(w), w->out_height - row);
        stage(w, p->x + plane * w->height * w->width, row, rows, p->average ? 0.0f : -INFINITY, &s);
        float *out = p->out + (plane * w->out_height + row) * w->out_width;
        if (!p->average) {
            fc_kernels.tap_max_f32(s.taps, taps, out, walk_of(w, rows));
            continue;
        }
        fc_kernels.tap_sum_f32(s.taps, s.ones, taps, 0.0f, out, walk_of(w, rows));
        for (int64_t i = 0; i < rows; i++) average_row(p, row + i, s.columns, out + i * w->out_width);
    }
}

/* ---- whole planes ---- */

void fc_plane_means(const void *args, int rank, int size) {
    const fc_planes_args *p = args;
    int64_t begin, end;
    fc_partition(p->planes, 16, rank, size, &begin, &end);
    for (int64_t i = begin; i < end; i++) p->out[i] = fc_kernels.sum_f32(p->x + i * p->n, p->n) / (float)p->n;
}

void fc_scale_channels(const void *args, int rank, int size) {
    const fc_planes_args *p = args;
    int64_t begin, end;
    fc_partition(p->planes, 1, rank, size, &begin, &end);
    for (int64_t i = begin; i < end; i++) {
        const float *plane = p->x + i * p->n;
        const int64_t c = i % p->channels;
        fc_kernels.tap_sum_f32(&plane, p->factor + c, 1, p->offset[c], p->out + i * p->n, (fc_rows_walk){1, p->n, p->n, p->n});
    }
}
