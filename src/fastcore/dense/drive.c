/* One blocked product serves the forward pass and both gradients, in fp32 and bf16: C[rows, cols] = sum over depth of
 * A(i, d) B(d, j). All depths here count words, of one float or of two bf16; what they are is known to the packing alone.
 *
 * Per thread: a block of A (rows x depth, sized for L2) is packed once; panels of NR columns of B pass over it, cut in slabs of
 * the depth that stay in L1 while every panel of A reads them; the epilogue follows while the columns of C are warm. B is a
 * constant weight packed before, a dense matrix in place, or tiles expanded and packed into the thread's scratch. Threads share
 * output columns or rows, never the depth, and each packs what it needs: no barrier.
 */
#include <string.h>

#include "../fastcore.h"
#include "../parallel.h"

enum {
    BLOCK_FLOATS = 96 * 1024, /* most of a packed block of A: 384 KiB leave room in L2 for B and C */
    BLOCK_SLABS = 3,          /* depth of a block of A, in slabs */
    SINK_PANELS = 4,          /* rows of a gradient held before they are sunk, in register tiles ... */
    SINK_FLOATS = 48 * 1024,  /* ... and their most */
    PIECE = 1024,             /* columns of one dot with int8 codes */
    ALIGNMENT = 64,
};

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t pieces(int64_t total, int64_t most) { return (total + most - 1) / most; }
/* The even length of the fewest chunks of at most `most` items. */
static int64_t chunk(int64_t total, int64_t most) { return total > most ? pieces(total, pieces(total, most)) : total; }

static int64_t deepest(void) { return BLOCK_SLABS * fc_kernels.gemm_depth; }
static int64_t most_rows(int64_t depth) {
    return larger(fc_kernels.gemm_rows, BLOCK_FLOATS / larger(1, chunk(depth, deepest())));
}
static int64_t sink_rows(int64_t k) {
    return larger(fc_kernels.gemm_rows, smaller(SINK_PANELS * fc_kernels.gemm_rows, SINK_FLOATS / larger(1, k)));
}

/* ---- scratch ---- */

typedef struct workspace {
    float *a, *b, *tile, *sink;
    int32_t *cursor;
} workspace;

typedef struct layout {
    int64_t a, b, tile, sink, cursor, bytes; /* all but the last in floats, multiples of 16 */
} layout;

static int64_t line(int64_t floats) { return (floats + 15) / 16 * 16; }

static int64_t block_floats(int64_t rows, int64_t depth) { return smaller(rows, most_rows(depth)) * chunk(depth, deepest()); }

static int64_t largest_block(int64_t m, int64_t n, int64_t k) {
    return larger(block_floats(m, k), larger(block_floats(m, n), block_floats(n, m)));
}

static int64_t half(int64_t depth) { return (depth + 1) / 2; }

static layout plan_scratch(int64_t m, int64_t n, int64_t k) {
    const int64_t longest = larger(m, larger(n, k)), slab = smaller(longest, fc_kernels.gemm_depth) * fc_kernels.gemm_cols;
    const int64_t bf16 = larger(block_floats(m, half(k)), larger(block_floats(m, half(n)), block_floats(n, half(m))));
    layout l = {
        .a = line(larger(largest_block(m, n, k), bf16)),
        .b = line(slab),
        .tile = line(larger(slab, smaller(k, PIECE))),
        .sink = line(smaller(n, sink_rows(k)) * k),
        .cursor = line(larger(fc_kernels.gemm_cols, smaller(longest, deepest()))),
    };
    l.bytes = (l.a + l.b + l.tile + l.sink + l.cursor) * (int64_t)sizeof(float) + ALIGNMENT;
    return l;
}

int64_t fc_linear_scratch(int64_t m, int64_t n, int64_t k, int threads) { return plan_scratch(m, n, k).bytes * threads; }

/* This rank's part of the scratch; returns how many ranks have one, at most `size`. */
static int carve(int64_t m, int64_t n, int64_t k, void *scratch, int64_t bytes, int rank, int size, workspace *ws) {
    const layout l = plan_scratch(m, n, k);
    const int team = (int)smaller(size, bytes / l.bytes);
    if (rank >= team) return team;
    const uintptr_t address = (uintptr_t)scratch + (uintptr_t)(l.bytes * rank);
    ws->a = (float *)((address + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    ws->b = ws->a + l.a;
    ws->tile = ws->b + l.b;
    ws->sink = ws->tile + l.tile;
    ws->cursor = (int32_t *)(ws->sink + l.sink);
    return team;
}

/* ---- the product ---- */

typedef struct product {
    int bf16;
    int64_t depth;  /* words */
    int64_t values; /* the same in values: depth, or 2 * depth or one less */
    const float *a; /* A(i, d) = a[i * a_stride + d], or a[d * a_stride + i] if a_by_depth; d counts values */
    int64_t a_stride;
    int a_by_depth;
    const float *packed;     /* panels of B, or NULL: then */
    const fc_weight *weight; /* B(d, j) = weight[j, d], or weight[d, j] if b_by_depth */
    int b_by_depth;
    float *c;
    int64_t c_stride, c_row; /* c[0] is element (c_row, 0) */
    const float *bias, *residual;
    fc_activation activation;
} product;

typedef struct block {
    int64_t row, rows, depth, depths; /* where in A, and its extents */
} block;

static int64_t panel_count(int64_t rows) { return pieces(rows, fc_kernels.gemm_rows); }
static int64_t panel_row(int64_t rows, int64_t panel) { return rows * panel / panel_count(rows); }

/* Where a panel begins: at a multiple of its width, or, where it has none, such that all are of even height. */
static int64_t panel_edge(int64_t cols, int64_t count, int64_t height, int64_t width, int64_t panel) {
    if (!width) return count ? cols * panel / count : 0;
    return smaller(cols, panel * height);
}

/* `words` words from word `word` on of up to `rows` rows of a matrix of `values` columns: out[d * width + i]. */
static void pack_rows(const product *p, const float *in, int64_t stride, int64_t rows, int64_t word, int64_t words, float *out,
                      int64_t width) {
    enum { WORDS = 64, WIDEST = 64 }; /* converted in pieces that stay in L1, then transposed as floats are */
    uint32_t piece[WIDEST * WORDS];
    if (!p->bf16) {
        fc_kernels.pack_rows_f32(in + word, stride, rows, words, out, width);
        return;
    }
    for (int64_t d = 0; d < words; d += WORDS) {
        const int64_t count = smaller(WORDS, words - d), first = 2 * (word + d), values = smaller(2 * count, p->values - first);
        for (int64_t i = 0; i < rows; i++) {
            piece[i * WORDS + count - 1] = 0; /* the last word may have one value only */
            fc_kernels.convert_f32_bf16(in + i * stride + first, values, (uint16_t *)(piece + i * WORDS));
        }
        fc_kernels.pack_rows_f32((const float *)piece, WORDS, rows, count, out + d * width, width);
    }
}

/* The same of a matrix of `values` rows: columns [0, cols). */
static void pack_columns(const product *p, const float *in, int64_t stride, int64_t cols, int64_t word, int64_t words, float *out,
                         int64_t width) {
    if (!p->bf16) {
        fc_kernels.pack_columns_f32(in + word * stride, stride, cols, words, out, width);
        return;
    }
    for (int64_t d = word; d < word + words; d++, out += width) {
        const float *first = in + 2 * d * stride;
        fc_kernels.pair_f32_bf16(first, 2 * d + 1 < p->values ? first + stride : NULL, cols, (uint32_t *)out);
        if (cols < width) memset(out + cols, 0, (size_t)(width - cols) * sizeof *out);
    }
}

/* Words [from, to) of a matrix of `values` rows as panels of columns; panel q has columns [edge(q), edge(q + 1)), `width` of them
 * in its place (0: as many as it has), and begins at out + edge(q) * depth. A few words of many columns at a time: whole cache
 * lines in, and what is converted stays in L1. */
static void pack_panels(const product *p, const float *in, int64_t stride, int64_t cols, int64_t height, int64_t width,
                        int64_t from, int64_t to, int64_t depth, int64_t word, float *out) {
    enum { WORDS = 16, GROUP = 192 };
    uint32_t piece[WORDS * GROUP];
    const int64_t count = pieces(cols, height), group = larger(1, GROUP / height);
    for (int64_t q = 0; q < count; q += group) {
        const int64_t last = smaller(q + group, count), left = panel_edge(cols, count, height, width, q),
                      right = panel_edge(cols, count, height, width, last);
        for (int64_t d = from; d < to; d += WORDS) {
            const int64_t words = smaller(WORDS, to - d);
            const float *rows = in + (word + d) * stride + left;
            int64_t step = stride;
            if (p->bf16) {
                for (int64_t i = 0; i < words; i++) {
                    const int64_t value = 2 * (word + d + i);
                    const float *first = in + value * stride + left;
                    fc_kernels.pair_f32_bf16(first, value + 1 < p->values ? first + stride : NULL, right - left,
                                             piece + i * GROUP);
                }
                rows = (const float *)piece;
                step = GROUP;
            }
            for (int64_t r = q; r < last; r++) {
                const int64_t begin = panel_edge(cols, count, height, width, r),
                              have = panel_edge(cols, count, height, width, r + 1) - begin, place = width ? width : have;
                fc_kernels.pack_columns_f32(rows + begin - left, step, have, words, out + begin * depth + d * place, place);
            }
        }
    }
}

/* Panels of even height rather than full ones and a rest: a tile of two rows is bound by loads. */
static void pack_block(const product *p, block at, float *out) {
    if (p->a_by_depth) {
        pack_panels(p, p->a + at.row, p->a_stride, at.rows, fc_kernels.gemm_rows, 0, 0, at.depths, at.depths, at.depth, out);
        return;
    }
    for (int64_t q = 0; q < panel_count(at.rows); q++) {
        const int64_t first = panel_row(at.rows, q), rows = panel_row(at.rows, q + 1) - first, i = at.row + first;
        pack_rows(p, p->a + i * p->a_stride, p->a_stride, rows, at.depth, at.depths, out + first * at.depths, rows);
    }
}

typedef struct slab {
    const float *values;
    int64_t step, panel; /* from one depth, and from one panel, to the next */
} slab;

static int is_dense(const fc_weight *weight) { return weight->kind == FC_DENSE_F32; }

/* Can whole panels of B be read where they are? */
static int is_direct(const product *p) { return p->packed || (p->b_by_depth && is_dense(p->weight) && !p->bf16); }

static slab direct_slab(const product *p, int64_t j, int64_t depth) {
    if (p->packed)
        return (slab){p->packed + j * p->depth + depth * fc_kernels.gemm_cols, fc_kernels.gemm_cols,
                      p->depth * fc_kernels.gemm_cols};
    return (slab){(const float *)p->weight->values + depth * p->weight->k + j, p->weight->k, fc_kernels.gemm_cols};
}

/* Columns [j, j + cols) of one panel, depths [at.depth + offset, + depths), packed into the thread's scratch. `first`: the
 * first panel of this block, where the walk along the rows of the weight begins. */
static slab packed_slab(const product *p, block at, int64_t j, int64_t cols, int64_t offset, int64_t depths, int first,
                        const workspace *ws) {
    const fc_weight *w = p->weight;
    const int64_t d = at.depth + offset, width = fc_kernels.gemm_cols;
    if (is_dense(w)) {
        const float *values = w->values;
        if (p->b_by_depth)
            pack_columns(p, values + j, w->k, cols, d, depths, ws->b, width);
        else
            pack_rows(p, values + j * w->k, w->k, cols, d, depths, ws->b, width);
    } else if (p->b_by_depth) {
        int32_t *cursor = ws->cursor + offset;
        if (first) fc_weight_seek(w, d, depths, j, cursor);
        if (cols < width) memset(ws->b, 0, (size_t)(depths * width) * sizeof(float));
        fc_weight_expand(w, d, depths, j, cols, 1, ws->b, width, cursor);
    } else {
        if (offset == 0) fc_weight_seek(w, j, cols, d, ws->cursor);
        fc_weight_expand(w, j, cols, d, depths, 1, ws->tile, depths, ws->cursor);
        fc_kernels.pack_rows_f32(ws->tile, depths, cols, depths, ws->b, width);
    }
    return (slab){ws->b, width, 0};
}

static void multiply_slab(const product *p, block at, slab b, int64_t j, int64_t cols, int64_t offset, int64_t depths,
                          const workspace *ws) {
    for (int64_t q = 0; q < panel_count(at.rows); q++) {
        const int64_t first = panel_row(at.rows, q), rows = panel_row(at.rows, q + 1) - first;
        const float *a = ws->a + first * at.depths + offset * rows;
        float *c = p->c + (at.row + first - p->c_row) * p->c_stride + j;
        const int accumulate = at.depth + offset > 0;
        if (p->bf16)
            fc_kernels.gemm_bf16(rows, cols, depths, (const uint32_t *)a, (const uint32_t *)b.values, b.step, b.panel, c,
                                 p->c_stride, accumulate);
        else
            fc_kernels.gemm_f32(rows, cols, depths, a, b.values, b.step, b.panel, c, p->c_stride, accumulate);
    }
}

static void finish(const product *p, block at, int64_t j, int64_t cols) {
    if (at.depth + at.depths < p->depth || (!p->bias && !p->residual && p->activation == FC_IDENTITY)) return;
    fc_kernels.epilogue_f32(p->c + (at.row - p->c_row) * p->c_stride + j, p->c_stride, at.rows, cols,
                            p->bias ? p->bias + j : NULL, p->activation,
                            p->residual ? p->residual + at.row * p->c_stride + j : NULL, p->c_stride);
}

/* Every column in [j, end) against one packed block of A. */
static void sweep_columns(const product *p, block at, int64_t j, int64_t end, const workspace *ws) {
    const int64_t width = fc_kernels.gemm_cols, start = j;
    if (is_direct(p) && panel_count(at.rows) == 1) {
        const int64_t cols = p->packed ? end - j : (end - j) / width * width;
        multiply_slab(p, at, direct_slab(p, j, at.depth), j, cols, 0, at.depths, ws);
        finish(p, at, j, cols);
        j += cols;
    }
    const int64_t step = chunk(at.depths, fc_kernels.gemm_depth);
    for (; j < end; j += width) {
        const int64_t cols = smaller(width, end - j);
        /* The last panel of a matrix in place may not be read past its end. */
        const int direct = p->packed || (is_direct(p) && cols == width);
        int64_t offset = 0;
        do {
            const int64_t depths = smaller(step, at.depths - offset);
            const slab b =
                direct ? direct_slab(p, j, at.depth + offset) : packed_slab(p, at, j, cols, offset, depths, j == start, ws);
            multiply_slab(p, at, b, j, cols, offset, depths, ws);
            offset += depths;
        } while (offset < at.depths);
        finish(p, at, j, cols);
    }
}

static void multiply(const product *p, int64_t row, int64_t row_end, int64_t col, int64_t col_end, const workspace *ws) {
    const int64_t rows = chunk(row_end - row, most_rows(p->depth)), depths = chunk(p->depth, deepest());
    if (col >= col_end) return;
    for (; row < row_end; row += rows) {
        block at = {row, smaller(rows, row_end - row), 0, 0};
        do {
            at.depths = smaller(depths, p->depth - at.depth);
            pack_block(p, at, ws->a);
            sweep_columns(p, at, col, col_end, ws);
            at.depth += at.depths;
        } while (at.depth < p->depth);
    }
}

/* Share rows where B needs no packing and all have enough of them, else columns: sharing columns repeats the packing of A,
 * sharing rows that of B. */
static void multiply_shared(const product *p, int64_t rows, int64_t cols, const workspace *ws, int rank, int team) {
    int64_t begin, end;
    if (pieces(cols, fc_kernels.gemm_cols) < team || (p->packed && rows >= team * fc_kernels.gemm_rows)) {
        fc_partition(rows, 1, rank, team, &begin, &end);
        multiply(p, begin, end, 0, cols, ws);
    } else {
        fc_partition(cols, fc_kernels.gemm_cols, rank, team, &begin, &end);
        multiply(p, 0, rows, begin, end, ws);
    }
}

static int64_t words(int64_t values, int bf16) { return bf16 ? half(values) : values; }

void fc_linear(const void *args, int rank, int size) {
    const fc_linear_args *l = args;
    workspace ws;
    const int team = carve(l->m, l->n, l->k, l->scratch, l->scratch_bytes, rank, size, &ws);
    if (rank >= team) return;
    const product p = {.bf16 = l->bf16,
                       .depth = words(l->k, l->bf16),
                       .values = l->k,
                       .a = l->x,
                       .a_stride = l->k,
                       .packed = l->packed,
                       .weight = &l->weight,
                       .c = l->out,
                       .c_stride = l->n,
                       .bias = l->bias,
                       .residual = l->residual,
                       .activation = l->activation};
    multiply_shared(&p, l->m, l->n, &ws, rank, team);
}

void fc_linear_grad_input(const void *args, int rank, int size) {
    const fc_linear_grad_args *g = args;
    const fc_weight *w = &g->weight;
    workspace ws;
    const int team = carve(g->m, w->n, w->k, g->scratch, g->scratch_bytes, rank, size, &ws);
    if (rank >= team) return;
    const product p = {.bf16 = g->bf16,
                       .depth = words(w->n, g->bf16),
                       .values = w->n,
                       .a = g->dy,
                       .a_stride = w->n,
                       .packed = g->packed,
                       .weight = w,
                       .b_by_depth = 1,
                       .c = g->to,
                       .c_stride = w->k};
    multiply_shared(&p, g->m, w->k, &ws, rank, team);
}

/* ---- sinks of the weight's gradient ---- */

/* Keep the positions of a float32 block weight that belong to row `row`. */
static void gather_blocks(const fc_weight *w, int64_t row, const float *gradient, float *to) {
    const int64_t group = row / w->block_rows, width = w->block_cols;
    for (int64_t b = w->row_offsets[group]; b < w->row_offsets[group + 1]; b++)
        memcpy(to + (b * w->block_rows + row % w->block_rows) * width, gradient + w->index[b] * width,
               (size_t)width * sizeof *to);
}

/* The same under a bitmask. */
static void gather_bitmask(const fc_weight *w, int64_t row, const float *gradient, float *to) {
    const uint8_t *bits = w->bitmask + row * ((w->k + 7) / 8);
    int64_t at = w->row_starts[row];
    for (int64_t i = 0; i < w->k; i++)
        if (bits[i / 8] >> i % 8 & 1) to[at++] = gradient[i];
}

/* The gradient of a row's scale: the row's gradient against its codes, in pieces of fixed length. */
static float dot_codes(const fc_weight *w, int64_t row, const float *gradient, const workspace *ws) {
    float sum = 0.0f;
    fc_weight_seek(w, row, 1, 0, ws->cursor);
    for (int64_t col = 0; col < w->k; col += PIECE) {
        const int64_t cols = smaller(PIECE, w->k - col);
        fc_weight_expand(w, row, 1, col, cols, 0, ws->tile, cols, ws->cursor);
        sum += fc_kernels.dot_f32(gradient + col, ws->tile, cols);
    }
    return sum;
}

void fc_linear_grad_weight(const void *args, int rank, int size) {
    const fc_linear_grad_args *g = args;
    const fc_weight *w = &g->weight;
    workspace ws;
    const int team = carve(g->m, w->n, w->k, g->scratch, g->scratch_bytes, rank, size, &ws);
    if (rank >= team) return;
    const fc_weight x = {.kind = FC_DENSE_F32, .n = g->m, .k = w->k, .values = g->x};
    product p = {.bf16 = g->bf16,
                 .depth = words(g->m, g->bf16),
                 .values = g->m,
                 .a = g->dy,
                 .a_stride = w->n,
                 .a_by_depth = 1,
                 .packed = g->packed,
                 .weight = &x,
                 .b_by_depth = 1,
                 .c = g->to,
                 .c_stride = w->k};
    int64_t row, end;
    fc_partition(w->n, fc_kernels.gemm_rows, rank, team, &row, &end);
    if (is_dense(w)) {
        multiply(&p, row, end, 0, w->k, &ws);
        return;
    }
    p.c = ws.sink;
    for (int64_t rows = sink_rows(w->k); row < end; row += rows) {
        const int64_t last = smaller(row + rows, end);
        p.c_row = row;
        multiply(&p, row, last, 0, w->k, &ws);
        for (int64_t i = row; i < last; i++) {
            const float *gradient = ws.sink + (i - row) * w->k;
            if (w->kind == FC_BLOCKS_F32)
                gather_blocks(w, i, gradient, g->to);
            else if (w->kind == FC_BITMASK_F32)
                gather_bitmask(w, i, gradient, g->to);
            else
                g->to[i] = dot_codes(w, i, gradient, &ws);
        }
    }
}

/* ---- packing a constant weight ---- */

int64_t fc_dense_packed_size(int64_t n, int64_t k) { return pieces(n, fc_kernels.gemm_cols) * fc_kernels.gemm_cols * k; }

int64_t fc_bf16_packed_size(int64_t n, int64_t k) { return fc_dense_packed_size(n, half(k)); }

static void pack_weight(const fc_pack_dense_args *a, int bf16, int rank, int size) {
    enum { DEPTH = 64, WIDEST = 64 };
    const fc_weight *w = &a->weight;
    const int64_t width = fc_kernels.gemm_cols, depth = words(w->k, bf16);
    const product whole = {.bf16 = bf16, .values = w->k};
    float tile[DEPTH * WIDEST];
    int32_t cursor[WIDEST];
    int64_t begin, end;
    fc_partition(w->n, width, rank, size, &begin, &end);
    for (int64_t j = begin; j < end; j += width) {
        const int64_t rows = smaller(width, end - j);
        float *to = a->out + j * depth;
        if (is_dense(w)) {
            pack_rows(&whole, (const float *)w->values + j * w->k, w->k, rows, 0, depth, to, width);
            continue;
        }
        fc_weight_seek(w, j, rows, 0, cursor);
        for (int64_t d = 0; d < w->k; d += DEPTH) {
            const int64_t depths = smaller(DEPTH, w->k - d);
            const product part = {.bf16 = bf16, .values = depths};
            fc_weight_expand(w, j, rows, d, depths, 1, tile, depths, cursor);
            pack_rows(&part, tile, depths, rows, 0, words(depths, bf16), to + words(d, bf16) * width, width);
        }
    }
}

void fc_pack_dense(const void *args, int rank, int size) { pack_weight(args, 0, rank, size); }
void fc_pack_bf16(const void *args, int rank, int size) { pack_weight(args, 1, rank, size); }

void fc_pack_operand(const void *args, int rank, int size) {
    const fc_pack_operand_args *o = args;
    const product p = {.bf16 = o->bf16, .values = o->depth};
    const int64_t width = fc_kernels.gemm_cols, depth = words(o->depth, o->bf16);
    int64_t begin, end;
    fc_partition(depth, 16, rank, size, &begin, &end);
    pack_panels(&p, o->values, o->cols, o->cols, width, width, begin, end, depth, 0, o->out);
}

int fc_has_bf16(void) { return strcmp(fc_kernels.variant.gemm_bf16, "scalar") != 0; }
