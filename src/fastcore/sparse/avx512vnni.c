/* AVX-512 VNNI: int8 products in blocks, lanes along M.
 *
 * A stored dword (four weights of consecutive K) is broadcast against up to four registers of 16 columns x 4 codes; one vpdpbusd
 * does 64 multiplications. Codes are q + 128, so every sum starts at -128 times the sum of its weights. 1x4 blocks cost five loads
 * per four vpdpbusd (the load port binds); 2x4 and 4x4 load the panel once for all their rows.
 */
#include "body.h"

#ifdef FC_X86
FC_TARGET_AVX512VNNI

/* Add block b of R x 4 to the sums of its rows, V registers each. */
FC_INLINE void add_block(const fc_blocks_tile *t, int64_t b, int R, int V, __m512i *sum) {
    const uint8_t *x = (const uint8_t *)t->panel + (int64_t)(t->index[b] - t->base) * V * 64;
    const int8_t *w = (const int8_t *)t->values + b * R * 4;
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
        int32_t four;
        memcpy(&four, w + r * 4, sizeof four);
        const __m512i weights = _mm512_set1_epi32(four);
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sum[r * V + v] = _mm512_dpbusd_epi32(sum[r * V + v], _mm512_loadu_si512(x + v * 64), weights);
    }
}

/* G row groups from group g on, side by side while all have blocks left. */
FC_INLINE void add_groups(const fc_blocks_tile *t, int64_t g, int G, int R, int V) {
    __m512i sum[16];
    int32_t *sums = (int32_t *)t->sum + g * R * V * 16;
    int64_t common = INT64_MAX;
#pragma GCC unroll 16
    for (int i = 0; i < G * R * V; i++)
        sum[i] = t->first ? _mm512_set1_epi32(-128 * t->sums[g * R + i / V]) : _mm512_load_si512(sums + i * 16);
#pragma GCC unroll 4
    for (int i = 0; i < G; i++) common = t->end[g + i] - t->begin[g + i] < common ? t->end[g + i] - t->begin[g + i] : common;
    for (int64_t b = 0; b < common; b++)
#pragma GCC unroll 4
        for (int i = 0; i < G; i++) add_block(t, t->begin[g + i] + b, R, V, sum + i * R * V);
#pragma GCC unroll 4
    for (int i = 0; i < G; i++)
        for (int64_t b = t->begin[g + i] + common; b < t->end[g + i]; b++) add_block(t, b, R, V, sum + i * R * V);
#pragma GCC unroll 16
    for (int i = 0; i < G * R * V; i++) _mm512_store_si512(sums + i * 16, sum[i]);
}

FC_INLINE void add_tile(const fc_blocks_tile *t, int G, int R, int V) {
    int64_t g = 0;
    for (; g + G <= t->groups; g += G) add_groups(t, g, G, R, V);
    for (; g < t->groups; g++) add_groups(t, g, 1, R, V);
}

FC_INLINE void add_blocks(const fc_blocks_tile *t, int R) {
    switch (t->width / 16) {
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
