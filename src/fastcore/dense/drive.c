/* One blocked product serves the forward pass and both gradients: C[rows, cols] = sum over depth of A(i, d) B(d, j).
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

static layout plan_scratch(int64_t m, int64_t n, int64_t k) {
    const int64_t longest = larger(m, larger(n, k)), slab = smaller(longest, fc_kernels.gemm_depth) * fc_kernels.gemm_cols;
    layout l = {
        .a = line(larger(block_floats(m, k), larger(block_floats(m, n), block_floats(n, m)))),
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
    int64_t depth;
    const float *a; /* A(i, d) = a[i * a_stride + d], or a[d * a_stride + i] if a_by_depth */
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

/* Panels of even height rather than full ones and a rest: a tile of two rows is bound by loads. */
static void pack_block(const product *p, block at, float *out) {
    for (int64_t q = 0; q < panel_count(at.rows); q++) {
        const int64_t first = panel_row(at.rows, q), rows = panel_row(at.rows, q + 1) - first, i = at.row + first;
        float *to = out + first * at.depths;
        if (p->a_by_depth)
            fc_kernels.pack_columns_f32(p->a + at.depth * p->a_stride + i, p->a_stride, rows, at.depths, to, rows);
        else
            fc_kernels.pack_rows_f32(p->a + i * p->a_stride + at.depth, p->a_stride, rows, at.depths, to, rows);
    }
}

typedef struct slab {
    const float *values;
    int64_t step, panel; /* from one depth, and from one panel, to the next */
} slab;

static int is_dense(const fc_weight *weight) { return weight->kind == FC_DENSE_F32; }

/* Can whole panels of B be read where they are? */
static int is_direct(const product *p) { return p->packed || (p->b_by_depth && is_dense(p->weight)); }

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
            fc_kernels.pack_columns_f32(values + d * w->k + j, w->k, cols, depths, ws->b, width);
        else
            fc_kernels.pack_rows_f32(values + j * w->k + d, w->k, cols, depths, ws->b, width);
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
        fc_kernels.gemm_f32(rows, cols, depths, ws->a + first * at.depths + offset * rows, b.values, b.step, b.panel,
                            p->c + (at.row + first - p->c_row) * p->c_stride + j, p->c_stride, at.depth + offset > 0);
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

void fc_linear(const void *args, int rank, int size) {
    const fc_linear_args *l = args;
    workspace ws;
    const int team = carve(l->m, l->n, l->k, l->scratch, l->scratch_bytes, rank, size, &ws);
    if (rank >= team) return;
    const product p = {.depth = l->k,
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
    const product p = {.depth = w->n, .a = g->dy, .a_stride = w->n, .weight = w, .b_by_depth = 1, .c = g->to, .c_stride = w->k};
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
    product p = {.depth = g->m,
                 .a = g->dy,
                 .a_stride = w->n,
                 .a_by_depth = 1,
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
            else
                g->to[i] = dot_codes(w, i, gradient, &ws);
        }
    }
}

/* ---- packing a constant weight ---- */

int64_t fc_dense_packed_size(int64_t n, int64_t k) { return pieces(n, fc_kernels.gemm_cols) * fc_kernels.gemm_cols * k; }

void fc_pack_dense(const void *args, int rank, int size) {
    enum { DEPTH = 64, WIDEST = 64 };
    const fc_pack_dense_args *p = args;
    const fc_weight *w = &p->weight;
    const int64_t width = fc_kernels.gemm_cols;
    float tile[DEPTH * WIDEST];
    int32_t cursor[WIDEST];
    int64_t begin, end;
    fc_partition(w->n, width, rank, size, &begin, &end);
    for (int64_t j = begin; j < end; j += width) {
        const int64_t rows = smaller(width, end - j);
        float *to = p->out + j * w->k;
        if (is_dense(w)) {
            fc_kernels.pack_rows_f32((const float *)w->values + j * w->k, w->k, rows, w->k, to, width);
            continue;
        }
        fc_weight_seek(w, j, rows, 0, cursor);
        for (int64_t d = 0; d < w->k; d += DEPTH) {
            const int64_t depths = smaller(DEPTH, w->k - d);
            fc_weight_expand(w, j, rows, d, depths, 1, tile, depths, cursor);
            fc_kernels.pack_rows_f32(tile, depths, rows, depths, to + d * width, width);
        }
    }
}
