/* AVX-512: the shared bodies in vectors of 16, and a transpose of 16 x 16 tiles held in registers.
 * Edges use the masked forms of the same loads and stores.
 */
#include "../fastcore.h"

#ifdef FC_X86

FC_TARGET_AVX512

FC_INLINE __mmask16 first_lanes(int64_t count) { return count >= 16 ? 0xffff : (__mmask16)((1u << count) - 1u); }

FC_INLINE void load_part(const float *x, int count, float fill, float *lanes) {
    _mm512_storeu_ps(lanes, _mm512_mask_loadu_ps(_mm512_set1_ps(fill), first_lanes(count), x));
}

FC_INLINE void store_part(float *x, int count, const float *lanes) {
    _mm512_mask_storeu_ps(x, first_lanes(count), _mm512_loadu_ps(lanes));
}

#include "body.h"
#include "transpose512.h"

static void activate_f32_avx512(fc_activation kind, const float *x, int64_t n, float *out) { activate_body(kind, x, n, out); }
static void activate_grad_f32_avx512(fc_activation kind, const float *dy, const float *x, int64_t n, float *dx) {
    activate_grad_body(kind, dy, x, n, dx);
}
static void add_f32_avx512(const float *a, const float *b, int64_t n, float *out) { add_body(a, b, n, out); }
static void multiply_f32_avx512(const float *a, const float *b, int64_t n, float *out) { multiply_body(a, b, n, out); }
static void scale_f32_avx512(const float *x, float factor, int64_t n, float *out) { scale_body(x, factor, n, out); }
static void scaled_difference_f32_avx512(const float *a, const float *b, float factor, int64_t n, float *out) {
    scaled_difference_body(a, b, factor, n, out);
}
static float squared_error_f32_avx512(const float *a, const float *b, int64_t n) { return squared_error_body(a, b, n); }
static void column_sum_f32_avx512(const float *x, int64_t rows, int64_t columns, int64_t stride, float *out) {
    column_sum_body(x, rows, columns, stride, out);
}
static void layer_norm_f32_avx512(const float *x, int64_t rows, int64_t n, const float *gamma, const float *beta, float epsilon,
                                  float *out) {
    layer_norm_body(x, rows, n, gamma, beta, epsilon, out);
}
static void layer_norm_grad_f32_avx512(const float *dy, const float *x, int64_t rows, int64_t n, const float *gamma,
                                       float epsilon, float *dx, float *stats) {
    layer_norm_grad_body(dy, x, rows, n, gamma, epsilon, dx, stats);
}
static void layer_norm_gamma_f32_avx512(const float *dy, const float *x, const float *stats, int64_t rows, int64_t columns,
                                        int64_t stride, float *dgamma) {
    layer_norm_gamma_body(dy, x, stats, rows, columns, stride, dgamma);
}
static void softmax_f32_avx512(const float *x, int64_t rows, int64_t n, float factor, float gain, float *out) {
    softmax_body(x, rows, n, factor, gain, out);
}
static void softmax_grad_f32_avx512(const float *dy, const float *y, int64_t rows, int64_t n, float *dx) {
    softmax_grad_body(dy, y, rows, n, dx);
}
static float exp_sum_f32_avx512(const float *x, int64_t n, float *maximum) { return exp_sum_body(x, n, maximum); }
static void distillation_f32_avx512(const float *x, const float *teacher, int64_t n, float factor, float sums[3]) {
    distillation_body(x, teacher, n, factor, sums);
}
static void distillation_grad_f32_avx512(const float *x, const float *teacher, int64_t n, float factor, float soft, float hard,
                                         float *out) {
    distillation_grad_body(x, teacher, n, factor, soft, hard, out);
}

/* Fold 16 lanes of sums as fold_sum does. */
FC_INLINE __m512 fold_vectors(__m512 *sums) {
#pragma GCC unroll 4
    for (int half = 8; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int l = 0; l < half; l++) sums[l] = _mm512_add_ps(sums[l], sums[l + half]);
    return sums[0];
}

/* The sum down 16 columns of x, or of (x - mean)^2, each in the 16 lanes that it has along a row. */
FC_INLINE __m512 sum_down(const float *x, int64_t stride, int64_t n, __mmask16 live, const __m512 *mean) {
    __m512 sums[16];
#pragma GCC unroll 16
    for (int l = 0; l < 16; l++) sums[l] = _mm512_setzero_ps();
    int64_t i = 0;
    for (; i + 16 <= n; i += 16, x += 16 * stride)
#pragma GCC unroll 16
        for (int l = 0; l < 16; l++) {
            const __m512 v = _mm512_maskz_loadu_ps(live, x + l * stride);
            sums[l] =
                mean ? _mm512_fmadd_ps(_mm512_sub_ps(v, *mean), _mm512_sub_ps(v, *mean), sums[l]) : _mm512_add_ps(sums[l], v);
        }
#pragma GCC unroll 15
    for (int l = 0; l < 15; l++) {
        if (i + l >= n) break;
        const __m512 v = _mm512_maskz_loadu_ps(live, x + l * stride);
        sums[l] = mean ? _mm512_fmadd_ps(_mm512_sub_ps(v, *mean), _mm512_sub_ps(v, *mean), sums[l]) : _mm512_add_ps(sums[l], v);
    }
    return fold_vectors(sums);
}

static void layer_norm_lanes_f32_avx512(const float *x, int64_t stride, int64_t rows, int64_t n, const float *gamma,
                                        const float *beta, float epsilon, float *out) {
    const __m512 count = _mm512_set1_ps((float)n);
    for (int64_t r = 0; r < rows; r += 16) {
        const __mmask16 live = first_lanes(rows - r);
        const __m512 mean = _mm512_div_ps(sum_down(x + r, stride, n, live, NULL), count);
        const __m512 variance = _mm512_div_ps(sum_down(x + r, stride, n, live, &mean), count);
        const __m512 deviation = _mm512_sqrt_ps(_mm512_add_ps(variance, _mm512_set1_ps(epsilon)));
        const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.0f), deviation);
        for (int64_t i = 0; i < n; i++) {
            const __m512 v = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(live, x + i * stride + r), mean), inverse);
            const __m512 factor = _mm512_set1_ps(gamma ? gamma[i] : 1.0f), shift = _mm512_set1_ps(beta ? beta[i] : 0.0f);
            _mm512_mask_storeu_ps(out + i * stride + r, live, _mm512_fmadd_ps(v, factor, shift));
        }
    }
}

/* Rows and columns of the tile, 1 to 16 each; constants where the tile is whole. */
FC_INLINE void transpose_tile(const float *x, int64_t x_stride, int rows, int columns, float *out, int64_t out_stride) {
    __m512 a[16];
    const __mmask16 wide = first_lanes(columns), high = first_lanes(rows);
    for (int i = 0; i < 16; i++) a[i] = i < rows ? _mm512_maskz_loadu_ps(wide, x + i * x_stride) : _mm512_setzero_ps();
    transpose_vectors(a);
    for (int i = 0; i < 16; i++)
        if (i < columns) _mm512_mask_storeu_ps(out + i * out_stride, high, a[i]);
}

static void transpose_f32_avx512(const float *x, int64_t x_stride, int64_t rows, int64_t columns, float *out,
                                 int64_t out_stride) {
    for (int64_t j = 0; j < columns; j += 16)
        for (int64_t i = 0; i < rows; i += 16) {
            const int64_t high = rows - i < 16 ? rows - i : 16, wide = columns - j < 16 ? columns - j : 16;
            const float *from = x + i * x_stride + j;
            float *to = out + j * out_stride + i;
            if (high == 16 && wide == 16)
                transpose_tile(from, x_stride, 16, 16, to, out_stride);
            else
                transpose_tile(from, x_stride, (int)high, (int)wide, to, out_stride);
        }
}

FC_TARGET_END

void fc_nn_install_avx512(fc_table *table) {
    FC_INSTALL(table, activate_f32, avx512);
    FC_INSTALL(table, activate_grad_f32, avx512);
    FC_INSTALL(table, add_f32, avx512);
    FC_INSTALL(table, multiply_f32, avx512);
    FC_INSTALL(table, scale_f32, avx512);
    FC_INSTALL(table, scaled_difference_f32, avx512);
    FC_INSTALL(table, squared_error_f32, avx512);
    FC_INSTALL(table, column_sum_f32, avx512);
    FC_INSTALL(table, layer_norm_f32, avx512);
    FC_INSTALL(table, layer_norm_lanes_f32, avx512);
    FC_INSTALL(table, layer_norm_grad_f32, avx512);
    FC_INSTALL(table, layer_norm_gamma_f32, avx512);
    FC_INSTALL(table, softmax_f32, avx512);
    FC_INSTALL(table, softmax_grad_f32, avx512);
    FC_INSTALL(table, exp_sum_f32, avx512);
    FC_INSTALL(table, distillation_f32, avx512);
    FC_INSTALL(table, distillation_grad_f32, avx512);
    FC_INSTALL(table, transpose_f32, avx512);
}

#endif
