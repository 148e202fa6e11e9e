/* The end of a tile whose activation is more than a comparison: shared by every instruction set, vectorised in each region. */
#ifndef FC_QUANT_BODY_H
#define FC_QUANT_BODY_H

#include <string.h>

#include "quant.h"

/* Correctly rounded division by `scale`, whose rounded inverse is known (P. Markstein, 1990), after clipping to what has a code.
 */
FC_INLINE float divide(float x, float scale, float inverse) {
    const float most = 512.0f * scale;
    x = x > most ? most : x;
    x = x < -most ? -most : x;
    const float q = x * inverse;
    return fc_fma(fc_fma(-q, scale, x), inverse, q);
}

FC_INLINE uint8_t static_code(float x, float scale, float inverse, int zero_point) {
    const float magic = 0x1.8p23f; /* adding it rounds half to even, to an integer that the low bits hold */
    const float rounded = divide(x == x ? x : 0.0f, scale, inverse) + magic;
    int32_t bits;
    memcpy(&bits, &rounded, 4);
    const int32_t q = bits - 0x4b400000 + zero_point;
    return (uint8_t)(q < 0 ? 0 : q > 255 ? 255 : q);
}

FC_INLINE void quantize_static_rows_body(const float *x, int64_t stride, int64_t rows, int64_t k, float scale, int zero_point,
                                         uint8_t *out, int64_t out_stride) {
    enum { PIECE = 128 }; /* columns converted at a time, then dealt out by the dword */
    const float inverse = 1.0f / scale;
    uint8_t codes[PIECE];
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < k; i += PIECE) {
            const int64_t count = k - i < PIECE ? k - i : PIECE;
            const float *from = x + r * stride + i;
            uint8_t *to = out + (i / 4 * out_stride + r) * 4;
            for (int64_t j = count; j % 4; j++) codes[j] = (uint8_t)zero_point;
            for (int64_t j = 0; j < count; j++) codes[j] = static_code(from[j], scale, inverse, zero_point);
            for (int64_t j = 0; j < count; j += 4) memcpy(to + j * out_stride, codes + j, 4);
        }
}

FC_INLINE void quantize_static_lanes_body(const float *x, int64_t stride, int64_t rows, int64_t k, float scale, int zero_point,
                                          uint8_t *out, int64_t out_stride) {
    const float inverse = 1.0f / scale;
    for (int64_t i = 0; i < (k + 3) / 4 * 4; i++) {
        uint8_t *to = out + i / 4 * out_stride * 4 + i % 4;
        for (int64_t r = 0; r < rows; r++)
            to[r * 4] = i < k ? static_code(x[i * stride + r], scale, inverse, zero_point) : (uint8_t)zero_point;
    }
}

/* Two or four vectors at a time, which the compiler unrolls. */
FC_INLINE void activate_rows(fc_activation kind, float v[][FC_INT8_COLUMNS], int rows) {
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < FC_INT8_COLUMNS; j++) v[r][j] = fc_activate(kind, v[r][j]);
}

/* The kinds are spelt out so that each loop has a constant one to vectorise. */
FC_INLINE void activate_tile(const fc_int8_tile *t, float v[][FC_INT8_COLUMNS]) {
    switch (t->activation) {
    case FC_RELU: activate_rows(FC_RELU, v, t->rows); break;
    case FC_GELU: activate_rows(FC_GELU, v, t->rows); break;
    case FC_GELU_TANH: activate_rows(FC_GELU_TANH, v, t->rows); break;
    case FC_TANH: activate_rows(FC_TANH, v, t->rows); break;
    case FC_SIGMOID: activate_rows(FC_SIGMOID, v, t->rows); break;
    case FC_SILU: activate_rows(FC_SILU, v, t->rows); break;
    default: break;
    }
}

/* v[rows][32]: the values with the bias added. */
FC_INLINE void finish_tile(const fc_int8_tile *t, float v[][FC_INT8_COLUMNS]) {
    activate_tile(t, v);
    for (int r = 0; r < t->rows; r++) {
        float *out = t->out + r * t->stride;
        if (t->residual) {
            const float *residual = t->residual + r * t->stride;
            for (int j = 0; j < t->columns; j++) out[j] = v[r][j] + residual[j];
        } else {
            memcpy(out, v[r], (size_t)t->columns * sizeof *out);
        }
    }
}

#endif
