/* AVX2 and FMA: products in blocks with lanes along M.
 *
 * A tile is cut into slices of at most eight registers of sums. fp32: broadcast and FMA, bound by the load ports. int8:
 * vpmaddubsw multiplies the magnitudes of the weights by signed codes q = code - 128, or by -q - 1 where the weight is negative.
 * Two products of at most 127 * 128 cannot saturate 16 bits, -q - 1 fits a byte for every code (-q would not), both come from the
 * code by one exclusive or, and what the -1 takes off is a sum over the row's weights, put on at the start. vpmaddwd by ones
 * widens. Four instructions per 32 multiplications bind.
 */
#include "body.h"

#ifdef FC_X86
FC_TARGET_AVX2
#include "narrow_f32.h"

/* ---- fp32: R x C blocks, V registers (8 columns each) from `offset` on, G row groups side by side ---- */

FC_INLINE void add_block_f32(const fc_blocks_tile *t, int64_t b, int64_t offset, int R, int C, int V, __m256 *sum) {
    const float *x = (const float *)t->panel + (int64_t)(t->index[b] - t->base) * C * t->stride + offset;
    const float *w = (const float *)t->values + b * R * C;
#pragma GCC unroll 4
    for (int c = 0; c < C; c++)
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const __m256 weight = _mm256_set1_ps(w[r * C + c]);
#pragma GCC unroll 8
            for (int v = 0; v < V; v++)
                sum[r * V + v] = _mm256_fmadd_ps(weight, _mm256_loadu_ps(x + c * t->stride + v * 8), sum[r * V + v]);
        }
}

FC_INLINE void add_groups_f32(const fc_blocks_tile *t, int64_t g, int64_t offset, int G, int R, int C, int V) {
    __m256 sum[8];
    float *sums = (float *)t->sum + g * R * t->width + offset;
    int64_t common = INT64_MAX;
#pragma GCC unroll 8
    for (int i = 0; i < G * R * V; i++)
        sum[i] = t->first ? _mm256_setzero_ps() : _mm256_load_ps(sums + i / V * t->width + i % V * 8);
#pragma GCC unroll 4
    for (int i = 0; i < G; i++) common = t->end[g + i] - t->begin[g + i] < common ? t->end[g + i] - t->begin[g + i] : common;
    for (int64_t b = 0; b < common; b++)
#pragma GCC unroll 4
        for (int i = 0; i < G; i++) add_block_f32(t, t->begin[g + i] + b, offset, R, C, V, sum + i * R * V);
#pragma GCC unroll 4
    for (int i = 0; i < G; i++)
        for (int64_t b = t->begin[g + i] + common; b < t->end[g + i]; b++) add_block_f32(t, b, offset, R, C, V, sum + i * R * V);
#pragma GCC unroll 8
    for (int i = 0; i < G * R * V; i++) _mm256_store_ps(sums + i / V * t->width + i % V * 8, sum[i]);
}

FC_INLINE void add_slice_f32(const fc_blocks_tile *t, int64_t offset, int R, int C, int V) {
    const int G = 8 / (R * V);
    int64_t g = 0;
    for (; g + G <= t->groups; g += G) add_groups_f32(t, g, offset, G, R, C, V);
    for (; g < t->groups; g++) add_groups_f32(t, g, offset, 1, R, C, V);
}

FC_INLINE void add_blocks_f32(const fc_blocks_tile *t, int R, int C) {
    const int64_t widest = 64 / R;
    int64_t offset = 0;
    if (t->width == 4) add_narrow_tile_f32(t, R, C);
    for (; offset + widest <= t->width; offset += widest) add_slice_f32(t, offset, R, C, 8 / R);
    if (R == 1 && offset + 32 <= t->width) add_slice_f32(t, offset, R, C, 4), offset += 32;
    if (R <= 2 && offset + 16 <= t->width) add_slice_f32(t, offset, R, C, 2);
}

static void multiply_blocks_f32_avx2(const fc_blocks_tile *tile) {
    if (tile->block_cols == 1)
        add_blocks_f32(tile, 1, 1);
    else if (tile->block_rows == 1)
        add_blocks_f32(tile, 1, 4);
    else if (tile->block_rows == 2)
        add_blocks_f32(tile, 2, 4);
    else
        add_blocks_f32(tile, 4, 4);
}

/* ---- int8: one row of blocks of R x 4, V registers (8 columns of four codes each) from `offset` on ----
 *
 * Rows of a block one by one: eight registers of columns share the work on a weight, which costs more than to load codes again.
 */

FC_INLINE void add_row_u8_s8(const fc_blocks_tile *t, int64_t b, int64_t row, int64_t offset, int R, int V, __m256i *sum) {
    const uint8_t *x = (const uint8_t *)t->panel + ((int64_t)(t->index[b] - t->base) * t->stride + offset) * 4;
    int32_t four;
    memcpy(&four, (const int8_t *)t->values + (b * R + row) * 4, sizeof four);
    const __m256i weights = _mm256_set1_epi32(four), sizes = _mm256_abs_epi8(weights);
    const __m256i flips = _mm256_xor_si256(_mm256_cmpgt_epi8(_mm256_setzero_si256(), weights), _mm256_set1_epi8(-128));
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
        const __m256i codes = _mm256_loadu_si256((const __m256i *)(x + v * 32));
        const __m256i pairs = _mm256_maddubs_epi16(sizes, _mm256_xor_si256(codes, flips));
        sum[v] = _mm256_add_epi32(sum[v], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        __asm__("" : "+x"(sum[v])); /* keeps the sum in its register */
    }
}

/* What the sums of a row start from in eight columns: what add_row_u8_s8 leaves out, too. */
FC_INLINE __m256i start_u8_s8(const fc_blocks_tile *t, int64_t row, int64_t column) {
    const __m256i zeros = _mm256_load_si256((const __m256i *)(t->zeros + column));
    const __m256i offsets = _mm256_sub_epi32(_mm256_set1_epi32(128), zeros);
    return _mm256_add_epi32(_mm256_mullo_epi32(_mm256_set1_epi32(t->sums[row]), offsets), _mm256_set1_epi32(t->negatives[row]));
}

FC_INLINE void add_slice_u8_s8(const fc_blocks_tile *t, int64_t offset, int R, int V) {
    for (int64_t row = 0; row < t->groups * R; row++) {
        __m256i sum[8];
        int32_t *sums = (int32_t *)t->sum + row * t->width + offset;
#pragma GCC unroll 8
        for (int v = 0; v < V; v++)
            sum[v] = t->first ? start_u8_s8(t, row, offset + v * 8) : _mm256_load_si256((const __m256i *)(sums + v * 8));
        for (int64_t b = t->begin[row / R]; b < t->end[row / R]; b++) add_row_u8_s8(t, b, row % R, offset, R, V, sum);
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) _mm256_store_si256((__m256i *)(sums + v * 8), sum[v]);
    }
}

FC_INLINE __m128i dot(__m128i sum, __m128i codes, __m128i weights) {
    const __m128i evens = _mm_and_si128(codes, _mm_set1_epi16(0xff)), odds = _mm_srli_epi16(codes, 8);
    const __m128i even = _mm_srai_epi16(_mm_slli_epi16(weights, 8), 8), odd = _mm_srai_epi16(weights, 8);
    return _mm_add_epi32(sum, _mm_add_epi32(_mm_madd_epi16(evens, even), _mm_madd_epi16(odds, odd)));
}

#include "narrow_int8.h"

FC_INLINE void add_blocks_u8_s8(const fc_blocks_tile *t, int R) {
    switch (t->width / 16) {
    case 0: add_narrow(t, R); break;
    case 1: add_slice_u8_s8(t, 0, R, 2); break;
    case 2: add_slice_u8_s8(t, 0, R, 4); break;
    case 3:
        add_slice_u8_s8(t, 0, R, 4);
        add_slice_u8_s8(t, 32, R, 2);
        break;
    default: add_slice_u8_s8(t, 0, R, 8); break;
    }
}

static void multiply_blocks_u8_s8_avx2(const fc_blocks_tile *tile) {
    if (tile->block_rows == 1)
        add_blocks_u8_s8(tile, 1);
    else if (tile->block_rows == 2)
        add_blocks_u8_s8(tile, 2);
    else
        add_blocks_u8_s8(tile, 4);
}

static void finish_lanes_f32_avx2(const fc_lanes_epilogue *epilogue) { finish_lanes(epilogue, 0); }
static void finish_lanes_s32_avx2(const fc_lanes_epilogue *epilogue) { finish_lanes(epilogue, 1); }

FC_TARGET_END

void fc_sparse_install_avx2(fc_table *table) {
    FC_INSTALL(table, multiply_blocks_f32, avx2);
    FC_INSTALL(table, multiply_blocks_u8_s8, avx2);
    FC_INSTALL(table, finish_lanes_f32, avx2);
    FC_INSTALL(table, finish_lanes_s32, avx2);
}
#else
void fc_sparse_install_avx2(fc_table *table) { (void)table; }
#endif
