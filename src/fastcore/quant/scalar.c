/* The reference: what each slot means, in the shortest code. */
#include <math.h>

#include "../fastcore.h"
#include "body.h"

static void range(const float *x, int64_t stride, int64_t n, float *low, float *high) {
    uint32_t lowest = 0x80000000;
    int32_t highest = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &x[i * stride], 4);
        lowest = bits > lowest ? bits : lowest;
        highest = (int32_t)bits > highest ? (int32_t)bits : highest;
    }
    memcpy(low, &lowest, 4);
    memcpy(high, &highest, 4);
}

static void range_f32_scalar(const float *x, int64_t n, float *low, float *high) { range(x, 1, n, low, high); }

static void range_lanes_f32_scalar(const float *x, int64_t stride, int64_t columns, int64_t k, float *low, float *high) {
    for (int64_t c = 0; c < columns; c++) range(x + c, stride, k, low + c, high + c);
}

static void quantize_f32_s8_scalar(const float *x, int64_t n, float scale, int8_t *codes) {
    for (int64_t i = 0; i < n; i++) codes[i] = (int8_t)__builtin_rintf(x[i] / scale);
}

static uint8_t quantize(float x, float inverse, int32_t zero) {
    const float v = __builtin_rintf(x * inverse);
    if (v != v) return 0;
    const int32_t q = (int32_t)v + zero;
    return (uint8_t)(q < 0 ? 0 : q > 255 ? 255 : q);
}

static void quantize_rows_f32_u8_scalar(const float *x, int64_t stride, int64_t rows, int64_t k, const float *inverse,
                                        const int32_t *zeros, uint8_t *out, int64_t out_stride) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < (k + 3) / 4 * 4; i++)
            out[(i / 4 * out_stride + r) * 4 + i % 4] = quantize(i < k ? x[r * stride + i] : 0.0f, inverse[r], zeros[r]);
}

static void quantize_lanes_f32_u8_scalar(const float *x, int64_t stride, int64_t rows, int64_t k, const float *inverse,
                                         const int32_t *zeros, uint8_t *out, int64_t out_stride) {
    for (int64_t i = 0; i < (k + 3) / 4 * 4; i++)
        for (int64_t r = 0; r < rows; r++)
            out[(i / 4 * out_stride + r) * 4 + i % 4] = quantize(i < k ? x[i * stride + r] : 0.0f, inverse[r], zeros[r]);
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
    float v[FC_INT8_ROWS][FC_INT8_COLUMNS];
    for (int r = 0; r < t->rows; r++) {
        uint32_t acc[FC_INT8_COLUMNS];
        for (int j = 0; j < FC_INT8_COLUMNS; j++) acc[j] = (uint32_t)t->zeros[r] * (uint32_t)t->minus_sum[j];
        accumulate(t, r, acc);
        for (int j = 0; j < FC_INT8_COLUMNS; j++)
            v[r][j] = (float)(int32_t)acc[j] * (t->scales[r] * t->weight_scale[j]) + t->bias[j];
    }
    finish_tile(t, v);
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
    FC_INSTALL(table, range_f32, scalar);
    FC_INSTALL(table, range_lanes_f32, scalar);
    FC_INSTALL(table, quantize_f32_s8, scalar);
    FC_INSTALL(table, quantize_rows_f32_u8, scalar);
    FC_INSTALL(table, quantize_lanes_f32_u8, scalar);
    FC_INSTALL(table, linear_u8_s8_f32, scalar);
    FC_INSTALL(table, quantize_static_rows_f32_u8, scalar);
    FC_INSTALL(table, quantize_static_lanes_f32_u8, scalar);
}
