/* AVX-512: fp32 products in blocks with lanes along M.
 *
 * Each stored weight is broadcast and multiplied into up to four registers, 64 columns of M; one index serves a whole
 * block. A 1x1 or 1x4 block costs five loads per four FMAs, so the load port binds; r x 4 blocks load the panel once for r rows.
 * Narrow tiles take several row groups side by side, so that enough independent sums hide the latency of the FMA.
 */
#include "body.h"

#ifdef FC_X86
FC_TARGET_AVX512
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

static void finish_lanes_f32_avx512(const fc_lanes_epilogue *epilogue) { finish_lanes(epilogue, 0); }
static void finish_lanes_s32_avx512(const fc_lanes_epilogue *epilogue) { finish_lanes(epilogue, 1); }

FC_TARGET_END

void fc_sparse_install_avx512(fc_table *table) {
    FC_INSTALL(table, multiply_blocks_f32, avx512);
    FC_INSTALL(table, finish_lanes_f32, avx512);
    FC_INSTALL(table, finish_lanes_s32, avx512);
}
#else
void fc_sparse_install_avx512(fc_table *table) { (void)table; }
#endif
