/* The sparse reference: the shortest code that states what each slot computes. */
#include "body.h"

static uint32_t magnitude(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x7fffffffu;
}

static void count_magnitudes_f32_scalar(const float *x, int64_t n, uint32_t low, int shift, int64_t buckets,
                                        fc_magnitude_counts *counts) {
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = magnitude(x[i]);
        counts->nan += bits > 0x7f800000u;
        counts->below += bits < low;
        if (bits >= low && (bits - low) >> shift < buckets) counts->buckets[(bits - low) >> shift]++;
    }
}

static int64_t mask_magnitudes_f32_scalar(const float *x, int64_t n, uint32_t threshold, int64_t drop, uint8_t *mask) {
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = magnitude(x[i]);
        const int dropped = bits == threshold && drop > 0;
        mask[i] = bits >= threshold && !dropped;
        drop -= dropped;
    }
    return drop;
}

static void sum_block_squares_f32_scalar(const float *weight, int64_t columns, int64_t block_rows, int64_t block_cols,
                                         float *out) {
    sum_block_squares(weight, columns, block_rows, block_cols, out);
}

static void multiply_blocks_f32_scalar(const fc_blocks_tile *t) {
    const int64_t r = t->block_rows, c = t->block_cols;
    for (int64_t row = 0; row < t->groups * r; row++) {
        float *sum = (float *)t->sum + row * t->width;
        for (int64_t i = 0; i < t->width && t->first; i++) sum[i] = 0.0f;
        for (int64_t b = t->begin[row / r]; b < t->end[row / r]; b++)
            for (int64_t j = 0; j < c; j++) {
                const float w = ((const float *)t->values)[(b * r + row % r) * c + j];
                const float *x = (const float *)t->panel + ((t->index[b] - t->base) * c + j) * t->stride;
                for (int64_t i = 0; i < t->width; i++) sum[i] = fc_fma(w, x[i], sum[i]);
            }
    }
}

static void multiply_blocks_u8_s8_scalar(const fc_blocks_tile *t) {
    const int64_t r = t->block_rows;
    for (int64_t row = 0; row < t->groups * r; row++) {
        uint32_t *sum = (uint32_t *)t->sum + row * t->width;
        for (int64_t i = 0; i < t->width && t->first; i++) sum[i] = -(uint32_t)t->zeros[i] * (uint32_t)t->sums[row];
        for (int64_t b = t->begin[row / r]; b < t->end[row / r]; b++) {
            const int8_t *w = (const int8_t *)t->values + (b * r + row % r) * 4;
            const uint8_t *x = (const uint8_t *)t->panel + (t->index[b] - t->base) * t->stride * 4;
            for (int64_t i = 0; i < t->width; i++)
                for (int64_t j = 0; j < 4; j++) sum[i] += (uint32_t)(x[i * 4 + j] * w[j]);
        }
    }
}

static void finish_lanes_f32_scalar(const fc_lanes_epilogue *epilogue) { finish_lanes(epilogue, 0); }
static void finish_lanes_s32_scalar(const fc_lanes_epilogue *epilogue) { finish_lanes(epilogue, 1); }

void fc_sparse_install_scalar(fc_table *table) {
    FC_INSTALL(table, count_magnitudes_f32, scalar);
    FC_INSTALL(table, mask_magnitudes_f32, scalar);
    FC_INSTALL(table, sum_block_squares_f32, scalar);
    FC_INSTALL(table, multiply_blocks_f32, scalar);
    FC_INSTALL(table, multiply_blocks_u8_s8, scalar);
    FC_INSTALL(table, finish_lanes_f32, scalar);
    FC_INSTALL(table, finish_lanes_s32, scalar);
}
