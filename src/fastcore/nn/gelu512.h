/* fc_gelu of vectors, in its order of operations; included inside AVX-512 target regions.
 *
 * Each value is a chain of 14 dependent multiply-adds: eight vectors in flight keep the port busy, where a row of a tile, two
 * vectors, would wait for it.
 */
#ifndef FC_NN_GELU512_H
#define FC_NN_GELU512_H

#include "activation.h"

FC_INLINE void gelu_vectors(__m512 *x, const int count) {
    __m512 t[8], p[8];
    const __m512 end = _mm512_set1_ps(FC_GELU_END), last = _mm512_set1_ps(FC_GELU_END * FC_GELU_END);
    const __m512 gain = _mm512_set1_ps(2 / (FC_GELU_END * FC_GELU_END));
#pragma GCC unroll 8
    for (int v = 0; v < count; v++) {
        /* The second operand is what min gives for NaN. */
        t[v] = _mm512_fmadd_ps(_mm512_min_ps(_mm512_mul_ps(x[v], x[v]), last), gain, _mm512_set1_ps(-1.0f));
        p[v] = _mm512_set1_ps(fc_gelu_terms[0]);
    }
#pragma GCC unroll 13
    for (int i = 1; i < FC_GELU_TERMS; i++)
#pragma GCC unroll 8
        for (int v = 0; v < count; v++) p[v] = _mm512_fmadd_ps(p[v], t[v], _mm512_set1_ps(fc_gelu_terms[i]));
#pragma GCC unroll 8
    for (int v = 0; v < count; v++) {
        const __mmask16 above = _mm512_cmp_ps_mask(x[v], _mm512_set1_ps(-FC_GELU_END), _CMP_GT_OQ);
        const __m512 cdf = _mm512_maskz_fmadd_ps(above, _mm512_min_ps(x[v], end), p[v], _mm512_set1_ps(0.5f));
        x[v] = _mm512_mul_ps(x[v], cdf);
    }
}

#endif
