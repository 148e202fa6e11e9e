/* AVX-512 VNNI: int8 products in blocks, lanes along M.
 *
 * A stored dword (four weights of consecutive K) is broadcast against up to four registers of 16 columns x 4 codes; one vpdpbusd
 * does 64 multiplications. Every sum starts at minus the column's zero point times the sum of the row's weights. 1x4 blocks cost
 * five loads per four vpdpbusd (the load port binds); 2x4 and 4x4 load the panel once for all their rows.
 */
#include "body.h"

#ifdef FC_X86
FC_TARGET_AVX512VNNI

FC_INLINE __m128i dot(__m128i sum, __m128i codes, __m128i weights) { return _mm_dpbusd_epi32(sum, codes, weights); }

#include "narrow_int8.h"

/* Add block b of R x 4 to the sums of its rows, V registers each. */
FC_INLINE void add_block(const fc_blocks_tile *t, int64_t b, int R, int V, __m512i *sum) {
    const uint8_t *x = (const uint8_t *)t->panel + (int64_t)(t->index[b] - t->base) * t->stride * 4;
    const int8_t *w = (const int8_t *)t->values + b * R * 4;
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
        int32_t four;
        memcpy(&four, w + r * 4, sizeof four);
        const __m512i weights = _mm512_set1_epi32(four);
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
            sum[r * V + v] = _mm512_dpbusd_epi32(sum[r * V + v], _mm512_loadu_si512(x + v * 64), weights);
            __asm__("" : "+v"(sum[r * V + v])); /* keeps the sum in its register */
        }
    }
}

/* What the sums of a row start from in register v of the columns. */
FC_INLINE __m512i start(const fc_blocks_tile *t, int64_t row, int v) {
    return _mm512_mullo_epi32(_mm512_set1_epi32((int32_t)-(uint32_t)t->sums[row]), _mm512_load_si512(t->zeros + v * 16));
}

/* U blocks of a row group at a time, each with sums of its own: enough independent chains to hide the latency. */
FC_INLINE void add_group(const fc_blocks_tile *t, int64_t g, int U, int R, int V) {
    __m512i sum[16];
    int32_t *sums = (int32_t *)t->sum + g * R * V * 16;
#pragma GCC unroll 16
    for (int i = 0; i < R * V; i++) sum[i] = t->first ? start(t, g * R + i / V, i % V) : _mm512_load_si512(sums + i * 16);
#pragma GCC unroll 16
    for (int i = R * V; i < U * R * V; i++) sum[i] = _mm512_setzero_si512();
    int64_t b = t->begin[g];
    const int64_t end = t->end[g];
    for (; b + U <= end; b += U)
#pragma GCC unroll 4
        for (int u = 0; u < U; u++) add_block(t, b + u, R, V, sum + u * R * V);
    for (; b < end; b++) add_block(t, b, R, V, sum);
#pragma GCC unroll 16
    for (int i = R * V; i < U * R * V; i++) sum[i % (R * V)] = _mm512_add_epi32(sum[i % (R * V)], sum[i]);
#pragma GCC unroll 16
    for (int i = 0; i < R * V; i++) _mm512_store_si512(sums + i * 16, sum[i]);
}

FC_INLINE void add_tile(const fc_blocks_tile *t, int U, int R, int V) {
    for (int64_t g = 0; g < t->groups; g++) add_group(t, g, U, R, V);
}

FC_INLINE void add_blocks(const fc_blocks_tile *t, int R) {
    switch (t->width / 16) {
    case 0: add_narrow(t, R); break;
    case 1: add_tile(t, 4 / R, R, 1); break;
    case 2: add_tile(t, R == 1 ? 2 : 1, R, 2); break;
    case 3: add_tile(t, 1, R, 3); break;
    default: add_tile(t, 1, R, 4); break;
    }
}

static void multiply_blocks_u8_s8_avx512vnni(const fc_blocks_tile *tile) {
    if (tile->block_rows == 1)
        add_blocks(tile, 1);
    else if (tile->block_rows == 2)
        add_blocks(tile, 2);
    else
        add_blocks(tile, 4);
}

FC_TARGET_END

void fc_sparse_install_avx512vnni(fc_table *table) { FC_INSTALL(table, multiply_blocks_u8_s8, avx512vnni); }
#else
void fc_sparse_install_avx512vnni(fc_table *table) { (void)table; }
#endif
