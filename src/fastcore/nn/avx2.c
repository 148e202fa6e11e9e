/* AVX2: the shared bodies in vectors of 8, and a transpose of 8 x 8 tiles held in registers.
 *
 * A tile is eight loads of a row's half each from two rows (the insert rides on the load port), eight unpacks and eight
 * shuffles: one shuffle per four elements, so that the stores bind. Edges use the masked forms of the same loads and stores.
 */
#include "../fastcore.h"

#ifdef FC_X86

FC_TARGET_AVX2

FC_INLINE __m256i first_lanes(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

FC_INLINE void load_part(const float *x, int count, float fill, float *lanes) {
    for (int l = 0; l < 16; l += 8) {
        const __m256i mask = first_lanes(count - l);
        const __m256 loaded = count > l ? _mm256_maskload_ps(x + l, mask) : _mm256_setzero_ps();
        _mm256_storeu_ps(lanes + l, _mm256_blendv_ps(_mm256_set1_ps(fill), loaded, _mm256_castsi256_ps(mask)));
    }
}

FC_INLINE void store_part(float *x, int count, const float *lanes) {
    _mm256_maskstore_ps(x, first_lanes(count), _mm256_loadu_ps(lanes));
    if (count > 8) _mm256_maskstore_ps(x + 8, first_lanes(count - 8), _mm256_loadu_ps(lanes + 8));
}

#include "body.h"

static void activate_f32_avx2(fc_activation kind, const float *x, int64_t n, float *out) { activate_body(kind, x, n, out); }
static void activate_grad_f32_avx2(fc_activation kind, const float *dy, const float *x, int64_t n, float *dx) {
    activate_grad_body(kind, dy, x, n, dx);
}
static void add_f32_avx2(const float *a, const float *b, int64_t n, float *out) { add_body(a, b, n, out); }
static void multiply_f32_avx2(const float *a, const float *b, int64_t n, float *out) { multiply_body(a, b, n, out); }
static void scale_f32_avx2(const float *x, float factor, int64_t n, float *out) { scale_body(x, factor, n, out); }
static void scaled_difference_f32_avx2(const float *a, const float *b, float factor, int64_t n, float *out) {
    scaled_difference_body(a, b, factor, n, out);
}
static float squared_error_f32_avx2(const float *a, const float *b, int64_t n) { return squared_error_body(a, b, n); }
static void column_sum_f32_avx2(const float *x, int64_t rows, int64_t columns, int64_t stride, float *out) {
    column_sum_body(x, rows, columns, stride, out);
}
static void layer_norm_f32_avx2(const float *x, int64_t rows, int64_t n, const float *gamma, const float *beta, float epsilon,
                                float *out) {
    layer_norm_body(x, rows, n, gamma, beta, epsilon, out);
}
static void layer_norm_lanes_f32_avx2(const float *x, int64_t stride, int64_t rows, int64_t n, const float *gamma,
                                      const float *beta, float epsilon, float *out) {
    layer_norm_lanes_body(x, stride, rows, n, gamma, beta, epsilon, out);
}
static void layer_norm_grad_f32_avx2(const float *dy, const float *x, int64_t rows, int64_t n, const float *gamma, float epsilon,
                                     float *dx, float *stats) {
    layer_norm_grad_body(dy, x, rows, n, gamma, epsilon, dx, stats);
}
static void layer_norm_gamma_f32_avx2(const float *dy, const float *x, const float *stats, int64_t rows, int64_t columns,
                                      int64_t stride, float *dgamma) {
    layer_norm_gamma_body(dy, x, stats, rows, columns, stride, dgamma);
}
static void softmax_f32_avx2(const float *x, int64_t rows, int64_t n, float factor, float gain, float *out) {
    softmax_body(x, rows, n, factor, gain, out);
}
static void softmax_grad_f32_avx2(const float *dy, const float *y, int64_t rows, int64_t n, float *dx) {
    softmax_grad_body(dy, y, rows, n, dx);
}
static float exp_sum_f32_avx2(const float *x, int64_t n, float *maximum) { return exp_sum_body(x, n, maximum); }
static void distillation_f32_avx2(const float *x, const float *teacher, int64_t n, float factor, float sums[3]) {
    distillation_body(x, teacher, n, factor, sums);
}
static void distillation_grad_f32_avx2(const float *x, const float *teacher, int64_t n, float factor, float soft, float hard,
                                       float *out) {
    distillation_grad_body(x, teacher, n, factor, soft, hard, out);
}

FC_INLINE __m256 load_half(const float *row, int count) {
    return count >= 4 ? _mm256_castps128_ps256(_mm_loadu_ps(row)) : _mm256_maskload_ps(row, first_lanes(count));
}

/* The first four of `columns` columns from row `i` and from row `i + 4`, side by side. */
FC_INLINE __m256 load_pair(const float *x, int64_t stride, int i, int rows, int columns) {
    const __m256 low = i < rows && columns > 0 ? load_half(x + i * stride, columns) : _mm256_setzero_ps();
    const __m256 top = i + 4 < rows && columns > 0 ? load_half(x + (i + 4) * stride, columns) : _mm256_setzero_ps();
    return _mm256_insertf128_ps(low, _mm256_castps256_ps128(top), 1);
}

/* Rows and columns of the tile, 1 to 8 each; constants where the tile is whole. */
FC_INLINE void transpose_tile(const float *x, int64_t x_stride, int rows, int columns, float *out, int64_t out_stride) {
    const __m256i high = first_lanes(rows);
    for (int half = 0; half < 8; half += 4) {
        __m256 a[4], b[4], line[4];
        for (int i = 0; i < 4; i++) a[i] = load_pair(x + half, x_stride, i, rows, columns - half);
        for (int i = 0; i < 4; i += 2) {
            b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
            b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
        }
        for (int k = 0; k < 2; k++) {
            line[2 * k] = _mm256_shuffle_ps(b[k], b[k + 2], 0x44);
            line[2 * k + 1] = _mm256_shuffle_ps(b[k], b[k + 2], 0xee);
        }
        for (int c = 0; c < 4; c++) {
            float *to = out + (half + c) * out_stride;
            if (rows == 8 && half + c < columns)
                _mm256_storeu_ps(to, line[c]);
            else if (half + c < columns)
                _mm256_maskstore_ps(to, high, line[c]);
        }
    }
}

static void transpose_f32_avx2(const float *x, int64_t x_stride, int64_t rows, int64_t columns, float *out, int64_t out_stride) {
    for (int64_t j = 0; j < columns; j += 8)
        for (int64_t i = 0; i < rows; i += 8) {
            const int64_t high = rows - i < 8 ? rows - i : 8, wide = columns - j < 8 ? columns - j : 8;
            const float *from = x + i * x_stride + j;
            float *to = out + j * out_stride + i;
            if (high == 8 && wide == 8)
                transpose_tile(from, x_stride, 8, 8, to, out_stride);
            else
                transpose_tile(from, x_stride, (int)high, (int)wide, to, out_stride);
        }
}

FC_TARGET_END

void fc_nn_install_avx2(fc_table *table) {
    FC_INSTALL(table, activate_f32, avx2);
    FC_INSTALL(table, activate_grad_f32, avx2);
    FC_INSTALL(table, add_f32, avx2);
    FC_INSTALL(table, multiply_f32, avx2);
    FC_INSTALL(table, scale_f32, avx2);
    FC_INSTALL(table, scaled_difference_f32, avx2);
    FC_INSTALL(table, squared_error_f32, avx2);
    FC_INSTALL(table, column_sum_f32, avx2);
    FC_INSTALL(table, layer_norm_f32, avx2);
    FC_INSTALL(table, layer_norm_lanes_f32, avx2);
    FC_INSTALL(table, layer_norm_grad_f32, avx2);
    FC_INSTALL(table, layer_norm_gamma_f32, avx2);
    FC_INSTALL(table, softmax_f32, avx2);
    FC_INSTALL(table, softmax_grad_f32, avx2);
    FC_INSTALL(table, exp_sum_f32, avx2);
    FC_INSTALL(table, distillation_f32, avx2);
    FC_INSTALL(table, distillation_grad_f32, avx2);
    FC_INSTALL(table, transpose_f32, avx2);
}

#endif
