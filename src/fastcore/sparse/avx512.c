/* AVX-512: fp32 products in blocks with lanes along M.
 *
 * Each stored weight is broadcast and multiplied into up to four registers, 64 columns of M; one index serves a whole
 * block. A 1x1 or 1x4 block costs five loads per four FMAs, so the load port binds; r x 4 blocks load the panel once for r rows.
 * Narrow tiles take several row groups side by side, so that enough independent sums hide the latency of the FMA.
 */
#include "body.h"

#ifdef FC_X86
FC_TARGET_AVX512
#include "../nn/gelu512.h"
#include "../nn/transpose512.h"
#include "narrow_f32.h"

/* Add block b of R x C to the sums of its rows, V registers each. */
FC_INLINE void add_block(const fc_blocks_tile *t, int64_t b, int R, int C, int V, __m512 *sum) {
    const float *x = (const float *)t->panel + (int64_t)(t->index[b] - t->base) * C * t->stride;
    const float *w = (const float *)t->values + b * R * C;
#pragma GCC unroll 4
    for (int c = 0; c < C; c++)
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const __m512 weight = _mm512_set1_ps(w[r * C + c]);
#pragma GCC unroll 4
            for (int v = 0; v < V; v++)
                sum[r * V + v] = _mm512_fmadd_ps(weight, _mm512_loadu_ps(x + c * t->stride + v * 16), sum[r * V + v]);
        }
}

/* G row groups from group g on, side by side while all have blocks left. */
FC_INLINE void add_groups(const fc_blocks_tile *t, int64_t g, int G, int R, int C, int V) {
    __m512 sum[16];
    float *sums = (float *)t->sum + g * R * V * 16;
    int64_t common = INT64_MAX;
#pragma GCC unroll 16
    for (int i = 0; i < G * R * V; i++) sum[i] = t->first ? _mm512_setzero_ps() : _mm512_load_ps(sums + i * 16);
#pragma GCC unroll 4
    for (int i = 0; i < G; i++) common = t->end[g + i] - t->begin[g + i] < common ? t->end[g + i] - t->begin[g + i] : common;
    for (int64_t b = 0; b < common; b++)
#pragma GCC unroll 4
        for (int i = 0; i < G; i++) add_block(t, t->begin[g + i] + b, R, C, V, sum + i * R * V);
#pragma GCC unroll 4
    for (int i = 0; i < G; i++)
        for (int64_t b = t->begin[g + i] + common; b < t->end[g + i]; b++) add_block(t, b, R, C, V, sum + i * R * V);
#pragma GCC unroll 16
    for (int i = 0; i < G * R * V; i++) _mm512_store_ps(sums + i * 16, sum[i]);
}

FC_INLINE void add_tile(const fc_blocks_tile *t, int G, int R, int C, int V) {
    int64_t g = 0;
    for (; g + G <= t->groups; g += G) add_groups(t, g, G, R, C, V);
    for (; g < t->groups; g++) add_groups(t, g, 1, R, C, V);
}

FC_INLINE void add_blocks(const fc_blocks_tile *t, int R, int C) {
    switch (t->width / 16) {
    case 0: add_narrow_tile_f32(t, R, C); break;
    case 1: add_tile(t, 4 / R, R, C, 1); break;
    case 2: add_tile(t, R == 1 ? 2 : 1, R, C, 2); break;
    case 3: add_tile(t, 1, R, C, 3); break;
    default: add_tile(t, 1, R, C, 4); break;
    }
}

static void multiply_blocks_f32_avx512(const fc_blocks_tile *tile) {
    if (tile->block_cols == 1)
        add_blocks(tile, 1, 1);
    else if (tile->block_rows == 1)
        add_blocks(tile, 1, 4);
    else if (tile->block_rows == 2)
        add_blocks(tile, 2, 4);
    else
        add_blocks(tile, 4, 4);
}

/* ---- epilogues: eight vectors at a time, which stay in registers unless the activation is a rare one ---- */

typedef struct finish_columns {
    __m512 scales[4];
    __mmask16 live[4];
} finish_columns;

FC_INLINE finish_columns open_columns(const fc_lanes_epilogue *e, int integer) {
    finish_columns c;
    for (int v = 0; v < 4; v++) {
        const int64_t left = e->count - v * 16;
        c.live[v] = left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
        c.scales[v] = integer ? _mm512_maskz_loadu_ps(c.live[v], e->scales + v * 16) : _mm512_setzero_ps();
    }
    return c;
}

/* Register v of a row, its bias added. */
FC_INLINE __m512 dequantize(const fc_lanes_epilogue *e, const finish_columns *c, int64_t row, int v, int integer) {
    const int32_t *sum = (const int32_t *)e->sum + row * e->width + v * 16;
    const __m512i bits = _mm512_maskz_loadu_epi32(c->live[v], sum);
    const __m512 bias = e->bias ? _mm512_set1_ps(e->bias[row]) : _mm512_setzero_ps();
    if (!integer) return _mm512_add_ps(_mm512_castsi512_ps(bits), bias);
    const __m512 scale = _mm512_mul_ps(c->scales[v], _mm512_set1_ps(e->weight_scale[row]));
    return _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(bits), scale), bias);
}

FC_INLINE void activate_each(fc_activation kind, float *x) {
    for (int i = 0; i < 128; i++) x[i] = fc_activate(kind, x[i]);
}

static __attribute__((noinline)) void activate_rarely(fc_activation kind, float *x) {
    switch (kind) {
    case FC_GELU_TANH: activate_each(FC_GELU_TANH, x); break;
    case FC_TANH: activate_each(FC_TANH, x); break;
    case FC_SIGMOID: activate_each(FC_SIGMOID, x); break;
    case FC_SILU: activate_each(FC_SILU, x); break;
    default: break;
    }
}

/* max(0, x) gives x where x is NaN. */
FC_INLINE void activate_vectors(fc_activation kind, __m512 *x, int count) {
    _Alignas(64) float array[128] = {0};
    if (kind == FC_IDENTITY) return;
    if (kind == FC_GELU) {
        gelu_vectors(x, count);
        return;
    }
#pragma GCC unroll 8
    for (int i = 0; i < count; i++)
        if (kind == FC_RELU)
            x[i] = _mm512_max_ps(_mm512_setzero_ps(), x[i]);
        else
            _mm512_store_ps(array + i * 16, x[i]);
    if (kind == FC_RELU) return;
    activate_rarely(kind, array);
#pragma GCC unroll 8
    for (int i = 0; i < count; i++) x[i] = _mm512_load_ps(array + i * 16);
}

/* R rows of V registers, in the order of the sums. */
FC_INLINE void finish_group(const fc_lanes_epilogue *e, const finish_columns *c, int64_t row, int R, int V, fc_activation kind,
                            int integer) {
    __m512 x[8];
#pragma GCC unroll 8
    for (int i = 0; i < R * V; i++) x[i] = dequantize(e, c, row + i / V, i % V, integer);
    activate_vectors(kind, x, R * V);
#pragma GCC unroll 8
    for (int i = 0; i < R * V; i++) {
        const int64_t at = (row + i / V) * e->stride + i % V * 16;
        if (e->residual) x[i] = _mm512_add_ps(x[i], _mm512_maskz_loadu_ps(c->live[i % V], e->residual + at));
        _mm512_mask_storeu_ps(e->out + at, c->live[i % V], x[i]);
    }
}

FC_INLINE void finish_groups(const fc_lanes_epilogue *e, const finish_columns *c, int R, int V, fc_activation kind, int integer) {
    int64_t row = 0;
    for (; row + R <= e->rows; row += R) finish_group(e, c, row, R, V, kind, integer);
    for (; row < e->rows; row++) finish_group(e, c, row, 1, V, kind, integer);
}

/* Up to sixteen rows of register v become parts of up to sixteen rows of the transposed matrix. */
FC_INLINE void finish_square(const fc_lanes_epilogue *e, const finish_columns *c, int64_t row, int64_t rows, int v,
                             fc_activation kind, int integer) {
    __m512 x[16];
    const __mmask16 live = (__mmask16)((1u << rows) - 1);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) x[i] = i < rows ? dequantize(e, c, row + i, v, integer) : _mm512_setzero_ps();
    activate_vectors(kind, x, 8);
    activate_vectors(kind, x + 8, 8);
    transpose_vectors(x);
    const int64_t columns = e->count - v * 16;
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
        if (i >= columns) break;
        const int64_t at = (v * 16 + i) * e->stride + row;
        if (e->residual) x[i] = _mm512_add_ps(x[i], _mm512_maskz_loadu_ps(live, e->residual + at));
        _mm512_mask_storeu_ps(e->out + at, live, x[i]);
    }
}

FC_INLINE void finish_squares(const fc_lanes_epilogue *e, const finish_columns *c, fc_activation kind, int integer) {
    for (int v = 0; v * 16 < e->count; v++) {
        int64_t row = 0;
        for (; row + 16 <= e->rows; row += 16) finish_square(e, c, row, 16, v, kind, integer);
        if (row < e->rows) finish_square(e, c, row, e->rows - row, v, kind, integer);
    }
}

FC_INLINE void finish_kind(const fc_lanes_epilogue *e, fc_activation kind, int integer) {
    const finish_columns c = open_columns(e, integer);
    if (e->transposed) {
        finish_squares(e, &c, kind, integer);
        return;
    }
    switch ((e->count + 15) / 16) {
    case 0: break;
    case 1: finish_groups(e, &c, 8, 1, kind, integer); break;
    case 2: finish_groups(e, &c, 4, 2, kind, integer); break;
    case 3: finish_groups(e, &c, 2, 3, kind, integer); break;
    default: finish_groups(e, &c, 2, 4, kind, integer); break;
    }
}

/* The kinds of every day have code of their own. */
FC_INLINE void finish(const fc_lanes_epilogue *e, int integer) {
    switch (e->activation) {
    case FC_IDENTITY: finish_kind(e, FC_IDENTITY, integer); break;
    case FC_GELU: finish_kind(e, FC_GELU, integer); break;
    case FC_RELU: finish_kind(e, FC_RELU, integer); break;
    default: finish_kind(e, e->activation, integer); break;
    }
}

static void finish_lanes_f32_avx512(const fc_lanes_epilogue *epilogue) { finish(epilogue, 0); }
static void finish_lanes_s32_avx512(const fc_lanes_epilogue *epilogue) { finish(epilogue, 1); }

FC_TARGET_END

void fc_sparse_install_avx512(fc_table *table) {
    FC_INSTALL(table, multiply_blocks_f32, avx512);
    FC_INSTALL(table, finish_lanes_f32, avx512);
    FC_INSTALL(table, finish_lanes_s32, avx512);
}
#else
void fc_sparse_install_avx512(fc_table *table) { (void)table; }
#endif
