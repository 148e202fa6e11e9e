/* The bodies of all nn kernels but the transpose: plain C that the compiler turns into vectors of each target's width.
 *
 * Every <isa>.c includes this inside its target region, after load_part and store_part. Elementwise loops are left to the
 * loop vectoriser. Reductions work on local arrays of 16 floats, which become one to four registers: with 16 lanes on every
 * ISA, folded in one tree, the results are equal bit for bit. Long rows are bound by memory, short ones by the latency of the
 * folds; exp costs some 14 cycles per 16 on a core with two 256-bit FMA pipes.
 */
#ifndef FC_NN_BODY_H
#define FC_NN_BODY_H

#include "../fastcore.h"

/* The next loop's iterations are independent even where its pointers are equal: without this an in-place call runs scalar. */
#if defined(__clang__)
#define FC_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#define FC_LANES_AT_ONCE
#else
#define FC_LANES_AT_ONCE _Pragma("GCC unroll 1")
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

FC_INLINE void add_square(const float *a, const float *b, float *sum) {
    FC_LANES_AT_ONCE
    for (int l = 0; l < LANES; l++) sum[l] = fc_fma(a[l] - b[l], a[l] - b[l], sum[l]);
}

FC_INLINE float squared_error_body(const float *a, const float *b, int64_t n) {
    float sum[LANES] = {0}, u[LANES], v[LANES];
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) add_square(a + i, b + i, sum);
    if (i < n) {
        load_part(a + i, (int)(n - i), 0.0f, u);
        load_part(b + i, (int)(n - i), 0.0f, v);
        add_square(u, v, sum);
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
    for (; i + 2 <= rows; i += 2) {
        const float *d = dy + i * stride, *r = x + i * stride, *s = stats + 2 * i;
        FC_INDEPENDENT
        for (int64_t j = 0; j < columns; j++)
            dgamma[j] += times_normal(d[j], r[j], s) + times_normal(d[j + stride], r[j + stride], s + 2);
    }
    for (; i < rows; i++) {
        FC_INDEPENDENT
        for (int64_t j = 0; j < columns; j++) dgamma[j] += times_normal(dy[i * stride + j], x[i * stride + j], stats + 2 * i);
    }
}

/* ---- layer normalisation ---- */

FC_INLINE void add_value(const float *x, float *sum) {
    FC_LANES_AT_ONCE
    for (int l = 0; l < LANES; l++) sum[l] += x[l];
}

FC_INLINE void add_deviation(const float *x, float mean, float *sum) {
    FC_LANES_AT_ONCE
    for (int l = 0; l < LANES; l++) sum[l] = fc_fma(x[l] - mean, x[l] - mean, sum[l]);
}

/* The mean, then the mean square of what is left: two passes over a row that the first brought into L1. */
FC_INLINE void row_stats(const float *x, int64_t n, float epsilon, float *mean, float *inverse) {
    float sum[LANES] = {0}, square[LANES] = {0}, part[LANES];
    const int64_t whole = n / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) add_value(x + i, sum);
    if (whole < n) {
        load_part(x + whole, (int)(n - whole), 0.0f, part);
        add_value(part, sum);
    }
    const float m = fold_sum(sum) / (float)n;
    for (int64_t i = 0; i < whole; i += LANES) add_deviation(x + i, m, square);
    if (whole < n) {
        load_part(x + whole, (int)(n - whole), m, part);
        add_deviation(part, m, square);
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

/* fold_sum of each of 16 columns, whose lanes are sums[0] to sums[15]; the result replaces sums[0]. */
FC_INLINE void fold_columns(float sums[LANES][LANES]) {
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int l = 0; l < half; l++)
            for (int c = 0; c < LANES; c++) sums[l][c] += sums[l + half][c];
}

/* Rows in columns: the terms of each go to the lanes that they have in a row. */
FC_INLINE void layer_norm_lanes_body(const float *x, int64_t stride, int64_t rows, int64_t n, const float *gamma,
                                     const float *beta, float epsilon, float *out) {
    for (int64_t r = 0; r < rows; r += LANES) {
        const int live = rows - r < LANES ? (int)(rows - r) : LANES;
        float sums[LANES][LANES] = {{0}}, part[LANES], mean[LANES], inverse[LANES];
        for (int64_t i = 0; i < n; i++) {
            load_part(x + i * stride + r, live, 0.0f, part);
            add_value(part, sums[i % LANES]);
        }
        fold_columns(sums);
        for (int c = 0; c < LANES; c++) mean[c] = sums[0][c] / (float)n;
        memset(sums, 0, sizeof sums);
        for (int64_t i = 0; i < n; i++) {
            load_part(x + i * stride + r, live, 0.0f, part);
            for (int c = 0; c < LANES; c++) sums[i % LANES][c] = fc_fma(part[c] - mean[c], part[c] - mean[c], sums[i % LANES][c]);
        }
        fold_columns(sums);
        for (int c = 0; c < LANES; c++) inverse[c] = 1.0f / __builtin_sqrtf(sums[0][c] / (float)n + epsilon);
        for (int64_t i = 0; i < n; i++) {
            const float factor = gamma ? gamma[i] : 1.0f, shift = beta ? beta[i] : 0.0f;
            load_part(x + i * stride + r, live, 0.0f, part);
            for (int c = 0; c < LANES; c++) part[c] = fc_fma((part[c] - mean[c]) * inverse[c], factor, shift);
            store_part(out + i * stride + r, live, part);
        }
    }
}

/* sum += g and dot += g * (x - mean) * inverse, where g = dy * gamma. */
FC_INLINE void add_projections(const float *dy, const float *gamma, const float *x, float mean, float inverse, float *sum,
                               float *dot) {
    FC_LANES_AT_ONCE
    for (int l = 0; l < LANES; l++) {
        const float g = dy[l] * gamma[l];
        sum[l] += g;
        dot[l] = fc_fma(g, (x[l] - mean) * inverse, dot[l]);
    }
}

FC_INLINE void layer_norm_grad_body(const float *dy, const float *x, int64_t rows, int64_t n, const float *gamma, float epsilon,
                                    float *dx, float *stats) {
    const int64_t whole = n / LANES * LANES;
    const int left = (int)(n - whole);
    float ones[LANES], d[LANES], v[LANES], w[LANES];
    FC_LANES_AT_ONCE
    for (int l = 0; l < LANES; l++) ones[l] = w[l] = 1.0f;
    for (int64_t r = 0; r < rows; r++, x += n, dy += n, dx += n) {
        float mean, inverse, sum[LANES] = {0}, dot[LANES] = {0};
        row_stats(x, n, epsilon, &mean, &inverse);
        for (int64_t i = 0; i < whole; i += LANES)
            add_projections(dy + i, gamma ? gamma + i : ones, x + i, mean, inverse, sum, dot);
        if (left) {
            load_part(dy + whole, left, 0.0f, d);
            load_part(x + whole, left, mean, v);
            if (gamma) load_part(gamma + whole, left, 0.0f, w);
            add_projections(d, w, v, mean, inverse, sum, dot);
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

FC_INLINE void raise_to(const float *x, float *top) {
    FC_LANES_AT_ONCE
    for (int l = 0; l < LANES; l++) top[l] = larger(x[l], top[l]);
}

/* NaN is passed over here; its exp makes the sum NaN. */
FC_INLINE float row_maximum(const float *x, int64_t n) {
    float top[LANES], part[LANES];
    int64_t i = 0;
    FC_LANES_AT_ONCE
    for (int l = 0; l < LANES; l++) top[l] = -__builtin_inff();
    for (; i + LANES <= n; i += LANES) raise_to(x + i, top);
    if (i < n) {
        load_part(x + i, (int)(n - i), -__builtin_inff(), part);
        raise_to(part, top);
    }
    return fold_maximum(top);
}

FC_INLINE void add_exp(const float *x, float shift, float factor, float *sum, float *terms) {
    FC_LANES_AT_ONCE
    for (int l = 0; l < LANES; l++) terms[l] = fc_exp(factor * (x[l] - shift));
    FC_LANES_AT_ONCE
    for (int l = 0; l < LANES; l++) sum[l] += terms[l];
}

/* The sum of exp(factor * (x - shift)), whose terms are stored too unless `out` is NULL. */
FC_INLINE float row_exp(const float *x, int64_t n, float shift, float factor, float *out) {
    float sum[LANES] = {0}, part[LANES], terms[LANES];
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        add_exp(x + i, shift, factor, sum, terms);
        if (out) FC_LANES_AT_ONCE
        for (int l = 0; l < LANES; l++) out[i + l] = terms[l];
    }
    if (i < n) {
        load_part(x + i, (int)(n - i), -__builtin_inff(), part);
        add_exp(part, shift, factor, sum, terms);
        if (out) store_part(out + i, (int)(n - i), terms);
    }
    return fold_sum(sum);
}

FC_INLINE void softmax_body(const float *x, int64_t rows, int64_t n, float factor, float gain, float *out) {
    for (int64_t r = 0; r < rows; r++, x += n, out += n) {
        const float sum = row_exp(x, n, row_maximum(x, n), factor, out);
        scale_body(out, gain / sum, n, out);
    }
}

FC_INLINE void add_product(const float *a, const float *b, float *sum) {
    FC_LANES_AT_ONCE
    for (int l = 0; l < LANES; l++) sum[l] = fc_fma(a[l], b[l], sum[l]);
}

FC_INLINE void softmax_grad_body(const float *dy, const float *y, int64_t rows, int64_t n, float *dx) {
    for (int64_t r = 0; r < rows; r++, dy += n, y += n, dx += n) {
        float dot[LANES] = {0}, u[LANES], v[LANES];
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) add_product(dy + i, y + i, dot);
        if (i < n) {
            load_part(dy + i, (int)(n - i), 0.0f, u);
            load_part(y + i, (int)(n - i), 0.0f, v);
            add_product(u, v, dot);
        }
        const float total = fold_sum(dot);
        FC_INDEPENDENT
        for (int64_t j = 0; j < n; j++) dx[j] = y[j] * (dy[j] - total);
    }
}

FC_INLINE float exp_sum_body(const float *x, int64_t n, float *maximum) {
    *maximum = row_maximum(x, n);
    return row_exp(x, n, *maximum, 1.0f, (float *)0);
}

typedef struct tops {
    float x, teacher, factor;
} tops;

FC_INLINE void add_divergence(const float *x, const float *teacher, tops top, float *x_sum, float *t_sum, float *cross) {
    FC_LANES_AT_ONCE
    for (int l = 0; l < LANES; l++) {
        const float t = top.factor * (teacher[l] - top.teacher), s = top.factor * (x[l] - top.x), e = fc_exp(t);
        x_sum[l] += fc_exp(s);
        t_sum[l] += e;
        cross[l] += e == 0.0f ? 0.0f : e * (t - s);
    }
}

FC_INLINE void distillation_body(const float *x, const float *teacher, int64_t n, float factor, float *sums) {
    const tops top = {row_maximum(x, n), row_maximum(teacher, n), factor};
    float x_sum[LANES] = {0}, t_sum[LANES] = {0}, cross[LANES] = {0}, s[LANES], t[LANES];
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) add_divergence(x + i, teacher + i, top, x_sum, t_sum, cross);
    if (i < n) {
        load_part(x + i, (int)(n - i), -__builtin_inff(), s);
        load_part(teacher + i, (int)(n - i), -__builtin_inff(), t);
        add_divergence(s, t, top, x_sum, t_sum, cross);
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
