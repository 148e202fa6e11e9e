/* AVX-512: a register tile of 12 rows x 32 columns (24 accumulators) whose left factors are broadcast from where they lie.
 *
 * Twelve rows are addressed from three pointers and two strides, so that scores, probabilities and heads in place all serve
 * without a copy. Bound by the FMA port: per step 24 vfmadd231ps against 2 vector loads and 12 broadcasts. exp takes 9
 * instructions per 16 scores, two thirds of them on the same port: 64 FMAs per 16 scores at width 32, so a seventh of the time.
 */
#include "../fastcore.h"

#ifdef FC_X86
FC_TARGET_AVX512
#include "lanes512.h"

/* One tile of rows x vectors; `last` says which lanes of the last vector exist. */
FC_INLINE void tile(const int rows, const int vectors, const fc_attention_product *p, const float *a, const float *b, float *c,
                    const float *gain, __mmask16 last) {
    __m512 sum[MR][2];
    const int64_t stride = p->a_row, stride3 = 3 * stride, step = p->a_step, b_step = p->b_step;
    const float *a0 = a, *a4 = a + QUAD * stride, *a8 = a + 2 * QUAD * stride;
    float *row = c;
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++, row += p->c_stride)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++)
            sum[i][v] =
                p->accumulate ? _mm512_maskz_loadu_ps(v + 1 == vectors ? last : 0xffff, row + v * LANES) : _mm512_setzero_ps();
    for (int64_t d = p->depth; d > 0; d--, b += b_step) {
        __m512 column[2];
        /* Opaque, or the compiler carries twelve row pointers, on the stack. */
        __asm__("" : "+r"(a0), "+r"(a4), "+r"(a8));
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++)
            column[v] = v + 1 == vectors ? _mm512_maskz_loadu_ps(last, b + v * LANES) : _mm512_loadu_ps(b + v * LANES);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            const float *quad = i < QUAD ? a0 : i < 2 * QUAD ? a4 : a8;
            const int64_t at = i % QUAD == 3 ? stride3 : i % QUAD * stride;
            const __m512 factor = _mm512_set1_ps(quad[at]);
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) sum[i][v] = _mm512_fmadd_ps(factor, column[v], sum[i][v]);
        }
        a0 += step, a4 += step, a8 += step;
    }
    row = c;
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++, row += p->c_stride)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            const __m512 value = gain ? _mm512_mul_ps(_mm512_set1_ps(gain[i]), sum[i][v]) : sum[i][v];
            _mm512_mask_storeu_ps(row + v * LANES, v + 1 == vectors ? last : 0xffff, value);
        }
}

FC_INLINE void tiles(const int rows, const fc_attention_product *p, int64_t i) {
    const float *a = p->a + i * p->a_row, *b = p->b, *gain = p->gain ? p->gain + i : NULL;
    float *c = p->c + i * p->c_stride;
    int64_t left = p->cols;
    for (; left >= FC_ATTENTION_PANEL; left -= FC_ATTENTION_PANEL, b += p->b_panel, c += FC_ATTENTION_PANEL)
        tile(rows, 2, p, a, b, c, gain, 0xffff);
    if (left > LANES)
        tile(rows, 2, p, a, b, c, gain, first_lanes(left - LANES));
    else if (left > 0)
        tile(rows, 1, p, a, b, c, gain, first_lanes(left));
}

static void attention_product_f32_avx512(const fc_attention_product *p) {
    /* Tiles of even height: 16 rows are 8 and 8, for 4 rows cannot hide the latency of the sums. */
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

/* Sixteen rows of sixteen columns, transposed: the loads place four rows' quarters side by side, which leaves two rounds of
 * shuffles. Rows from `rows` on are zeros, columns from `columns` on are not stored. */
FC_INLINE void transpose16(const float *in, int64_t stride, int rows, int columns, float *out) {
    __m512 quarter[16];
    for (int c = 0; c < 4; c++) {
        const __mmask8 wide = (__mmask8)first_lanes(columns - 4 * c);
        for (int r = 0; r < 4; r++) {
            __m512 x = _mm512_setzero_ps();
            if (r < rows) x = _mm512_castps128_ps512(_mm_maskz_loadu_ps(wide, in + r * stride + 4 * c));
            if (r + 4 < rows) x = _mm512_insertf32x4(x, _mm_maskz_loadu_ps(wide, in + (r + 4) * stride + 4 * c), 1);
            if (r + 8 < rows) x = _mm512_insertf32x4(x, _mm_maskz_loadu_ps(wide, in + (r + 8) * stride + 4 * c), 2);
            if (r + 12 < rows) x = _mm512_insertf32x4(x, _mm_maskz_loadu_ps(wide, in + (r + 12) * stride + 4 * c), 3);
            quarter[4 * c + r] = x;
        }
    }
    for (int c = 0; c < 4; c++) {
        const __m512 *x = quarter + 4 * c;
        const __m512 t0 = _mm512_unpacklo_ps(x[0], x[1]), t1 = _mm512_unpackhi_ps(x[0], x[1]);
        const __m512 t2 = _mm512_unpacklo_ps(x[2], x[3]), t3 = _mm512_unpackhi_ps(x[2], x[3]);
        const __m512 line[4] = {_mm512_shuffle_ps(t0, t2, 0x44), _mm512_shuffle_ps(t0, t2, 0xee), _mm512_shuffle_ps(t1, t3, 0x44),
                                _mm512_shuffle_ps(t1, t3, 0xee)};
        for (int d = 0; d < 4; d++)
            if (4 * c + d < columns) _mm512_storeu_ps(out + (4 * c + d) * FC_ATTENTION_PANEL, line[d]);
    }
}

static void attention_panels_f32_avx512(const float *keys, int64_t stride, int64_t count, int64_t width, float *panels) {
    for (int64_t j = 0; j < count; j += FC_ATTENTION_PANEL, panels += FC_ATTENTION_PANEL * width)
        for (int half = 0; half < FC_ATTENTION_PANEL; half += LANES)
            for (int64_t d = 0; d < width && j + half < count; d += LANES) {
                const float *in = keys + (j + half) * stride + d;
                float *out = panels + d * FC_ATTENTION_PANEL + half;
                const int64_t rows = count - j - half, columns = width - d;
                if (rows >= LANES && columns >= LANES)
                    transpose16(in, stride, LANES, LANES, out);
                else
                    transpose16(in, stride, rows < LANES ? (int)rows : LANES, columns < LANES ? (int)columns : LANES, out);
            }
}

static void attention_softmax_f32_avx512(float *x, int64_t stride, int64_t rows, int64_t n, float factor, float *inverse) {
    const __m512 gain = _mm512_set1_ps(factor);
    const int64_t whole = (n - 1) / LANES * LANES;
    const __mmask16 last = first_lanes(n - whole);
    for (int64_t i = 0; i < rows; i += GROUP, x += GROUP * stride) {
        const int group = rows - i < GROUP ? (int)(rows - i) : GROUP;
        float tops[GROUP];
        __m512 sums[GROUP];
        _mm512_storeu_ps(tops, row_maxima(x, stride, group, n));
        for (int r = 0; r < group; r++) {
            float *row = x + r * stride;
            const __m512 down = _mm512_set1_ps(tops[r]);
            __m512 sum = _mm512_setzero_ps();
            for (int64_t j = 0; j < whole; j += LANES) {
                const __m512 e = exp2_of(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(row + j), down), gain), fc_exp2_terms, 5);
                _mm512_storeu_ps(row + j, e);
                sum = _mm512_add_ps(sum, e);
            }
            const __m512 e =
                exp2_of(_mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(last, row + whole), down), gain), fc_exp2_terms, 5);
            _mm512_mask_storeu_ps(row + whole, last, e);
            sums[r] = _mm512_mask_add_ps(sum, last, sum, e);
        }
        store_inverse(sums, group, inverse + i);
    }
}

static void attention_softmax_grad_f32_avx512(float *p, float *dp, int64_t stride, int64_t rows, int64_t n, const float *inverse,
                                              float factor) {
    for (int64_t i = 0; i < rows; i++, p += stride, dp += stride) {
        const __m512 gain = _mm512_set1_ps(inverse[i]), scale = _mm512_set1_ps(factor);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t j = 0; j < n; j += LANES) {
            const __mmask16 lanes = first_lanes(n - j);
            const __m512 y = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, p + j), gain);
            _mm512_mask_storeu_ps(p + j, lanes, y);
            sum = _mm512_fmadd_ps(y, _mm512_maskz_loadu_ps(lanes, dp + j), sum);
        }
        const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum));
        for (int64_t j = 0; j < n; j += LANES) {
            const __mmask16 lanes = first_lanes(n - j);
            const __m512 slope = _mm512_sub_ps(_mm512_maskz_loadu_ps(lanes, dp + j), mean);
            const __m512 y = _mm512_mul_ps(scale, _mm512_maskz_loadu_ps(lanes, p + j));
            _mm512_mask_storeu_ps(dp + j, lanes, _mm512_mul_ps(y, slope));
        }
    }
}

FC_TARGET_END

void fc_attention_install_avx512(fc_table *table) {
    FC_INSTALL(table, attention_product_f32, avx512);
    FC_INSTALL(table, attention_panels_f32, avx512);
    FC_INSTALL(table, attention_softmax_f32, avx512);
    FC_INSTALL(table, attention_softmax_grad_f32, avx512);
}
#endif
