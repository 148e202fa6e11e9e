/* The end of a tile whose activation is more than a comparison: shared by every instruction set, vectorised in each region. */
#ifndef FC_QUANT_BODY_H
#define FC_QUANT_BODY_H

#include <string.h>

#include "quant.h"

FC_INLINE void activate_columns(fc_activation kind, float *v) {
    for (int j = 0; j < FC_INT8_COLUMNS; j++) v[j] = fc_activate(kind, v[j]);
}

/* v[32]: the row's values with the bias added. The kinds are spelt out so that each loop has a constant one to vectorise. */
FC_INLINE void finish_row(const fc_int8_tile *t, int row, float *v) {
    switch (t->activation) {
    case FC_RELU: activate_columns(FC_RELU, v); break;
    case FC_GELU: activate_columns(FC_GELU, v); break;
    case FC_GELU_TANH: activate_columns(FC_GELU_TANH, v); break;
    case FC_TANH: activate_columns(FC_TANH, v); break;
    case FC_SIGMOID: activate_columns(FC_SIGMOID, v); break;
    case FC_SILU: activate_columns(FC_SILU, v); break;
    default: break;
    }
    float *out = t->out + row * t->stride;
    if (t->residual) {
        const float *residual = t->residual + row * t->stride;
        for (int j = 0; j < t->columns; j++) out[j] = v[j] + residual[j];
    } else {
        memcpy(out, v, (size_t)t->columns * sizeof *out);
    }
}

#endif
