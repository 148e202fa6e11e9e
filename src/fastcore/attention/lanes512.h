/* What the AVX-512 variants share; included inside their target regions.
 *
 * Rows of scores are folded sixteen at a time: a tree of 15 merges of two vectors into one, three instructions each, instead of
 * eight instructions and their latency for every row. The order of the additions is that of the scalar fold.
 */
#ifndef FC_ATTENTION_LANES512_H
#define FC_ATTENTION_LANES512_H

#include "body.h"

enum { MR = FC_ATTENTION_ROWS, LANES = 16, QUAD = 4, GROUP = 16 };

FC_INLINE __mmask16 first_lanes(int64_t n) { return n >= LANES ? 0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1); }

/* fc_exp2 of 16 numbers, by a polynomial of `terms` terms. */
FC_INLINE __m512 exp2_of(__m512 x, const float *term, const int terms) {
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(term[terms - 1]);
#pragma GCC unroll 4
    for (int t = terms - 2; t >= 0; t--) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(term[t]));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    /* "Not less" lets NaN through. */
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ), p, n);
}

FC_INLINE __m512 merge(const int is_sum, __m512 a, __m512 b) { return is_sum ? _mm512_add_ps(a, b) : _mm512_max_ps(a, b); }

/* The sums or maxima of sixteen vectors, one in each lane. */
FC_INLINE __m512 fold_group(const int is_sum, __m512 *x) {
    __m512 a[8], b[4], c[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        a[i] = merge(is_sum, _mm512_shuffle_f32x4(x[i], x[i + 8], 0x44), _mm512_shuffle_f32x4(x[i], x[i + 8], 0xee));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        b[i] = merge(is_sum, _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd));
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        const __m512d low = _mm512_castps_pd(b[i]), high = _mm512_castps_pd(b[i + 2]);
        c[i] = merge(is_sum, _mm512_castpd_ps(_mm512_unpacklo_pd(low, high)), _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
    }
    const __m512 folded = merge(is_sum, _mm512_shuffle_ps(c[0], c[1], 0x88), _mm512_shuffle_ps(c[0], c[1], 0xdd));
    const __m512i order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
    return _mm512_permutexvar_ps(order, folded);
}

/* The largest of each of up to sixteen rows of n; lanes past `rows` repeat the last. NaN may be passed over. */
FC_INLINE __m512 row_maxima(const float *x, int64_t stride, int rows, int64_t n) {
    const int64_t whole = (n - 1) / LANES * LANES;
    const __mmask16 last = first_lanes(n - whole);
    __m512 top[GROUP];
#pragma GCC unroll 16
    for (int r = 0; r < GROUP; r++) {
        const float *row = x + (r < rows ? r : rows - 1) * stride;
        top[r] = _mm512_mask_loadu_ps(_mm512_set1_ps(-__builtin_inff()), last, row + whole);
        for (int64_t j = 0; j < whole; j += LANES) top[r] = _mm512_max_ps(top[r], _mm512_loadu_ps(row + j));
    }
    return fold_group(0, top);
}

FC_INLINE void store_inverse(__m512 *sums, int rows, float *inverse) {
    for (int r = rows; r < GROUP; r++) sums[r] = _mm512_set1_ps(1.0f);
    _mm512_mask_storeu_ps(inverse, first_lanes(rows), _mm512_div_ps(_mm512_set1_ps(1.0f), fold_group(1, sums)));
}

#endif
