/* AVX-512 BF16: the tile of avx512.c with pairs for factors.
 *
 * Bound by vdpbf16ps, which does two steps of the depth at the price of one vfmadd231ps: exp, which stays in float32 with one
 * term less, weighs twice as much. Rows are rounded as they are packed, probabilities as they are stored, in place: a pair takes
 * one of the two words that it comes from. Keys become panels by a transpose of words in registers, values by interleaving.
 */
#include "../fastcore.h"

#ifdef FC_X86
FC_TARGET_AVX512BF16
#include "lanes512.h"

FC_INLINE __m512bh as_pairs(__m512i words) { return (__m512bh)words; }

/* One tile of rows x vectors; `last` says which lanes of the last vector exist. */
FC_INLINE void tile(const int rows, const int vectors, const fc_attention_product16 *p, const uint32_t *a, const uint32_t *b,
                    float *c, const float *gain, __mmask16 last) {
    __m512 sum[MR][2];
    const int64_t stride = p->a_row, stride3 = 3 * stride;
    const uint32_t *a0 = a, *a4 = a + QUAD * stride, *a8 = a + 2 * QUAD * stride;
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) sum[i][v] = _mm512_setzero_ps();
    for (int64_t d = p->depth; d > 0; d--, b += FC_ATTENTION_PANEL) {
        __m512bh column[2];
        /* Opaque, or the compiler carries twelve row pointers, on the stack. */
        __asm__("" : "+r"(a0), "+r"(a4), "+r"(a8));
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++)
            column[v] =
                as_pairs(v + 1 == vectors ? _mm512_maskz_loadu_epi32(last, b + v * LANES) : _mm512_loadu_si512(b + v * LANES));
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            const uint32_t *quad = i < QUAD ? a0 : i < 2 * QUAD ? a4 : a8;
            const int64_t at = i % QUAD == 3 ? stride3 : i % QUAD * stride;
            const __m512bh factor = as_pairs(_mm512_set1_epi32((int)quad[at]));
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], factor, column[v]);
        }
        a0++, a4++, a8++;
    }
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++, c += p->c_stride)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            const __m512 value = gain ? _mm512_mul_ps(_mm512_set1_ps(gain[i]), sum[i][v]) : sum[i][v];
            _mm512_mask_storeu_ps(c + v * LANES, v + 1 == vectors ? last : 0xffff, value);
        }
}

FC_INLINE void tiles(const int rows, const fc_attention_product16 *p, int64_t i) {
    const uint32_t *a = p->a + i * p->a_row, *b = p->b;
    const float *gain = p->gain ? p->gain + i : NULL;
    float *c = p->c + i * p->c_stride;
    int64_t left = p->cols;
    for (; left >= FC_ATTENTION_PANEL; left -= FC_ATTENTION_PANEL, b += p->b_panel, c += FC_ATTENTION_PANEL)
        tile(rows, 2, p, a, b, c, gain, 0xffff);
    if (left > LANES)
        tile(rows, 2, p, a, b, c, gain, first_lanes(left - LANES));
    else if (left > 0)
        tile(rows, 1, p, a, b, c, gain, first_lanes(left));
}

static void attention_product_bf16_avx512bf16(const fc_attention_product16 *p) {
    const int64_t count = (p->rows + MR - 1) / MR;
    for (int64_t t = 0; t < count; t++) {
        const int64_t i = p->rows * t / count, end = p->rows * (t + 1) / count;
        switch (end - i) {
        case 1: tiles(1, p, i); break;
        case 2: tiles(2, p, i); break;
        case 3: tiles(3, p, i); break;
        case 4: tiles(4, p, i); break;
        case 5: tiles(5, p, i); break;
        case 6: tiles(6, p, i); break;
        case 7: tiles(7, p, i); break;
        case 8: tiles(8, p, i); break;
        case 9: tiles(9, p, i); break;
        case 10: tiles(10, p, i); break;
        case 11: tiles(11, p, i); break;
        default: tiles(12, p, i); break;
        }
    }
}

/* Up to 32 numbers as 16 pairs. */
FC_INLINE __m512i round_pairs(const float *x, int64_t n) {
    if (n >= 2 * LANES) return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + LANES), _mm512_loadu_ps(x));
    const __m512 low = _mm512_maskz_loadu_ps(first_lanes(n), x);
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(first_lanes(n - LANES), x + LANES), low);
}

static void attention_round_bf16_avx512bf16(const float *x, int64_t stride, int64_t rows, int64_t width, uint32_t *out) {
    const int64_t pairs = (width + 1) / 2;
    for (int64_t i = 0; i < rows; i++, x += stride, out += pairs)
        for (int64_t d = 0; d < pairs; d += LANES)
            _mm512_mask_storeu_epi32(out + d, first_lanes(pairs - d), round_pairs(x + 2 * d, width - 2 * d));
}

/* Sixteen words of sixteen rows, transposed in four rounds of shuffles. */
FC_INLINE void transpose16(__m512i *x) {
    __m512i y[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
        for (int k = 0; k < 2; k++) {
            x[i + 2 * k] = _mm512_unpacklo_epi64(y[i + k], y[i + k + 2]);
            x[i + 2 * k + 1] = _mm512_unpackhi_epi64(y[i + k], y[i + k + 2]);
        }
    /* x[4 g + c] now holds, of rows 4 g to 4 g + 3, the columns c, c + 4, c + 8 and c + 12. */
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++)
#pragma GCC unroll 2
        for (int g = 0; g < 2; g++) {
            y[8 * g + c] = _mm512_shuffle_i32x4(x[8 * g + c], x[8 * g + c + 4], 0x88);
            y[8 * g + c + 4] = _mm512_shuffle_i32x4(x[8 * g + c], x[8 * g + c + 4], 0xdd);
        }
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++)
#pragma GCC unroll 4
        for (int q = 0; q < 4; q++) {
            const __m512i low = y[c + 4 * (q & 1)], top = y[8 + c + 4 * (q & 1)];
            x[c + 4 * q] = q < 2 ? _mm512_shuffle_i32x4(low, top, 0x88) : _mm512_shuffle_i32x4(low, top, 0xdd);
        }
}

static void attention_panels_bf16_avx512bf16(const float *keys, int64_t stride, int64_t count, int64_t width, uint32_t *panels) {
    const int64_t pairs = (width + 1) / 2;
    for (int64_t j = 0; j < count; j += LANES) {
        uint32_t *to = panels + j / FC_ATTENTION_PANEL * FC_ATTENTION_PANEL * pairs + j % FC_ATTENTION_PANEL;
        const int64_t rows = count - j < LANES ? count - j : LANES;
        for (int64_t d = 0; d < pairs; d += LANES) {
            const float *from = keys + j * stride + 2 * d;
            __m512i x[LANES];
#pragma GCC unroll 16
            for (int r = 0; r < LANES; r++) x[r] = round_pairs(from + (r < rows ? r : rows - 1) * stride, width - 2 * d);
            transpose16(x);
#pragma GCC unroll 16
            for (int c = 0; c < LANES; c++)
                if (d + c < pairs) _mm512_storeu_si512(to + (d + c) * FC_ATTENTION_PANEL, x[c]);
        }
    }
}

static void attention_columns_bf16_avx512bf16(const float *values, int64_t stride, int64_t count, int64_t width,
                                              uint32_t *panels) {
    uint16_t order[2 * LANES];
    for (int l = 0; l < 2 * LANES; l++) order[l] = (uint16_t)(l / 2 + l % 2 * LANES);
    const __m512i interleave = _mm512_loadu_si512(order);
    for (int64_t j = 0; j < width; j += FC_ATTENTION_PANEL) {
        const __mmask16 lanes[2] = {first_lanes(width - j), first_lanes(width - j - LANES)};
        for (int64_t d = 0; d < count; d += 2, panels += FC_ATTENTION_PANEL) {
            const float *row = values + d * stride + j;
#pragma GCC unroll 2
            for (int v = 0; v < 2; v++) {
                const __m512 first = _mm512_maskz_loadu_ps(lanes[v], row + v * LANES);
                const __m512 second = _mm512_maskz_loadu_ps(d + 1 < count ? lanes[v] : 0, row + stride + v * LANES);
                const __m512i pairs = (__m512i)_mm512_cvtne2ps_pbh(second, first);
                _mm512_storeu_si512(panels + v * LANES, _mm512_permutexvar_epi16(interleave, pairs));
            }
        }
    }
}

/* Weights of the present lanes of two vectors become 16 pairs; their sum is added to *sum. */
FC_INLINE __m512i weigh_pairs(__m512 low, __m512 high, __m512 top, __m512 gain, __mmask16 here, __mmask16 there, __m512 *sum) {
    const __m512 scaled[2] = {_mm512_mul_ps(_mm512_sub_ps(low, top), gain), _mm512_mul_ps(_mm512_sub_ps(high, top), gain)};
    const __m512 e = _mm512_maskz_mov_ps(here, exp2_of(scaled[0], fc_exp2_terms_bf16, 4));
    const __m512 f = _mm512_maskz_mov_ps(there, exp2_of(scaled[1], fc_exp2_terms_bf16, 4));
    *sum = _mm512_add_ps(*sum, _mm512_add_ps(e, f));
    return (__m512i)_mm512_cvtne2ps_pbh(f, e);
}

static void attention_softmax_bf16_avx512bf16(float *x, int64_t stride, int64_t rows, int64_t n, float factor, float *inverse) {
    const __m512 gain = _mm512_set1_ps(factor);
    const int64_t whole = n / (2 * LANES) * (2 * LANES), left = n - whole;
    const __mmask16 here = first_lanes(left), there = first_lanes(left - LANES), pairs = first_lanes((left + 1) / 2);
    for (int64_t i = 0; i < rows; i += GROUP, x += GROUP * stride) {
        const int group = rows - i < GROUP ? (int)(rows - i) : GROUP;
        float tops[GROUP];
        __m512 sums[GROUP];
        _mm512_storeu_ps(tops, row_maxima(x, stride, group, n));
        for (int r = 0; r < group; r++) {
            float *row = x + r * stride;
            const __m512 top = _mm512_set1_ps(tops[r]);
            __m512 sum = _mm512_setzero_ps();
            for (int64_t j = 0; j < whole; j += 2 * LANES) {
                const __m512 low = _mm512_loadu_ps(row + j), high = _mm512_loadu_ps(row + j + LANES);
                _mm512_storeu_si512(row + j / 2, weigh_pairs(low, high, top, gain, 0xffff, 0xffff, &sum));
            }
            if (left > 0) {
                const __m512 low = _mm512_maskz_loadu_ps(here, row + whole);
                const __m512 high = left > LANES ? _mm512_maskz_loadu_ps(there, row + whole + LANES) : low;
                _mm512_mask_storeu_epi32(row + whole / 2, pairs, weigh_pairs(low, high, top, gain, here, there, &sum));
            }
            sums[r] = sum;
        }
        store_inverse(sums, group, inverse + i);
    }
}

FC_TARGET_END

void fc_attention_install_avx512bf16(fc_table *table) {
    FC_INSTALL(table, attention_product_bf16, avx512bf16);
    FC_INSTALL(table, attention_round_bf16, avx512bf16);
    FC_INSTALL(table, attention_panels_bf16, avx512bf16);
    FC_INSTALL(table, attention_columns_bf16, avx512bf16);
    FC_INSTALL(table, attention_softmax_bf16, avx512bf16);
}
#endif
