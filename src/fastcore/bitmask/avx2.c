/* Bitmask weights with AVX2, which has no expanding instruction: a table of 256 entries says, for each eight bits of a mask,
 * where each element's value lies among the packed ones; vpshufb moves bytes by it, and vpermps floats. Eight look-ups for 64
 * elements bind. Nibbles are spread with their bytes, then turned into numbers by another vpshufb; products with them cannot
 * saturate vpmaddubsw, those with int8 codes are widened for vpmaddwd.
 */
#include <string.h>

#include "../fastcore.h"

#ifdef FC_X86
FC_TARGET_AVX2

enum { ROWS = FC_BITMASK_ROWS };

/* places[mask][i]: how many of the mask's bits lie below bit i, or 128 if that is not set. Filled before any kernel runs. */
static uint8_t places[256][8];

static void fill_places(void) {
    for (int mask = 0; mask < 256; mask++)
        for (int i = 0, count = 0; i < 8; i++) places[mask][i] = mask >> i & 1 ? (uint8_t)count++ : 128;
}

FC_INLINE __m128i spread_eight(const uint8_t **values, unsigned mask) {
    const __m128i spread =
        _mm_shuffle_epi8(_mm_loadl_epi64((const __m128i *)*values), _mm_loadl_epi64((const __m128i *)places[mask]));
    *values += __builtin_popcount(mask);
    return spread;
}

FC_INLINE __m256i spread_half(const uint8_t **values, uint32_t mask) {
    const __m128i a = spread_eight(values, mask & 255), b = spread_eight(values, mask >> 8 & 255);
    const __m128i c = spread_eight(values, mask >> 16 & 255), d = spread_eight(values, mask >> 24);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi64(a, b)), _mm_unpacklo_epi64(c, d), 1);
}

FC_INLINE __m256i broadcast_dword(const uint8_t *codes) {
    int32_t dword;
    memcpy(&dword, codes, sizeof dword);
    return _mm256_set1_epi32(dword);
}

/* Four products of codes and int8 weights in each lane. */
FC_INLINE __m256i dot_s8(__m256i codes, __m256i weights) {
    const __m256i even =
        _mm256_madd_epi16(_mm256_and_si256(codes, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(weights, 8), 8));
    return _mm256_add_epi32(even, _mm256_madd_epi16(_mm256_srli_epi16(codes, 8), _mm256_srai_epi16(weights, 8)));
}

FC_INLINE __m256i dot_s4(__m256i codes, __m256i weights) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(codes, weights), _mm256_set1_epi16(1));
}

/* The numbers that the nibbles from bit `shift` on stand for. */
FC_INLINE __m256i nibbles(__m256i bytes, int shift) {
    const __m256i numbers = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1));
    if (shift) bytes = _mm256_srli_epi16(bytes, 4);
    return _mm256_shuffle_epi8(numbers, _mm256_and_si256(bytes, _mm256_set1_epi8(15)));
}

/* sums: two registers for each of R rows of x. `shift` is that of the nibbles, -1 for int8. */
FC_INLINE const uint8_t *add_chunk(const uint8_t *values, const uint8_t *mask, const uint8_t *codes, int shift, int R,
                                   __m256i *sums) {
    uint32_t halves[2];
    memcpy(halves, mask, sizeof halves);
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
        __m256i weights = spread_half(&values, halves[h]);
        if (shift >= 0) weights = nibbles(weights, shift);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const __m256i x = broadcast_dword(codes + r * 4);
            sums[r * 2 + h] = _mm256_add_epi32(sums[r * 2 + h], shift < 0 ? dot_s8(x, weights) : dot_s4(x, weights));
        }
    }
    return values;
}

FC_INLINE void multiply_s8(const fc_bitmask_tile *t, int first_row, int R) {
    const uint8_t *at = t->stream, *codes = t->codes + first_row * 4;
    __m256i sums[8];
#pragma GCC unroll 8
    for (int i = 0; i < R * 2; i++) sums[i] = _mm256_setzero_si256();
    for (int64_t first = 0; first < t->k4; first += t->group) {
        const int64_t chunks = t->k4 - first < t->group ? t->k4 - first : t->group;
        const uint8_t *masks = at;
        at += chunks * 8;
        for (int64_t c = 0; c < chunks; c++, codes += t->rows * 4) at = add_chunk(at, masks + c * 8, codes, -1, R, sums);
    }
#pragma GCC unroll 8
    for (int i = 0; i < R * 2; i++) _mm256_store_si256((__m256i *)((int32_t *)t->sums + first_row * ROWS) + i, sums[i]);
}

FC_INLINE __m256 eight_scales(const uint8_t *at, int first, int wide) {
    if (wide) return _mm256_loadu_ps((const float *)at + first);
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(at + first * 2)));
}

FC_INLINE void multiply_s4(const fc_bitmask_tile *t, int first_row, int R) {
    const uint8_t *at = t->stream, *codes = t->codes + first_row * 4;
    __m256 chain[8];
#pragma GCC unroll 8
    for (int i = 0; i < R * 2; i++) chain[i] = _mm256_setzero_ps();
    for (int64_t first = 0; first < t->k4; first += t->group) {
        const int64_t chunks = t->k4 - first < t->group ? t->k4 - first : t->group, lower = (chunks + 1) / 2;
        const uint8_t *masks = at + (t->wide ? 64 : 32), *low = masks + chunks * 8, *high = low;
        __m256i sums[8];
#pragma GCC unroll 8
        for (int i = 0; i < R * 2; i++) sums[i] = _mm256_setzero_si256();
        for (int64_t c = 0; c < lower; c++, codes += t->rows * 4) low = add_chunk(low, masks + c * 8, codes, 0, R, sums);
        for (int64_t c = lower; c < chunks; c++, codes += t->rows * 4) high = add_chunk(high, masks + c * 8, codes, 4, R, sums);
#pragma GCC unroll 8
        for (int i = 0; i < R * 2; i++)
            chain[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[i]), eight_scales(at, i % 2 * 8, t->wide), chain[i]);
        at = low > high ? low : high;
    }
#pragma GCC unroll 8
    for (int i = 0; i < R * 2; i++) _mm256_store_ps((float *)t->sums + first_row * ROWS + i * 8, chain[i]);
}

static void multiply_bitmask_u8_s8_avx2(const fc_bitmask_tile *t) {
    for (int r = 0; r < t->rows; r += 4) {
        switch (t->rows - r) {
        case 1: multiply_s8(t, r, 1); break;
        case 2: multiply_s8(t, r, 2); break;
        case 3: multiply_s8(t, r, 3); break;
        default: multiply_s8(t, r, 4); break;
        }
    }
}

static void multiply_bitmask_u8_s4_avx2(const fc_bitmask_tile *t) {
    for (int r = 0; r < t->rows; r += 4) {
        switch (t->rows - r) {
        case 1: multiply_s4(t, r, 1); break;
        case 2: multiply_s4(t, r, 2); break;
        case 3: multiply_s4(t, r, 3); break;
        default: multiply_s4(t, r, 4); break;
        }
    }
}

/* ---- float32 ---- */

FC_INLINE __m256i first_lanes(int64_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count < 8 ? (int32_t)count : 8), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

/* Eight columns from `column` on; the last of a row may be fewer. `careful`: read not a value more than the mask has bits. */
FC_INLINE void add_columns(const fc_bitmask_rows *t, const float **values, unsigned mask, int64_t column, int whole, int R,
                           int careful, __m256 *sums) {
    const int count = __builtin_popcount(mask);
    const __m256 packed = careful ? _mm256_maskload_ps(*values, first_lanes(count)) : _mm256_loadu_ps(*values);
    const __m256i place = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)places[mask]));
    const __m256 absent = _mm256_castsi256_ps(_mm256_slli_epi32(place, 24));
    const __m256 spread = _mm256_blendv_ps(_mm256_permutevar8x32_ps(packed, place), _mm256_setzero_ps(), absent);
    *values += count;
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
        const float *x = t->x + r * t->k + column;
        const __m256 columns = whole ? _mm256_loadu_ps(x) : _mm256_maskload_ps(x, first_lanes(t->k - column));
        sums[r] = _mm256_fmadd_ps(spread, columns, sums[r]);
    }
}

FC_INLINE float add_lanes(__m256 v) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

FC_INLINE void multiply_row(const fc_bitmask_rows *t, int64_t row, int R, int careful) {
    const uint8_t *bits = t->bitmask + row * ((t->k + 7) / 8);
    const float *values = t->values + t->row_offsets[row];
    __m256 sums[8];
#pragma GCC unroll 8
    for (int i = 0; i < R * 2; i++) sums[i] = _mm256_setzero_ps();
    int64_t column = 0;
    for (; column + 32 <= t->k; column += 32)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            add_columns(t, &values, bits[column / 8 + i], column + i * 8, 1, R, careful, sums + i % 2 * R);
    for (; column < t->k; column += 8) add_columns(t, &values, bits[column / 8], column, 0, R, careful, sums);
#pragma GCC unroll 8
    for (int i = R; i < R * 2; i++) sums[i % R] = _mm256_add_ps(sums[i % R], sums[i]);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) t->sums[r * t->stride + row] = add_lanes(sums[r]);
}

FC_INLINE void multiply_rows(const fc_bitmask_rows *t, int R) {
    for (int64_t row = 0; row < t->weight_rows; row++) {
        if (t->row_offsets[row + 1] + 8 <= t->count)
            multiply_row(t, row, R, 0);
        else
            multiply_row(t, row, R, 1);
    }
}

static void multiply_bitmask_f32_avx2(const fc_bitmask_rows *t) {
    switch (t->rows) {
    case 1: multiply_rows(t, 1); break;
    case 2: multiply_rows(t, 2); break;
    case 3: multiply_rows(t, 3); break;
    default: multiply_rows(t, 4); break;
    }
}

FC_TARGET_END

void fc_bitmask_install_avx2(fc_table *table) {
    fill_places();
    FC_INSTALL(table, multiply_bitmask_f32, avx2);
    FC_INSTALL(table, multiply_bitmask_u8_s8, avx2);
    FC_INSTALL(table, multiply_bitmask_u8_s4, avx2);
}
#else
void fc_bitmask_install_avx2(fc_table *table) { (void)table; }
#endif
