/* Weighted sum of up to eight vectors, as in avx512.c: 16 elements (one cache line, two registers) from every input, the whole
 * tree in registers, one line stored. Bound by DRAM. Four double accumulators hold the 16 lanes of squares.
 */
#include "../fastcore.h"
#include "body.h"

#ifdef FC_X86
/* Cache lines of every input between one batch of stores and the next. A load whose address agrees in the low 12 bits with a
 * store in flight waits for it, and vectors of one size share those bits: with single lines that doubled the time of a copy. */
enum { LINES = 4 };

FC_TARGET_AVX2

FC_INLINE __m256 vector_product(const float *const *inputs, const __m256 *weights, int j, int64_t i) {
    return _mm256_mul_ps(weights[j], _mm256_loadu_ps(inputs[j] + i));
}

/* The tree over `count` (1 to 4) inputs from `first`. */
FC_INLINE __m256 vector_tree_of_four(const float *const *inputs, const __m256 *weights, int first, int count, int64_t i) {
    __m256 sum = vector_product(inputs, weights, first, i);
    if (count > 1) sum = _mm256_add_ps(sum, vector_product(inputs, weights, first + 1, i));
    if (count == 3) sum = _mm256_add_ps(sum, vector_product(inputs, weights, first + 2, i));
    if (count == 4) {
        const __m256 right = vector_product(inputs, weights, first + 2, i);
        sum = _mm256_add_ps(sum, _mm256_add_ps(right, vector_product(inputs, weights, first + 3, i)));
    }
    return sum;
}

FC_INLINE __m256 vector_tree(const float *const *inputs, const __m256 *weights, int count, int64_t i) {
    if (count <= 4) return vector_tree_of_four(inputs, weights, 0, count, i);
    const __m256 left = vector_tree_of_four(inputs, weights, 0, 4, i);
    return _mm256_add_ps(left, vector_tree_of_four(inputs, weights, 4, count - 4, i));
}

FC_INLINE void add_squares(__m256 x, __m256d *low, __m256d *high) {
    const __m256d a = _mm256_cvtps_pd(_mm256_castps256_ps128(x)), b = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
    *low = _mm256_fmadd_pd(a, a, *low);
    *high = _mm256_fmadd_pd(b, b, *high);
}

/* One `lines` * 16 elements: all loads, then all stores. `count`, `lines` and `stream` are constants in each caller. */
FC_INLINE void sum_lines(const int count, const int lines, const int stream, const float *const *inputs, const __m256 *weights,
                         int64_t i, float *out, __m256d *squares) {
    __m256 x[2 * LINES];
    for (int h = 0; h < 2 * lines; h++) x[h] = vector_tree(inputs, weights, count, i + 8 * h);
    for (int h = 0; h < 2 * lines; h++)
        stream ? _mm256_stream_ps(out + i + 8 * h, x[h]) : _mm256_storeu_ps(out + i + 8 * h, x[h]);
    for (int h = 0; h < 2 * lines; h++) add_squares(x[h], &squares[h % 2 * 2], &squares[h % 2 * 2 + 1]);
}

FC_INLINE int64_t sum_all_lines(const int count, const int stream, const float *const *inputs, const __m256 *weights, int64_t i,
                                int64_t length, float *out, __m256d *squares) {
    for (; i + 16 * LINES <= length; i += 16 * LINES) sum_lines(count, LINES, stream, inputs, weights, i, out, squares);
    for (; i + 16 <= length; i += 16) sum_lines(count, 1, stream, inputs, weights, i, out, squares);
    return i;
}

/* `count` is a constant in each caller. */
FC_INLINE void weighted_sum_of(const int count, const float *const *inputs, const float *weights, int64_t length, float *out,
                               int stream, double *squares) {
    __m256 w[FC_AGGREGATE_FAN];
    const float *in[FC_AGGREGATE_FAN];
    for (int j = 0; j < count; j++) w[j] = _mm256_set1_ps(weights[j]), in[j] = inputs[j];
    /* Up to the first aligned line of `out`; lane j of the accumulators then belongs to element lane (peel + j) % 16. */
    int64_t i = stream ? (int64_t)((64 - (uintptr_t)out % 64) / sizeof(float) % 16) : 0;
    if (i > length) i = length;
    const int64_t peel = i;
    sum_elements(inputs, weights, count, 0, peel, out, squares);
    double lanes[FC_AGGREGATE_LANES];
    for (int j = 0; j < 16; j++) lanes[j] = squares[(peel + j) % 16];
    __m256d s[4];
    for (int j = 0; j < 4; j++) s[j] = _mm256_loadu_pd(lanes + 4 * j);
    if (stream) {
        i = sum_all_lines(count, 1, in, w, i, length, out, s);
        _mm_sfence();
    } else {
        i = sum_all_lines(count, 0, in, w, i, length, out, s);
    }
    for (int j = 0; j < 4; j++) _mm256_storeu_pd(lanes + 4 * j, s[j]);
    for (int j = 0; j < 16; j++) squares[(peel + j) % 16] = lanes[j];
    sum_elements(inputs, weights, count, i, length, out, squares);
}

static void weighted_sum_f32_avx2(const float *const *inputs, const float *weights, int count, int64_t length, float *out,
                                  int stream, double *squares) {
    switch (count) {
    case 1: weighted_sum_of(1, inputs, weights, length, out, stream, squares); break;
    case 2: weighted_sum_of(2, inputs, weights, length, out, stream, squares); break;
    case 3: weighted_sum_of(3, inputs, weights, length, out, stream, squares); break;
    case 4: weighted_sum_of(4, inputs, weights, length, out, stream, squares); break;
    case 5: weighted_sum_of(5, inputs, weights, length, out, stream, squares); break;
    case 6: weighted_sum_of(6, inputs, weights, length, out, stream, squares); break;
    case 7: weighted_sum_of(7, inputs, weights, length, out, stream, squares); break;
    default: weighted_sum_of(8, inputs, weights, length, out, stream, squares); break;
    }
}

static void sum_of_squares_f32_avx2(const float *x, int64_t length, double *squares) {
    __m256d s0 = _mm256_loadu_pd(squares), s1 = _mm256_loadu_pd(squares + 4);
    __m256d s2 = _mm256_loadu_pd(squares + 8), s3 = _mm256_loadu_pd(squares + 12);
    int64_t i = 0;
    for (; i + 16 <= length; i += 16) {
        add_squares(_mm256_loadu_ps(x + i), &s0, &s1);
        add_squares(_mm256_loadu_ps(x + i + 8), &s2, &s3);
    }
    _mm256_storeu_pd(squares, s0);
    _mm256_storeu_pd(squares + 4, s1);
    _mm256_storeu_pd(squares + 8, s2);
    _mm256_storeu_pd(squares + 12, s3);
    for (; i < length; i++) squares[i % FC_AGGREGATE_LANES] += (double)x[i] * x[i];
}

static void step_sgd_f32_avx2(float *params, const float *grads, int64_t length, const fc_sgd *sgd) {
    step_sgd_body(params, grads, length, sgd);
}

static void step_momentum_f32_avx2(float *params, const float *grads, float *velocity, int64_t length,
                                   const fc_momentum *momentum) {
    step_momentum_body(params, grads, velocity, length, momentum);
}

static void step_adam_f32_avx2(float *params, const float *grads, float *first, float *second, int64_t length,
                               const fc_adam *adam) {
    step_adam_body(params, grads, first, second, length, adam);
}

FC_TARGET_END

void fc_aggregate_install_avx2(fc_table *table) {
    FC_INSTALL(table, weighted_sum_f32, avx2);
    FC_INSTALL(table, sum_of_squares_f32, avx2);
    FC_INSTALL(table, step_sgd_f32, avx2);
    FC_INSTALL(table, step_momentum_f32, avx2);
    FC_INSTALL(table, step_adam_f32, avx2);
}
#endif
