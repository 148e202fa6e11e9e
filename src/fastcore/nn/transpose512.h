/* Sixteen vectors of sixteen floats, transposed in registers; included inside AVX-512 target regions.
 *
 * Four rounds of sixteen shuffles (pairs of 1, 2, 4 and 8 columns): one per four elements, which keeps ahead of the stores.
 */
#ifndef FC_NN_TRANSPOSE512_H
#define FC_NN_TRANSPOSE512_H

FC_INLINE void transpose_vectors(__m512 *a) {
    __m512 b[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
        for (int k = 0; k < 2; k++) {
            const __m512d first = _mm512_castps_pd(b[i + k]), second = _mm512_castps_pd(b[i + k + 2]);
            a[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(first, second));
            a[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(first, second));
        }
    /* a[4 g + c] now holds, of vectors 4 g to 4 g + 3, the columns c, c + 4, c + 8 and c + 12. */
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++)
#pragma GCC unroll 2
        for (int g = 0; g < 2; g++) {
            b[8 * g + c] = _mm512_shuffle_f32x4(a[8 * g + c], a[8 * g + c + 4], 0x88);
            b[8 * g + c + 4] = _mm512_shuffle_f32x4(a[8 * g + c], a[8 * g + c + 4], 0xdd);
        }
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        a[c] = _mm512_shuffle_f32x4(b[c], b[8 + c], 0x88);
        a[c + 4] = _mm512_shuffle_f32x4(b[c + 4], b[12 + c], 0x88);
        a[c + 8] = _mm512_shuffle_f32x4(b[c], b[8 + c], 0xdd);
        a[c + 12] = _mm512_shuffle_f32x4(b[c + 4], b[12 + c], 0xdd);
    }
}

#endif
