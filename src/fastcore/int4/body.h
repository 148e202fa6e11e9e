/* What every instruction set shares: quantising in groups, which the compiler vectorises in each region, and the end of a tile.
 */
#ifndef FC_INT4_BODY_H
#define FC_INT4_BODY_H

#include <math.h>
#include <string.h>

#include "../quant/body.h"
#include "int4.h"

FC_INLINE int64_t group_length(int64_t k, int64_t group, int64_t first) { return k - first < group ? k - first : group; }

/* On the bits, so that infinity and NaN come out on top. */
FC_INLINE float largest_magnitude(const float *x, int64_t n) {
    int32_t most = 0;
    for (int64_t i = 0; i < n; i++) {
        int32_t bits;
        memcpy(&bits, &x[i], 4);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    float magnitude;
    memcpy(&magnitude, &most, 4);
    return magnitude;
}

/* `count` values to dwords `stride` apart; returns their sum. */
FC_INLINE int32_t quantize_piece(const float *x, int64_t count, float inverse, int8_t *codes, int64_t stride) {
    enum { PIECE = 128 };
    int8_t piece[PIECE];
    int32_t sum = 0;
    for (int64_t i = 0; i < count; i += PIECE) {
        const int64_t length = count - i < PIECE ? count - i : PIECE, padded = (length + 7) / 8 * 8;
        for (int64_t j = length; j < padded; j++) piece[j] = 0;
        for (int64_t j = 0; j < length; j++) {
            const int32_t code = (int32_t)__builtin_rintf(x[i + j] * inverse);
            sum += code;
            piece[j] = (int8_t)code;
        }
        if (stride == 1)
            memcpy(codes + i, piece, (size_t)padded);
        else
            for (int64_t j = 0; j < padded; j += 4) memcpy(codes + (i + j) * stride, piece + j, 4);
    }
    return sum;
}

FC_INLINE void quantize_groups_body(const float *x, int64_t k, int64_t group, int64_t rows, int8_t *codes, float *scales,
                                    int32_t *offsets) {
    for (int64_t g = 0, first = 0; first < k; g++, first += group) {
        const int64_t length = group_length(k, group, first);
        const float most = largest_magnitude(x + first, length);
        const int usable = most >= FC_INT8_TINY && most < INFINITY;
        scales[g * rows] = usable ? most / 127.0f : most < INFINITY ? 1.0f : NAN;
        offsets[g * rows] = 0;
        if (usable)
            offsets[g * rows] = -8 * quantize_piece(x + first, length, 127.0f / most, codes + first * rows, rows);
        else
            for (int64_t i = 0; i < fc_int4_octets(length) * 2; i++) memset(codes + (first + i * 4) * rows, 0, 4);
    }
}

/* sum[rows][32]: the sums over all groups. */
FC_INLINE void finish_int4(const fc_int4_tile *t, float sum[][FC_INT8_COLUMNS]) {
    const fc_int8_tile end = {.rows = t->rows,
                              .columns = t->columns,
                              .residual = t->residual,
                              .out = t->out,
                              .stride = t->stride,
                              .activation = t->activation};
    for (int r = 0; r < t->rows; r++)
        for (int j = 0; j < FC_INT4_COLUMNS; j++) sum[r][j] = sum[r][j] * t->gain[j] + t->bias[j];
    finish_tile(&end, sum);
}

#endif
