/* Bodies that the compiler vectorises well in every target region. */
#ifndef FC_DENSE_BODY_H
#define FC_DENSE_BODY_H

#include <string.h>

#include "../nn/activation.h"

FC_INLINE float bf16_to_float(uint16_t half) {
    const uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

/* What vcvtneps2bf16 gives: half to even, subnormals to 0, NaN to a quiet NaN. */
FC_INLINE uint16_t float_to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint32_t magnitude = bits & 0x7fffffff;
    const uint32_t rounded = magnitude > 0x7f800000 ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1);
    return (uint16_t)((magnitude < 0x800000 ? bits & 0x80000000 : rounded) >> 16);
}

FC_INLINE void add_row(float *restrict c, const float *restrict addend, int64_t n) {
    for (int64_t j = 0; j < n; j++) c[j] += addend[j];
}

/* `kind` is constant at every call, so that the switch inside fc_activate is gone before vectorisation. */
FC_INLINE void activate_row(fc_activation kind, float *c, int64_t n) {
    for (int64_t j = 0; j < n; j++) c[j] = fc_activate(kind, c[j]);
}

FC_INLINE void activate_row_as(fc_activation kind, float *c, int64_t n) {
    switch (kind) {
    case FC_RELU: activate_row(FC_RELU, c, n); break;
    case FC_GELU: activate_row(FC_GELU, c, n); break;
    case FC_GELU_TANH: activate_row(FC_GELU_TANH, c, n); break;
    case FC_TANH: activate_row(FC_TANH, c, n); break;
    case FC_SIGMOID: activate_row(FC_SIGMOID, c, n); break;
    case FC_SILU: activate_row(FC_SILU, c, n); break;
    default: break;
    }
}

/* Three passes over a row that is in L1: cheaper than 28 fused variants in code, and nothing beside the product in time. */
FC_INLINE void epilogue_body(float *c, int64_t c_stride, int64_t rows, int64_t cols, const float *bias, fc_activation activation,
                             const float *residual, int64_t residual_stride) {
    for (int64_t i = 0; i < rows; i++, c += c_stride) {
        if (bias) add_row(c, bias, cols);
        activate_row_as(activation, c, cols);
        if (residual) add_row(c, residual + i * residual_stride, cols);
    }
}

#endif
