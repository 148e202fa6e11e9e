/* int4 with AVX2.
 *
 * Product: two rows by 32 columns. Codes of weights are 0 to 15, so that vpmaddubsw with codes of activations gives at most
 * 2 * 15 * 127 and eight of them, 32 k, still fit 16 bits: only then vpmaddwd widens. vpmaddubsw and the shifts and masks
 * before it bind.
 */
#include "../fastcore.h"
#include "body.h"

#ifdef FC_X86
FC_TARGET_AVX2

enum { LANES = 8, VECTORS = FC_INT4_COLUMNS / LANES, BEFORE_WIDENING = 4 /* octets */ };

static void quantize_groups_f32_s8_avx2(const float *x, int64_t k, int64_t group, int64_t rows, int8_t *codes, float *scales,
                                        int32_t *offsets) {
    quantize_groups_body(x, k, group, rows, codes, scales, offsets);
}

FC_INLINE __m256i broadcast_dword(const int8_t *p) {
    int32_t dword;
    memcpy(&dword, p, 4);
    return _mm256_set1_epi32(dword);
}

FC_INLINE __m256 load_scales(const uint8_t *scales, int wide, int v) {
    if (wide) return _mm256_load_ps((const float *)scales + v * LANES);
    return _mm256_cvtph_ps(_mm_load_si128((const __m128i *)scales + v));
}

/* acc += the products of up to four octets of 32 columns. `rows` is a constant; the rows of codes are t->rows dwords apart. */
FC_INLINE void multiply_octets(const fc_int4_tile *t, const uint8_t *w, const int8_t *a, int64_t octets, __m256i acc[][VECTORS],
                               const int rows) {
    const __m256i low = _mm256_set1_epi8(15);
    __m256i narrow[2][VECTORS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECTORS; v++) narrow[r][v] = _mm256_setzero_si256();
    for (int64_t i = 0; i < octets; i++, w += FC_INT4_COLUMNS * 4, a += t->rows * 8)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            const __m256i both = _mm256_load_si256((const __m256i *)w + v);
            const __m256i first = _mm256_and_si256(both, low), second = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
            for (int r = 0; r < rows; r++) {
                const __m256i x = _mm256_maddubs_epi16(first, broadcast_dword(a + r * 4));
                const __m256i y = _mm256_maddubs_epi16(second, broadcast_dword(a + (t->rows + r) * 4));
                narrow[r][v] = _mm256_add_epi16(narrow[r][v], _mm256_add_epi16(x, y));
            }
        }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECTORS; v++)
            acc[r][v] = _mm256_add_epi32(acc[r][v], _mm256_madd_epi16(narrow[r][v], _mm256_set1_epi16(1)));
}

FC_INLINE void sum_rows(const fc_int4_tile *t, int row, float out[][FC_INT8_COLUMNS], const int rows) {
    __m256 sum[2][VECTORS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECTORS; v++) sum[r][v] = _mm256_setzero_ps();
    const uint8_t *w = t->weight;
    const int8_t *a = t->codes + row * 4;
    for (int64_t g = 0, first = 0; first < t->k; g++, first += t->group) {
        const uint8_t *scales = w;
        __m256i acc[2][VECTORS];
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < VECTORS; v++) acc[r][v] = _mm256_set1_epi32(t->offsets[g * t->rows + row + r]);
        w += FC_INT4_COLUMNS * (t->wide ? 4 : 2);
        for (int64_t left = fc_int4_octets(group_length(t->k, t->group, first)); left > 0; left -= BEFORE_WIDENING) {
            const int64_t octets = left < BEFORE_WIDENING ? left : BEFORE_WIDENING;
            multiply_octets(t, w, a, octets, acc, rows);
            w += octets * FC_INT4_COLUMNS * 4;
            a += octets * t->rows * 8;
        }
        for (int r = 0; r < rows; r++) {
            const __m256 scale = _mm256_set1_ps(t->scales[g * t->rows + row + r]);
            for (int v = 0; v < VECTORS; v++) {
                const __m256 both = _mm256_mul_ps(load_scales(scales, t->wide, v), scale);
                sum[r][v] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[r][v]), both, sum[r][v]);
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECTORS; v++) _mm256_storeu_ps(out[r] + v * LANES, sum[r][v]);
}

static void linear_u4_s8_f32_avx2(const fc_int4_tile *t) {
    float sum[FC_INT4_ROWS][FC_INT8_COLUMNS];
    int row = 0;
    for (; row + 2 <= t->rows; row += 2) sum_rows(t, row, sum + row, 2);
    if (row < t->rows) sum_rows(t, row, sum + row, 1);
    finish_int4(t, sum);
}

static void expand_u4_f32_avx2(const fc_int4_weight *w, int64_t row, int add, float *out) {
    const uint32_t *words = w->words + row * fc_int4_octets(w->k);
    const int64_t groups = fc_int4_groups(w->k, w->group);
    const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28), low = _mm256_set1_epi32(15);
    for (int64_t first = 0, g = row * groups; first < w->k; first += w->group, g++) {
        const int64_t end = first + group_length(w->k, w->group, first);
        const __m256 scale = _mm256_set1_ps(fc_int4_scale(w->scales, w->wide, g));
        for (int64_t j = first; j < end; j += LANES) {
            const __m256i codes = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32((int32_t)words[j / 8]), shifts), low);
            __m256 v = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(codes, _mm256_set1_epi32(8))), scale);
            if (end - j >= LANES) {
                if (add) v = _mm256_add_ps(_mm256_loadu_ps(out + j), v);
                _mm256_storeu_ps(out + j, v);
            } else {
                float tail[LANES];
                _mm256_storeu_ps(tail, v);
                for (int64_t i = 0; i < end - j; i++) out[j + i] = add ? out[j + i] + tail[i] : tail[i];
            }
        }
    }
}

FC_TARGET_END

void fc_int4_install_avx2(fc_table *table) {
    FC_INSTALL(table, linear_u4_s8_f32, avx2);
    FC_INSTALL(table, quantize_groups_f32_s8, avx2);
    FC_INSTALL(table, expand_u4_f32, avx2);
}
#endif
