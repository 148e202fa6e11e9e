/* The reference: what each slot means, in the shortest code. */
#include <math.h>

#include "../fastcore.h"
#include "body.h"

/* The bits of |x| order as integers: numbers, then infinity, then NaN. */
static uint32_t magnitude_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits & 0x7fffffff;
}

static float max_abs(const float *x, int64_t stride, int64_t n) {
    uint32_t max = 0;
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = magnitude_bits(x[i * stride]);
        max = bits > max ? bits : max;
    }
    float result;
    memcpy(&result, &max, 4);
    return result;
}

static float max_abs_f32_scalar(const float *x, int64_t n) { return max_abs(x, 1, n); }

static void max_abs_lanes_f32_scalar(const float *x, int64_t stride, int64_t columns, int64_t k, float *max) {
    for (int64_t c = 0; c < columns; c++) max[c] = max_abs(x + c, stride, k);
}

static void quantize_f32_s8_scalar(const float *x, int64_t n, float scale, int8_t *codes) {
    for (int64_t i = 0; i < n; i++) codes[i] = (int8_t)__builtin_rintf(x[i] / scale);
}

static uint8_t quantize(float x, float inverse) {
    const float v = __builtin_rintf(x * inverse);
    return v == v ? (uint8_t)((int)v + 128) : 0;
}

static void quantize_rows_f32_u8_scalar(const float *x, int64_t stride, int64_t rows, int64_t k, const float *inverse,
                                        uint8_t *out, int64_t out_stride) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < (k + 3) / 4 * 4; i++)
            out[(i / 4 * out_stride + r) * 4 + i % 4] = i < k ? quantize(x[r * stride + i], inverse[r]) : 128;
}

static void quantize_lanes_f32_u8_scalar(const float *x, int64_t stride, int64_t rows, int64_t k, const float *inverse,
                                         uint8_t *out, int64_t out_stride) {
    for (int64_t i = 0; i < (k + 3) / 4 * 4; i++)
        for (int64_t r = 0; r < rows; r++)
            out[(i / 4 * out_stride + r) * 4 + i % 4] = i < k ? quantize(x[i * stride + r], inverse[r]) : 128;
}

/* Unsigned, so that sums wrap. */
static void accumulate(const fc_int8_tile *t, int row, uint32_t *acc) {
    for (int64_t i = 0; i < t->k4; i++) {
        const uint8_t *a = t->codes + (i * t->rows + row) * 4;
        const int8_t *w = t->weight + i * FC_INT8_COLUMNS * 4;
        for (int j = 0; j < FC_INT8_COLUMNS; j++, w += 4)
            acc[j] += (uint32_t)(a[0] * w[0] + a[1] * w[1] + a[2] * w[2] + a[3] * w[3]);
    }
}

static void linear_u8_s8_f32_scalar(const fc_int8_tile *t) {
    for (int r = 0; r < t->rows; r++) {
        uint32_t acc[FC_INT8_COLUMNS] = {0};
        float v[FC_INT8_COLUMNS];
        accumulate(t, r, acc);
        for (int j = 0; j < FC_INT8_COLUMNS; j++) {
            const int32_t sum = (int32_t)(acc[j] - (uint32_t)t->correction[j]);
            v[j] = (float)sum * (t->scales[r] * t->weight_scale[j]) + t->bias[j];
        }
        finish_row(t, r, v);
    }
}

static void quantize_static_rows_f32_u8_scalar(const float *x, int64_t stride, int64_t rows, int64_t k, float scale,
                                               int zero_point, uint8_t *out, int64_t out_stride) {
    quantize_static_rows_body(x, stride, rows, k, scale, zero_point, out, out_stride);
}

static void quantize_static_lanes_f32_u8_scalar(const float *x, int64_t stride, int64_t rows, int64_t k, float scale,
                                                int zero_point, uint8_t *out, int64_t out_stride) {
    quantize_static_lanes_body(x, stride, rows, k, scale, zero_point, out, out_stride);
}

void fc_quant_install_scalar(fc_table *table) {
    FC_INSTALL(table, max_abs_f32, scalar);
    FC_INSTALL(table, max_abs_lanes_f32, scalar);
    FC_INSTALL(table, quantize_f32_s8, scalar);
    FC_INSTALL(table, quantize_rows_f32_u8, scalar);
    FC_INSTALL(table, quantize_lanes_f32_u8, scalar);
    FC_INSTALL(table, linear_u8_s8_f32, scalar);
    FC_INSTALL(table, quantize_static_rows_f32_u8, scalar);
    FC_INSTALL(table, quantize_static_lanes_f32_u8, scalar);
}
