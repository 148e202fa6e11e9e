/* AVX2 and FMA: a register tile of 6 rows x 16 columns (12 accumulators), two of them side by side in a panel of keys.
 *
 * The left factors are broadcast from where they lie, addressed from two pointers and two strides. Bound by the two FMA ports:
 * per step 12 vfmadd231ps against 2 vector loads and 6 broadcasts. Rows are folded in the 16 lanes of the other variants.
 */
#include "../fastcore.h"
#include "body.h"

#ifdef FC_X86
FC_TARGET_AVX2

enum { MR = 6, NR = 16, LANES = 8 };

FC_INLINE __m256i first_lanes(int64_t n) {
    const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n >= LANES ? LANES : (int)n), index);
}

FC_INLINE __m256 load(const float *x, const int whole, __m256i lanes) {
    return whole ? _mm256_loadu_ps(x) : _mm256_maskload_ps(x, lanes);
}

FC_INLINE void store(float *x, const int whole, __m256i lanes, __m256 value) {
    if (whole)
        _mm256_storeu_ps(x, value);
    else
        _mm256_maskstore_ps(x, lanes, value);
}

/* One tile of rows x vectors; `whole` says that all lanes of the last vector exist. */
FC_INLINE void tile(const int rows, const int vectors, const int whole, const fc_attention_product *p, const float *a,
                    const float *b, float *c, const float *gain, __m256i last) {
    __m256 sum[MR][2];
    const int64_t stride = p->a_row, step = p->a_step, b_step = p->b_step;
    const float *a0 = a, *a3 = a + 3 * stride;
    float *row = c;
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++, row += p->c_stride)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++)
            sum[i][v] = p->accumulate ? load(row + v * LANES, whole || v + 1 < vectors, last) : _mm256_setzero_ps();
    for (int64_t d = p->depth; d > 0; d--, b += b_step) {
        __m256 column[2];
        /* Opaque, or the compiler carries six row pointers. */
        __asm__("" : "+r"(a0), "+r"(a3));
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) column[v] = load(b + v * LANES, whole || v + 1 < vectors, last);
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) {
            const __m256 factor = _mm256_broadcast_ss(i < 3 ? a0 + i * stride : a3 + (i - 3) * stride);
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) sum[i][v] = _mm256_fmadd_ps(factor, column[v], sum[i][v]);
        }
        a0 += step, a3 += step;
    }
    row = c;
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++, row += p->c_stride)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            const __m256 value = gain ? _mm256_mul_ps(_mm256_broadcast_ss(gain + i), sum[i][v]) : sum[i][v];
            store(row + v * LANES, whole || v + 1 < vectors, last, value);
        }
}

FC_INLINE void tiles(const int rows, const fc_attention_product *p, int64_t i) {
    const float *a = p->a + i * p->a_row, *gain = p->gain ? p->gain + i : NULL;
    float *c = p->c + i * p->c_stride;
    for (int64_t j = 0; j < p->cols; j += NR) {
        const float *b = p->b + j / FC_ATTENTION_PANEL * p->b_panel + j % FC_ATTENTION_PANEL;
        const int64_t left = p->cols - j;
        if (left >= NR)
            tile(rows, 2, 1, p, a, b, c + j, gain, _mm256_setzero_si256());
        else if (left > LANES)
            tile(rows, 2, 0, p, a, b, c + j, gain, first_lanes(left - LANES));
        else
            tile(rows, 1, 0, p, a, b, c + j, gain, first_lanes(left));
    }
}

static void attention_product_f32_avx2(const fc_attention_product *p) {
    const int64_t count = (p->rows + MR - 1) / MR;
    for (int64_t t = 0; t < count; t++) {
        const int64_t i = p->rows * t / count, end = p->rows * (t + 1) / count;
        switch (end - i) {
        case 1: tiles(1, p, i); break;
        case 2: tiles(2, p, i); break;
        case 3: tiles(3, p, i); break;
        case 4: tiles(4, p, i); break;
        case 5: tiles(5, p, i); break;
        default: tiles(6, p, i); break;
        }
    }
}

/* Eight rows of four columns, transposed in two rounds of shuffles, for the loads place rows 4 apart side by side. */
FC_INLINE void transpose8x4(const float *in, int64_t stride, float *out) {
    __m256 x[4];
    for (int r = 0; r < 4; r++)
        x[r] =
            _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(in + r * stride)), _mm_loadu_ps(in + (r + 4) * stride), 1);
    const __m256 t0 = _mm256_unpacklo_ps(x[0], x[1]), t1 = _mm256_unpackhi_ps(x[0], x[1]);
    const __m256 t2 = _mm256_unpacklo_ps(x[2], x[3]), t3 = _mm256_unpackhi_ps(x[2], x[3]);
    _mm256_storeu_ps(out, _mm256_shuffle_ps(t0, t2, 0x44));
    _mm256_storeu_ps(out + FC_ATTENTION_PANEL, _mm256_shuffle_ps(t0, t2, 0xee));
    _mm256_storeu_ps(out + 2 * FC_ATTENTION_PANEL, _mm256_shuffle_ps(t1, t3, 0x44));
    _mm256_storeu_ps(out + 3 * FC_ATTENTION_PANEL, _mm256_shuffle_ps(t1, t3, 0xee));
}

static void attention_panels_f32_avx2(const float *keys, int64_t stride, int64_t count, int64_t width, float *panels) {
    for (int64_t j = 0; j < count; j += FC_ATTENTION_PANEL, panels += FC_ATTENTION_PANEL * width)
        for (int64_t i = 0; i < FC_ATTENTION_PANEL; i += LANES) {
            const float *in = keys + (j + i) * stride;
            float *out = panels + i;
            int64_t d = 0;
            if (j + i + LANES <= count)
                for (; d + 4 <= width; d += 4) transpose8x4(in + d, stride, out + d * FC_ATTENTION_PANEL);
            for (; d < width; d++)
                for (int64_t l = 0; l < LANES; l++)
                    out[d * FC_ATTENTION_PANEL + l] = j + i + l < count ? in[l * stride + d] : 0.0f;
        }
}

/* fc_exp2 of eight numbers. */
FC_INLINE __m256 exp2_of(__m256 x) {
    const __m256 magic = _mm256_set1_ps(0x1.8p23f), z = _mm256_add_ps(x, magic), f = _mm256_sub_ps(x, _mm256_sub_ps(z, magic));
    __m256 p = _mm256_set1_ps(fc_exp2_terms[4]);
#pragma GCC unroll 4
    for (int t = 3; t >= 0; t--) p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(fc_exp2_terms[t]));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.0f));
    const __m256i bits = _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(z), 23));
    const __m256 kept = _mm256_cmp_ps(x, _mm256_set1_ps(-126.0f), _CMP_GE_OQ), nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    return _mm256_or_ps(_mm256_and_ps(kept, _mm256_castsi256_ps(bits)), _mm256_and_ps(nan, x));
}

FC_INLINE float fold_sum(__m256 low, __m256 high) {
    const __m256 a = _mm256_add_ps(low, high);
    const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)));
}

FC_INLINE float fold_maximum(__m256 x) {
    const __m128 b = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 c = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(c, _mm_shuffle_ps(c, c, 1)));
}

static void attention_softmax_f32_avx2(float *x, int64_t stride, int64_t rows, int64_t n, float factor, float *inverse) {
    const __m256 gain = _mm256_set1_ps(factor), bottom = _mm256_set1_ps(-__builtin_inff());
    const int64_t whole = n / LANES * LANES;
    const __m256i lanes = first_lanes(n - whole);
    const __m256 present = _mm256_castsi256_ps(lanes);
    for (int64_t i = 0; i < rows; i++, x += stride) {
        __m256 top = _mm256_blendv_ps(bottom, _mm256_maskload_ps(x + whole, lanes), present);
        for (int64_t j = 0; j < whole; j += LANES) top = _mm256_max_ps(_mm256_loadu_ps(x + j), top);
        const __m256 shift = _mm256_mul_ps(_mm256_set1_ps(fold_maximum(top)), gain);
        __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
        for (int64_t j = 0; j < whole; j += LANES) {
            const __m256 e = exp2_of(_mm256_fmsub_ps(_mm256_loadu_ps(x + j), gain, shift));
            _mm256_storeu_ps(x + j, e);
            if (j % (2 * LANES) == 0)
                sum[0] = _mm256_add_ps(sum[0], e);
            else
                sum[1] = _mm256_add_ps(sum[1], e);
        }
        const __m256 e = exp2_of(_mm256_fmsub_ps(_mm256_maskload_ps(x + whole, lanes), gain, shift));
        _mm256_maskstore_ps(x + whole, lanes, e);
        const int high = whole % (2 * LANES) != 0;
        sum[high] = _mm256_add_ps(sum[high], _mm256_and_ps(e, present));
        inverse[i] = 1.0f / fold_sum(sum[0], sum[1]);
    }
}

static void attention_softmax_grad_f32_avx2(float *p, float *dp, int64_t stride, int64_t rows, int64_t n, const float *inverse,
                                            float factor) {
    for (int64_t i = 0; i < rows; i++, p += stride, dp += stride) {
        const __m256 gain = _mm256_set1_ps(inverse[i]), scale = _mm256_set1_ps(factor);
        __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
        for (int64_t j = 0; j < n; j += LANES) {
            const __m256i lanes = first_lanes(n - j);
            const __m256 y = _mm256_mul_ps(_mm256_maskload_ps(p + j, lanes), gain);
            const int high = j % (2 * LANES) != 0;
            _mm256_maskstore_ps(p + j, lanes, y);
            sum[high] = _mm256_fmadd_ps(y, _mm256_maskload_ps(dp + j, lanes), sum[high]);
        }
        const __m256 mean = _mm256_set1_ps(fold_sum(sum[0], sum[1]));
        for (int64_t j = 0; j < n; j += LANES) {
            const __m256i lanes = first_lanes(n - j);
            const __m256 slope = _mm256_sub_ps(_mm256_maskload_ps(dp + j, lanes), mean);
            const __m256 y = _mm256_mul_ps(scale, _mm256_maskload_ps(p + j, lanes));
            _mm256_maskstore_ps(dp + j, lanes, _mm256_mul_ps(y, slope));
        }
    }
}

FC_TARGET_END

void fc_attention_install_avx2(fc_table *table) {
    FC_INSTALL(table, attention_product_f32, avx2);
    FC_INSTALL(table, attention_panels_f32, avx2);
    FC_INSTALL(table, attention_softmax_f32, avx2);
    FC_INSTALL(table, attention_softmax_grad_f32, avx2);
}
#endif
