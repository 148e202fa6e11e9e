/* The prune reference: the shortest code that states what each slot computes. */
#include "body.h"

static void count_magnitudes_f32_scalar(const float *x, int64_t n, uint32_t low, int shift, int64_t buckets,
                                        fc_magnitude_counts *counts) {
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = magnitude(x[i]);
        counts->nan += bits > FC_INFINITY;
        counts->below += bits < low;
        if (bits >= low && (bits - low) >> shift < buckets) counts->buckets[(bits - low) >> shift]++;
    }
}

static void collect_magnitudes_f32_scalar(const float *x, int64_t n, uint32_t low, uint32_t width,
                                          fc_magnitude_members *members) {
    collect_magnitudes(x, n, low, width, members);
}

static int64_t mask_magnitudes_f32_scalar(const float *x, int64_t n, uint32_t threshold, int64_t drop, uint8_t *mask) {
    return mask_magnitudes(x, n, threshold, drop, mask);
}

static int mask_n_of_m_f32_scalar(const float *x, int64_t n, int64_t keep, int64_t of, uint8_t *mask) {
    return mask_n_of_m(x, n, keep, of, mask);
}

static void sum_block_squares_f32_scalar(const float *weight, const float *norms, int64_t columns, int64_t block_rows,
                                         int64_t block_cols, float *out) {
    sum_block_squares(weight, norms, columns, block_rows, block_cols, out);
}

static void scale_magnitudes_f32_scalar(const float *x, const float *norms, int64_t n, float *out) {
    scale_magnitudes(x, norms, n, out);
}

static void apply_mask_f32_scalar(float *x, const uint8_t *mask, int64_t columns, int64_t block_cols) {
    apply_mask(x, mask, columns, block_cols);
}

void fc_prune_install_scalar(fc_table *table) {
    FC_INSTALL(table, count_magnitudes_f32, scalar);
    FC_INSTALL(table, collect_magnitudes_f32, scalar);
    FC_INSTALL(table, mask_magnitudes_f32, scalar);
    FC_INSTALL(table, mask_n_of_m_f32, scalar);
    FC_INSTALL(table, sum_block_squares_f32, scalar);
    FC_INSTALL(table, scale_magnitudes_f32, scalar);
    FC_INSTALL(table, apply_mask_f32, scalar);
}
