/* The sparse reference: the shortest code that states what each slot computes. */
#include "body.h"

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
    FC_INSTALL(table, multiply_blocks_f32, scalar);
    FC_INSTALL(table, multiply_blocks_u8_s8, scalar);
    FC_INSTALL(table, finish_lanes_f32, scalar);
    FC_INSTALL(table, finish_lanes_s32, scalar);
}
