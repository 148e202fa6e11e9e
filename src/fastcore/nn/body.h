/* The bodies of all nn kernels but the transpose: plain C that the compiler turns into vectors of each target's width.
 *
 * Every <isa>.c includes this inside its target region, after load_part and store_part. Elementwise loops are left to the
 * loop vectoriser. Reductions work on local arrays of 16 floats, which become one to four registers: with 16 lanes on every
 * ISA, folded in one tree, the results are equal bit for bit. Long rows are bound by memory, short ones by the latency of the
 * folds; exp costs some 13 cycles per 16 on a core with two 256-bit FMA pipes.
 */
#ifndef FC_NN_BODY_H
#define FC_NN_BODY_H

#include "../fastcore.h"

/* The next loop's iterations are independent even where its pointers are equal: without this an in-place call runs scalar. */
#if defined(__clang__)
#define FC_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define FC_INDEPENDENT _Pragma("GCC ivdep")
#endif

enum { LANES = 16 };

FC_INLINE float fold_sum(const float *lanes) {
    float a[8], b[4];
    for (int l = 0; l < 8; l++) a[l] = lanes[l] + lanes[l + 8];
    for (int l = 0; l < 4; l++) b[l] = a[l] + a[l + 4];
    return (b[0] + b[2]) + (b[1] + b[3]);
}

FC_INLINE float larger(float a, float b) { return a > b ? a : b; }

FC_INLINE float fold_maximum(const float *lanes) {
    float a[8], b[4];
    for (int l = 0; l < 8; l++) a[l] = larger(lanes[l], lanes[l + 8]);
    for (int l = 0; l < 4; l++) b[l] = larger(a[l], a[l + 4]);
    return larger(larger(b[0], b[2]), larger(b[1], b[3]));
}

/* lanes = the 16 floats at x, or the `left` < 16 that are there and `fill`. */
FC_INLINE void load_block(const float *x, int64_t left, float fill, float *lanes) {
    if (left >= LANES)
        for (int l = 0; l < LANES; l++) lanes[l] = x[l];
    else
        load_part(x, (int)left, fill, lanes);
}

FC_INLINE void store_block(float *x, int64_t left, const float *lanes) {
    if (left >= LANES)
        for (int l = 0; l < LANES; l++) x[l] = lanes[l];
    else
        store_part(x, (int)left, lanes);
}

/* ---- elementwise ---- */

FC_INLINE void activate_each(fc_activation kind, const float *x, int64_t n, float *out) {
    FC_INDEPENDENT
    for (int64_t i = 0; i < n; i++) out[i] = fc_activate(kind, x[i]);
}

/* A loop for each kind, so that the choice is made once. */
FC_INLINE void activate_body(fc_activation kind, const float *x, int64_t n, float *out) {
    switch (kind) {
    case FC_RELU: activate_each(FC_RELU, x, n, out); break;
    case FC_GELU: activate_each(FC_GELU, x, n, out); break;
    case FC_GELU_TANH: activate_each(FC_GELU_TANH, x, n, out); break;
    case FC_TANH: activate_each(FC_TANH, x, n, out); break;
    case FC_SIGMOID: activate_each(FC_SIGMOID, x, n, out); break;
    case FC_SILU: activate_each(FC_SILU, x, n, out); break;
    default: activate_each(FC_IDENTITY, x, n, out);
    }
}

FC_INLINE void activate_grad_each(fc_activation kind, const float *dy, const float *x, int64_t n, float *dx) {
    FC_INDEPENDENT
    for (int64_t i = 0; i < n; i++) dx[i] = dy[i] * fc_activate_derivative(kind, x[i]);
}

FC_INLINE void activate_grad_body(fc_activation kind, const float *dy, const float *x, int64_t n, float *dx) {
    switch (kind) {
    case FC_RELU: activate_grad_each(FC_RELU, dy, x, n, dx); break;
    case FC_GELU: activate_grad_each(FC_GELU, dy, x, n, dx); break;
    case FC_GELU_TANH: activate_grad_each(FC_GELU_TANH, dy, x, n, dx); break;
    case FC_TANH: activate_grad_each(FC_TANH, dy, x, n, dx); break;
    case FC_SIGMOID: activate_grad_each(FC_SIGMOID, dy, x, n, dx); break;
    case FC_SILU: activate_grad_each(FC_SILU, dy, x, n, dx); break;
    default: activate_grad_each(FC_IDENTITY, dy, x, n, dx);
    }
}

FC_INLINE void add_body(const float *a, const float *b, int64_t n, float *out) {
    FC_INDEPENDENT
    for (int64_t i = 0; i < n; i++) out[i] = a[i] + b[i];
}

FC_INLINE void multiply_body(const float *a, const float *b, int64_t n, float *out) {
    FC_INDEPENDENT
    for (int64_t i = 0; i < n; i++) out[i] = a[i] * b[i];
}

FC_INLINE void scale_body(const float *x, float factor, int64_t n, float *out) {
    FC_INDEPENDENT
    for (int64_t i = 0; i < n; i++) out[i] = factor * x[i];
}

FC_INLINE void scaled_difference_body(const float *a, const float *b, float factor, int64_t n, float *out) {
    FC_INDEPENDENT
    for (int64_t i = 0; i < n; i++) out[i] = factor * (a[i] - b[i]);
}

FC_INLINE float squared_error_body(const float *a, const float *b, int64_t n) {
    float sum[LANES] = {0};
    for (int64_t i = 0; i < n; i += LANES) {
        float u[LANES], v[LANES];
        load_block(a + i, n - i, 0.0f, u);
        load_block(b + i, n - i, 0.0f, v);
        for (int l = 0; l < LANES; l++) sum[l] = fc_fma(u[l] - v[l], u[l] - v[l], sum[l]);
    }
    return fold_sum(sum);
}

/* ---- sums over rows ---- */

FC_INLINE void column_sum_body(const float *x, int64_t rows, int64_t columns, int64_t stride, float *restrict out) {
    for (int64_t j = 0; j < columns; j++) out[j] = 0.0f;
    int64_t i = 0;
    for (; i + 8 <= rows; i += 8) {
        const float *r = x + i * stride;
        FC_INDEPENDENT
        for (int64_t j = 0; j < columns; j++)
            out[j] += ((r[j] + r[j + stride]) + (r[j + 2 * stride] + r[j + 3 * stride])) +
                      ((r[j + 4 * stride] + r[j + 5 * stride]) + (r[j + 6 * stride] + r[j + 7 * stride]));
    }
    for (; i < rows; i++) add_body(out, x + i * stride, columns, out);
}

FC_INLINE float times_normal(float dy, float x, const float *stats) { return dy * ((x - stats[0]) * stats[1]); }

FC_INLINE void layer_norm_gamma_body(const float *dy, const float *x, const float *stats, int64_t rows, int64_t columns,
                                     int64_t stride, float *restrict dgamma) {
    for (int64_t j = 0; j < columns; j++) dgamma[j] = 0.0f;
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) {
        const float *d = dy + i * stride, *r = x + i * stride, *s = stats + 2 * i;
        FC_INDEPENDENT
        for (int64_t j = 0; j < columns; j++)
            dgamma[j] += (times_normal(d[j], r[j], s) + times_normal(d[j + stride], r[j + stride], s + 2)) +
                         (times_normal(d[j + 2 * stride], r[j + 2 * stride], s + 4) +
                          times_normal(d[j + 3 * stride], r[j + 3 * stride], s + 6));
    }
    for (; i < rows; i++) {
        FC_INDEPENDENT
        for (int64_t j = 0; j < columns; j++) dgamma[j] += times_normal(dy[i * stride + j], x[i * stride + j], stats + 2 * i);
    }
}

/* ---- layer normalisation ---- */

/* The mean, then the mean square of what is left: two passes over a row that the first brought into L1. */
FC_INLINE void row_stats(const float *x, int64_t n, float epsilon, float *mean, float *inverse) {
    float sum[LANES] = {0}, square[LANES] = {0}, v[LANES];
    for (int64_t i = 0; i < n; i += LANES) {
        load_block(x + i, n - i, 0.0f, v);
        for (int l = 0; l < LANES; l++) sum[l] += v[l];
    }
    const float m = fold_sum(sum) / (float)n;
    for (int64_t i = 0; i < n; i += LANES) {
        load_block(x + i, n - i, m, v);
        for (int l = 0; l < LANES; l++) square[l] = fc_fma(v[l] - m, v[l] - m, square[l]);
    }
    *mean = m;
    *inverse = 1.0f / __builtin_sqrtf(fold_sum(square) / (float)n + epsilon);
}

FC_INLINE void layer_norm_body(const float *x, int64_t rows, int64_t n, const float *gamma, const float *beta, float epsilon,
                               float *out) {
    for (int64_t r = 0; r < rows; r++, x += n, out += n) {
        float mean, inverse;
        row_stats(x, n, epsilon, &mean, &inverse);
        FC_INDEPENDENT
        for (int64_t i = 0; i < n; i++) out[i] = fc_fma((x[i] - mean) * inverse, gamma ? gamma[i] : 1.0f, beta ? beta[i] : 0.0f);
    }
}

FC_INLINE void layer_norm_grad_body(const float *dy, const float *x, int64_t rows, int64_t n, const float *gamma, float epsilon,
                                    float *dx, float *stats) {
    for (int64_t r = 0; r < rows; r++, x += n, dy += n, dx += n) {
        float mean, inverse, sum[LANES] = {0}, dot[LANES] = {0}, g[LANES], v[LANES], w[LANES];
        row_stats(x, n, epsilon, &mean, &inverse);
        for (int64_t i = 0; i < n; i += LANES) {
            load_block(dy + i, n - i, 0.0f, g);
            load_block(x + i, n - i, mean, v);
            if (gamma) {
                load_block(gamma + i, n - i, 0.0f, w);
                for (int l = 0; l < LANES; l++) g[l] *= w[l];
            }
            for (int l = 0; l < LANES; l++) sum[l] += g[l];
            for (int l = 0; l < LANES; l++) dot[l] = fc_fma(g[l], (v[l] - mean) * inverse, dot[l]);
        }
        const float mean_g = fold_sum(sum) / (float)n, mean_dot = fold_sum(dot) / (float)n;
        FC_INDEPENDENT
        for (int64_t i = 0; i < n; i++) {
            const float gi = gamma ? dy[i] * gamma[i] : dy[i];
            dx[i] = inverse * fc_fma(-((x[i] - mean) * inverse), mean_dot, gi - mean_g);
        }
        if (stats) stats[2 * r] = mean, stats[2 * r + 1] = inverse;
    }
}

/* ---- softmax and what is built on it ---- */

/* NaN is passed over here; its exp makes the sum NaN. */
FC_INLINE float row_maximum(const float *x, int64_t n) {
    float top[LANES], v[LANES];
    for (int l = 0; l < LANES; l++) top[l] = -__builtin_inff();
    for (int64_t i = 0; i < n; i += LANES) {
        load_block(x + i, n - i, -__builtin_inff(), v);
        for (int l = 0; l < LANES; l++) top[l] = larger(v[l], top[l]);
    }
    return fold_maximum(top);
}

/* The sum of exp(factor * (x - shift)), which is stored too unless `out` is NULL. */
FC_INLINE float row_exp(const float *x, int64_t n, float shift, float factor, float *out) {
    float sum[LANES] = {0}, v[LANES];
    for (int64_t i = 0; i < n; i += LANES) {
        load_block(x + i, n - i, -__builtin_inff(), v);
        for (int l = 0; l < LANES; l++) v[l] = fc_exp(factor * (v[l] - shift));
        for (int l = 0; l < LANES; l++) sum[l] += v[l];
        if (out) store_block(out + i, n - i, v);
    }
    return fold_sum(sum);
}

FC_INLINE void softmax_body(const float *x, int64_t rows, int64_t n, float factor, float gain, float *out) {
    for (int64_t r = 0; r < rows; r++, x += n, out += n) {
        const float sum = row_exp(x, n, row_maximum(x, n), factor, out);
        scale_body(out, gain / sum, n, out);
    }
}

FC_INLINE void softmax_grad_body(const float *dy, const float *y, int64_t rows, int64_t n, float *dx) {
    for (int64_t r = 0; r < rows; r++, dy += n, y += n, dx += n) {
        float dot[LANES] = {0}, u[LANES], v[LANES];
        for (int64_t i = 0; i < n; i += LANES) {
            load_block(dy + i, n - i, 0.0f, u);
            load_block(y + i, n - i, 0.0f, v);
            for (int l = 0; l < LANES; l++) dot[l] = fc_fma(u[l], v[l], dot[l]);
        }
        const float total = fold_sum(dot);
        FC_INDEPENDENT
        for (int64_t i = 0; i < n; i++) dx[i] = y[i] * (dy[i] - total);
    }
}

FC_INLINE float exp_sum_body(const float *x, int64_t n, float *maximum) {
    *maximum = row_maximum(x, n);
    return row_exp(x, n, *maximum, 1.0f, (float *)0);
}

FC_INLINE void distillation_body(const float *x, const float *teacher, int64_t n, float factor, float *sums) {
    const float x_top = row_maximum(x, n), t_top = row_maximum(teacher, n);
    float x_sum[LANES] = {0}, t_sum[LANES] = {0}, cross[LANES] = {0}, s[LANES], t[LANES];
    for (int64_t i = 0; i < n; i += LANES) {
        load_block(x + i, n - i, -__builtin_inff(), s);
        load_block(teacher + i, n - i, -__builtin_inff(), t);
        for (int l = 0; l < LANES; l++) {
            const float a = factor * (t[l] - t_top), b = factor * (s[l] - x_top), e = fc_exp(a);
            x_sum[l] += fc_exp(b);
            t_sum[l] += e;
            cross[l] += e == 0.0f ? 0.0f : e * (a - b);
        }
    }
    sums[0] = fold_sum(x_sum);
    sums[1] = fold_sum(t_sum);
    sums[2] = fold_sum(cross);
}

FC_INLINE void distillation_grad_body(const float *x, const float *teacher, int64_t n, float factor, float soft, float hard,
                                      float *out) {
    const float x_top = row_maximum(x, n), t_top = row_maximum(teacher, n);
    const float x_gain = soft / row_exp(x, n, x_top, factor, (float *)0);
    const float t_gain = soft / row_exp(teacher, n, t_top, factor, (float *)0);
    const float hard_gain = hard / row_exp(x, n, x_top, 1.0f, (float *)0);
    FC_INDEPENDENT
    for (int64_t i = 0; i < n; i++) {
        const float s = x[i] - x_top, t = teacher[i] - t_top;
        const float pull = fc_fma(x_gain, fc_exp(factor * s), -(t_gain * fc_exp(factor * t)));
        out[i] = fc_fma(hard_gain, fc_exp(s), pull);
    }
}

#endif
