/* Bodies that every target compiles for itself: elementwise code in plain C, which the compiler vectorises well, and the ends of
 * vectors. */
#ifndef FC_PRUNE_BODY_H
#define FC_PRUNE_BODY_H

#include "../fastcore.h"

FC_INLINE uint32_t magnitude(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x7fffffffu;
}

enum { FC_INFINITY = 0x7f800000 }; /* larger magnitudes are NaN */

FC_INLINE void collect_magnitudes(const float *x, int64_t n, uint32_t low, uint32_t width, fc_magnitude_members *members) {
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = magnitude(x[i]);
        members->nan += bits > FC_INFINITY;
        members->below += bits < low;
        if (bits - low >= width) continue;
        if (members->inside < members->capacity) members->member[members->inside] = bits;
        members->inside++;
    }
}

FC_INLINE int64_t mask_magnitudes(const float *x, int64_t n, uint32_t threshold, int64_t drop, uint8_t *mask) {
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = magnitude(x[i]);
        const int dropped = bits == threshold && drop > 0;
        mask[i] = bits >= threshold && !dropped;
        drop -= dropped;
    }
    return drop;
}

/* An element stays if fewer than `keep` of its group beat it: by magnitude, or as equals by coming later. */
FC_INLINE int mask_n_of_m(const float *x, int64_t n, int64_t keep, int64_t of, uint8_t *mask) {
    int nan = 0;
    for (int64_t group = 0; group < n; group += of)
        for (int64_t i = 0; i < of; i++) {
            const uint32_t bits = magnitude(x[group + i]);
            int64_t better = 0;
            for (int64_t j = 0; j < of; j++) better += magnitude(x[group + j]) >= bits + (j <= i);
            mask[group + i] = better < keep;
            nan |= bits > FC_INFINITY;
        }
    return nan;
}

FC_INLINE void add_squares(const float *restrict row, const float *restrict norms, int64_t columns, int64_t c, int first,
                           int scaled, float *restrict out) {
    for (int64_t j = 0; j < columns; j++) {
        const float *x = row + j * c, *by = norms + j * c;
        float sum;
        if (c == 4) {
            const float a = scaled ? x[0] * by[0] : x[0], b = scaled ? x[1] * by[1] : x[1];
            const float d = scaled ? x[2] * by[2] : x[2], e = scaled ? x[3] * by[3] : x[3];
            sum = (a * a + b * b) + (d * d + e * e);
        } else {
            sum = 0.0f;
            for (int64_t i = 0; i < c; i++) {
                const float a = scaled ? x[i] * by[i] : x[i];
                sum = i ? sum + a * a : a * a;
            }
        }
        out[j] = first ? sum : out[j] + sum;
    }
}

FC_INLINE void sum_block_squares_by(const float *weight, const float *norms, int64_t columns, int64_t rows, int64_t c, int scaled,
                                    float *out) {
    for (int64_t i = 0; i < rows; i++) {
        const float *row = weight + i * columns * c;
        if (c == 1)
            add_squares(row, norms, columns, 1, i == 0, scaled, out);
        else if (c == 4)
            add_squares(row, norms, columns, 4, i == 0, scaled, out);
        else
            add_squares(row, norms, columns, c, i == 0, scaled, out);
    }
}

FC_INLINE void sum_block_squares(const float *weight, const float *norms, int64_t columns, int64_t rows, int64_t c, float *out) {
    if (norms)
        sum_block_squares_by(weight, norms, columns, rows, c, 1, out);
    else
        sum_block_squares_by(weight, weight, columns, rows, c, 0, out);
}

FC_INLINE void scale_magnitudes(const float *restrict x, const float *restrict norms, int64_t n, float *restrict out) {
    for (int64_t i = 0; i < n; i++) out[i] = __builtin_fabsf(x[i] * norms[i]);
}

FC_INLINE void apply_mask_by(float *restrict x, const uint8_t *restrict mask, int64_t columns, int64_t c) {
    for (int64_t j = 0; j < columns; j++)
        for (int64_t i = 0; i < c; i++) x[j * c + i] = mask[j] ? x[j * c + i] : 0.0f;
}

FC_INLINE void apply_mask(float *x, const uint8_t *mask, int64_t columns, int64_t c) {
    if (c == 1)
        apply_mask_by(x, mask, columns, 1);
    else if (c == 4)
        apply_mask_by(x, mask, columns, 4);
    else
        apply_mask_by(x, mask, columns, c);
}

#endif
