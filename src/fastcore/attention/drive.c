/* From sequences to heads to blocks of query rows.
 *
 * Units of work are FC_ATTENTION_ROWS query rows of one head, shared among the threads by their cost (the keys they read), so
 * that one short text and a batch of uneven ones both split evenly. A thread that has rows of a head packs that head's keys.
 * The gradients of keys and values are sums over the query rows: there a unit is a whole head.
 */
#include <string.h>

#include "../fastcore.h"
#include "../parallel.h"

enum {
    BLOCK_FLOATS = 4096, /* scores of a block of rows, if a tile has no more: half of L1 */
    GRAD_ROWS = 48,      /* rows of a block of the gradient: deep enough that its sums stay in registers for a while */
    PACKING = 16,        /* cost of packing a head's keys and starting a unit, in keys */
    ALIGNMENT = 64,
};

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

/* An odd number of cache lines, so that the rows of a tile do not share a set. */
static int64_t score_stride(int64_t keys) { return (round_up(keys, 16) / 16 | 1) * 16; }
static int64_t block_rows(int64_t keys) {
    return larger(1, BLOCK_FLOATS / score_stride(keys) / FC_ATTENTION_ROWS) * FC_ATTENTION_ROWS;
}

/* ---- scratch: one float array per thread, cut in pieces of whole cache lines ---- */

typedef struct workspace {
    float *k, *v, *scores, *inverse, *k_panels, *v_panels, *q_block, *dscores, *dk, *dv; /* the last three: gradients only, ... */
} workspace;                                                                             /* ... q_block: bf16 only */

typedef struct layout {
    int64_t gathered, panels, scores, inverse, q_block, bytes;
} layout;

static layout plan_scratch(int64_t keys, int64_t width, int grad) {
    /* Room for any sequence of at most `keys` keys: the fewer, the more rows in a block. */
    const int64_t tallest = grad ? GRAD_ROWS : BLOCK_FLOATS / 16, wide = score_stride(keys);
    layout l = {.gathered = round_up(keys * width, 16),
                .panels = larger(round_up(keys, FC_ATTENTION_PANEL) * width, /* of keys; of values in bf16: */
                                 round_up(width, FC_ATTENTION_PANEL) * ((keys + 1) / 2)),
                .scores = grad ? GRAD_ROWS * wide : larger(BLOCK_FLOATS, FC_ATTENTION_ROWS * wide),
                .inverse = tallest,
                .q_block = grad ? 0 : round_up(tallest * ((width + 1) / 2), 16)};
    const int64_t floats = (grad ? 4 : 2) * l.gathered + 2 * l.panels + (grad ? 2 : 1) * l.scores + l.inverse + l.q_block;
    l.bytes = floats * (int64_t)sizeof(float) + ALIGNMENT;
    return l;
}

int64_t fc_attention_scratch(int64_t keys, int64_t width, int threads) { return plan_scratch(keys, width, 0).bytes * threads; }
int64_t fc_attention_grad_scratch(int64_t keys, int64_t width, int threads) {
    return plan_scratch(keys, width, 1).bytes * threads;
}

/* This rank's part of the scratch; returns how many ranks have one, at most `size`. */
static int carve(const fc_attention_args *a, int grad, int rank, int size, workspace *ws) {
    const layout l = plan_scratch(a->offsets ? a->queries : a->keys, a->width, grad);
    const int team = (int)smaller(size, a->scratch_bytes / l.bytes);
    if (rank >= team) return team;
    const uintptr_t address = (uintptr_t)a->scratch + (uintptr_t)(l.bytes * rank);
    ws->k = (float *)((address + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    ws->v = ws->k + l.gathered;
    ws->scores = ws->v + l.gathered;
    ws->inverse = ws->scores + l.scores;
    ws->k_panels = ws->inverse + l.inverse;
    ws->v_panels = ws->k_panels + l.panels;
    ws->q_block = ws->v_panels + l.panels;
    ws->dscores = ws->q_block + l.q_block;
    ws->dk = ws->dscores + l.scores;
    ws->dv = ws->dk + l.gathered;
    return team;
}

/* ---- sequences ---- */

typedef struct sequence {
    int64_t row, rows;   /* of q */
    int64_t key, keys;   /* of k and v */
    int64_t attended;    /* how many keys count; all where the mask names none, which then weigh the same */
    float scale;         /* 0 then */
    const int64_t *mask; /* unless the attended keys come first, which needs no look at the mask */
    const uint8_t *mask_bool;
} sequence;

static int is_attended(const sequence *s, int64_t key) { return s->mask ? s->mask[key] != 0 : s->mask_bool[key] != 0; }

/* Count the attended keys, and forget a mask that only cuts off the end. */
static void read_mask(const fc_attention_args *a, int64_t index, sequence *s) {
    int64_t last = 0;
    s->mask = a->mask ? a->mask + index * a->keys : NULL;
    s->mask_bool = a->mask_bool ? a->mask_bool + index * a->keys : NULL;
    if (!s->mask && !s->mask_bool) return;
    s->attended = 0;
    for (int64_t key = 0; key < s->keys; key++)
        if (is_attended(s, key)) {
            s->attended++;
            last = key + 1;
        }
    if (s->attended == 0) {
        s->attended = s->keys;
        s->scale = 0.0f;
        last = s->keys;
    }
    if (s->attended == last) s->mask = NULL, s->mask_bool = NULL;
}

/* The sequence at `index`, after the one before (for offsets; zeros at first). */
static sequence next_sequence(const fc_attention_args *a, int64_t index, const sequence *before) {
    if (!a->offsets) {
        sequence s = {index * a->queries, a->queries, index * a->keys, a->keys, a->keys, a->scale, NULL, NULL};
        read_mask(a, index, &s);
        return s;
    }
    int64_t begin = index ? before->row + before->rows : smaller(larger(a->offsets[0], 0), a->queries);
    const int64_t end = smaller(larger(a->offsets[index + 1], begin), a->queries), rows = end - begin;
    return (sequence){begin, rows, begin, rows, rows, a->scale, NULL, NULL};
}

/* A head of a sequence: where it lies. */
typedef struct head {
    int64_t rows, keys, width, stride; /* keys that count; stride of q, and of out */
    const float *q, *k, *v;
    int64_t key_stride; /* of k and v */
    float factor;       /* of the scores, in units of log 2 */
} head;

static float *row_of(const fc_attention_args *a, const float *x, int64_t row, int64_t index) {
    return (float *)x + (row * a->heads + index) * a->width;
}

static void gather(const sequence *s, const float *x, int64_t stride, int64_t width, float *out) {
    for (int64_t key = 0; key < s->keys; key++)
        if (is_attended(s, key)) {
            memcpy(out, x + key * stride, (size_t)width * sizeof *out);
            out += width;
        }
}

static head open_head(const fc_attention_args *a, const sequence *s, int64_t index, const workspace *ws) {
    const float log2_e = 0x1.715476p+0f;
    head h = {.rows = s->rows,
              .keys = s->attended,
              .width = a->width,
              .stride = a->heads * a->width,
              .q = row_of(a, a->q, s->row, index),
              .k = row_of(a, a->k, s->key, index),
              .v = row_of(a, a->v, s->key, index),
              .key_stride = a->heads * a->width,
              .factor = s->scale * log2_e};
    if (s->mask || s->mask_bool) {
        gather(s, h.k, h.stride, h.width, ws->k);
        gather(s, h.v, h.stride, h.width, ws->v);
        h.k = ws->k, h.v = ws->v, h.key_stride = h.width;
    }
    return h;
}

static void fill_rows(float *x, int64_t stride, int64_t rows, int64_t width) {
    for (int64_t i = 0; i < rows; i++) memset(x + i * stride, 0, (size_t)width * sizeof *x);
}

/* scores[rows, keys] = the rows from `row` on of x times panels of keys (or of values) */
static void score(const head *h, const float *x, int64_t rows, const float *panels, float *scores) {
    const fc_attention_product p = {.rows = rows,
                                    .cols = h->keys,
                                    .depth = h->width,
                                    .a = x,
                                    .a_row = h->stride,
                                    .a_step = 1,
                                    .b = panels,
                                    .b_step = FC_ATTENTION_PANEL,
                                    .b_panel = FC_ATTENTION_PANEL * h->width,
                                    .c = scores,
                                    .c_stride = score_stride(h->keys)};
    fc_kernels.attention_product_f32(&p);
}

/* out[rows, width] = gain * weights[rows, keys] times the rows of x */
static void mix(const head *h, const float *weights, int64_t rows, const float *x, float *out, const float *gain) {
    const fc_attention_product p = {.rows = rows,
                                    .cols = h->width,
                                    .depth = h->keys,
                                    .a = weights,
                                    .a_row = score_stride(h->keys),
                                    .a_step = 1,
                                    .b = x,
                                    .b_step = h->key_stride,
                                    .b_panel = FC_ATTENTION_PANEL,
                                    .c = out,
                                    .c_stride = h->stride,
                                    .gain = gain};
    fc_kernels.attention_product_f32(&p);
}

/* ---- forward ---- */

/* Rows [row, end) of a head in float32. */
static void attend_f32(const head *h, int64_t row, int64_t end, float *out, const workspace *ws) {
    const int64_t step = block_rows(h->keys);
    fc_kernels.attention_panels_f32(h->k, h->key_stride, h->keys, h->width, ws->k_panels);
    for (; row < end; row += step) {
        const int64_t rows = smaller(step, end - row);
        score(h, h->q + row * h->stride, rows, ws->k_panels, ws->scores);
        fc_kernels.attention_softmax_f32(ws->scores, score_stride(h->keys), rows, h->keys, h->factor, ws->inverse);
        mix(h, ws->scores, rows, h->v, out + row * h->stride, ws->inverse);
    }
}

/* The same in bf16: both products from packed pairs. */
static void attend_bf16(const head *h, int64_t row, int64_t end, float *out, const workspace *ws) {
    const int64_t step = block_rows(h->keys), wide = score_stride(h->keys);
    const int64_t width_pairs = (h->width + 1) / 2, key_pairs = (h->keys + 1) / 2;
    uint32_t *q = (uint32_t *)ws->q_block, *k = (uint32_t *)ws->k_panels, *v = (uint32_t *)ws->v_panels;
    fc_kernels.attention_panels_bf16(h->k, h->key_stride, h->keys, h->width, k);
    fc_kernels.attention_columns_bf16(h->v, h->key_stride, h->keys, h->width, v);
    for (; row < end; row += step) {
        const int64_t rows = smaller(step, end - row);
        const fc_attention_product16 scores = {
            rows, h->keys, width_pairs, q, width_pairs, k, FC_ATTENTION_PANEL * width_pairs, ws->scores, wide, NULL};
        const fc_attention_product16 mixed = {rows,
                                              h->width,
                                              key_pairs,
                                              (const uint32_t *)ws->scores,
                                              wide,
                                              v,
                                              FC_ATTENTION_PANEL * key_pairs,
                                              out + row * h->stride,
                                              h->stride,
                                              ws->inverse};
        fc_kernels.attention_round_bf16(h->q + row * h->stride, h->stride, rows, h->width, q);
        fc_kernels.attention_product_bf16(&scores);
        fc_kernels.attention_softmax_bf16(ws->scores, wide, rows, h->keys, h->factor, ws->inverse);
        fc_kernels.attention_product_bf16(&mixed);
    }
}

static void attend(const fc_attention_args *a, const sequence *s, int64_t index, int64_t row, int64_t end, const workspace *ws) {
    const head h = open_head(a, s, index, ws);
    float *out = row_of(a, a->out, s->row, index);
    if (h.keys == 0) {
        fill_rows(out + row * h.stride, h.stride, end - row, h.width);
        return;
    }
    if (a->is_bf16)
        attend_bf16(&h, row, end, out, ws);
    else
        attend_f32(&h, row, end, out, ws);
}

/* The units [*first, *last) of `count`, each of this cost, of which the first starts at `start`, that lie in [begin, end). */
static void units_within(int64_t start, int64_t cost, int64_t count, int64_t begin, int64_t end, int64_t *first, int64_t *last) {
    *first = smaller(count, larger(0, (begin - start + cost - 1) / cost));
    *last = smaller(count, larger(0, (end - start + cost - 1) / cost));
}

static int64_t units_of(const fc_attention_args *a, const sequence *s, int whole) {
    return a->heads * (whole ? s->rows > 0 : (s->rows + FC_ATTENTION_ROWS - 1) / FC_ATTENTION_ROWS);
}
static int64_t cost_of(const sequence *s, int whole) { return (s->attended + PACKING) * (whole ? larger(1, s->rows) : 1); }

typedef void visit_fn(const fc_attention_args *a, const sequence *s, int64_t first, int64_t last, const workspace *ws);

/* Visit this rank's share of every sequence's units: those that start within its part of the whole cost. */
static void share(const fc_attention_args *a, int whole, visit_fn *visit, int rank, int size, const workspace *ws) {
    sequence s = {0};
    int64_t total = 0, start = 0, first, last;
    for (int64_t i = 0; i < a->batch; i++) {
        s = next_sequence(a, i, &s);
        total += units_of(a, &s, whole) * cost_of(&s, whole);
    }
    const int64_t part = total / size + 1, begin = part * rank, end = begin + part;
    s = (sequence){0};
    for (int64_t i = 0; i < a->batch && start < end; i++) {
        s = next_sequence(a, i, &s);
        const int64_t count = units_of(a, &s, whole), cost = cost_of(&s, whole);
        units_within(start, cost, count, begin, end, &first, &last);
        if (first < last) visit(a, &s, first, last, ws);
        start += count * cost;
    }
}

static void visit_rows(const fc_attention_args *a, const sequence *s, int64_t unit, int64_t last, const workspace *ws) {
    const int64_t blocks = (s->rows + FC_ATTENTION_ROWS - 1) / FC_ATTENTION_ROWS;
    while (unit < last) {
        const int64_t index = unit / blocks, end = smaller(last, (index + 1) * blocks);
        const int64_t row = unit % blocks * FC_ATTENTION_ROWS, row_end = (end - index * blocks) * FC_ATTENTION_ROWS;
        attend(a, s, index, row, smaller(s->rows, row_end), ws);
        unit = end;
    }
}

/* Zeros in the rows that no segment has. */
static void clear_outside(const fc_attention_args *a, float *x, int rank, int size) {
    sequence s = {0};
    int64_t begin, end;
    const int64_t columns = a->heads * a->width;
    if (!a->offsets) return;
    for (int64_t i = 0; i < a->batch; i++) s = next_sequence(a, i, &s);
    const int64_t head_rows = a->batch ? smaller(larger(a->offsets[0], 0), a->queries) : 0, tail = s.row + s.rows;
    fc_partition(head_rows, 1, rank, size, &begin, &end);
    memset(x + begin * columns, 0, (size_t)((end - begin) * columns) * sizeof *x);
    fc_partition(a->queries - tail, 1, rank, size, &begin, &end);
    memset(x + (tail + begin) * columns, 0, (size_t)((end - begin) * columns) * sizeof *x);
}

void fc_attention(const void *args, int rank, int size) {
    const fc_attention_args *a = args;
    workspace ws;
    const int team = carve(a, 0, rank, size, &ws);
    if (rank >= team) return;
    clear_outside(a, a->out, rank, team);
    share(a, 0, visit_rows, rank, team, &ws);
}

/* ---- gradients ---- */

/* out[keys, width] (+)= weights[rows, keys]^T times the rows of x */
static void mix_back(const head *h, const float *weights, int64_t rows, const float *x, float *out, int64_t stride, int add) {
    const fc_attention_product p = {.rows = h->keys,
                                    .cols = h->width,
                                    .depth = rows,
                                    .a = weights,
                                    .a_row = 1,
                                    .a_step = score_stride(h->keys),
                                    .b = x,
                                    .b_step = h->stride,
                                    .b_panel = FC_ATTENTION_PANEL,
                                    .c = out,
                                    .c_stride = stride,
                                    .accumulate = add};
    fc_kernels.attention_product_f32(&p);
}

/* The opposite of gather, with zeros for the keys between. */
static void scatter(const sequence *s, const float *x, int64_t stride, int64_t width, float *out) {
    for (int64_t key = 0; key < s->keys; key++)
        if (is_attended(s, key)) {
            memcpy(out + key * stride, x, (size_t)width * sizeof *x);
            x += width;
        } else {
            memset(out + key * stride, 0, (size_t)width * sizeof *x);
        }
}

static void attend_grad(const fc_attention_args *a, const sequence *s, int64_t index, const workspace *ws) {
    const head h = open_head(a, s, index, ws);
    const int is_gathered = s->mask || s->mask_bool;
    const int64_t wide = score_stride(h.keys);
    float *dq = row_of(a, a->dq, s->row, index), *to_k = row_of(a, a->dk, s->key, index), *to_v = row_of(a, a->dv, s->key, index);
    float *dk = is_gathered ? ws->dk : to_k, *dv = is_gathered ? ws->dv : to_v;
    const float *dout = row_of(a, a->dout, s->row, index);
    if (h.keys == 0) {
        fill_rows(dq, h.stride, h.rows, h.width);
        return;
    }
    fc_kernels.attention_panels_f32(h.k, h.key_stride, h.keys, h.width, ws->k_panels);
    fc_kernels.attention_panels_f32(h.v, h.key_stride, h.keys, h.width, ws->v_panels);
    for (int64_t row = 0; row < h.rows; row += GRAD_ROWS) {
        const int64_t rows = smaller(GRAD_ROWS, h.rows - row), at = row * h.stride;
        score(&h, h.q + at, rows, ws->k_panels, ws->scores);
        fc_kernels.attention_softmax_f32(ws->scores, wide, rows, h.keys, h.factor, ws->inverse);
        score(&h, dout + at, rows, ws->v_panels, ws->dscores);
        fc_kernels.attention_softmax_grad_f32(ws->scores, ws->dscores, wide, rows, h.keys, ws->inverse, s->scale);
        mix(&h, ws->dscores, rows, h.k, dq + at, NULL);
        mix_back(&h, ws->scores, rows, dout + at, dv, h.key_stride, row > 0);
        mix_back(&h, ws->dscores, rows, h.q + at, dk, h.key_stride, row > 0);
    }
    if (is_gathered) {
        scatter(s, dk, h.stride, h.width, to_k);
        scatter(s, dv, h.stride, h.width, to_v);
    } else {
        fill_rows(to_k + h.keys * h.stride, h.stride, s->keys - h.keys, h.width);
        fill_rows(to_v + h.keys * h.stride, h.stride, s->keys - h.keys, h.width);
    }
}

static void visit_heads(const fc_attention_args *a, const sequence *s, int64_t index, int64_t last, const workspace *ws) {
    for (; index < last; index++) attend_grad(a, s, index, ws);
}

void fc_attention_grad(const void *args, int rank, int size) {
    const fc_attention_args *a = args;
    workspace ws;
    const int team = carve(a, 1, rank, size, &ws);
    if (rank >= team) return;
    if (!a->offsets && a->queries == 0 && rank == 0) {
        memset(a->dk, 0, (size_t)(a->batch * a->keys * a->heads * a->width) * sizeof *a->dk);
        memset(a->dv, 0, (size_t)(a->batch * a->keys * a->heads * a->width) * sizeof *a->dv);
    }
    clear_outside(a, a->dq, rank, team);
    clear_outside(a, a->dk, rank, team);
    clear_outside(a, a->dv, rank, team);
    share(a, 1, visit_heads, rank, team, &ws);
}
