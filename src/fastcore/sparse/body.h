/* Bodies that every target compiles for itself: elementwise code in plain C, which the compiler vectorises well. */
#ifndef FC_SPARSE_BODY_H
#define FC_SPARSE_BODY_H

#include "../fastcore.h"

/* ---- epilogues: the constant `kind` and `integer` leave one branch-free loop over the columns ---- */

FC_INLINE void finish_row(const fc_lanes_epilogue *e, int64_t row, fc_activation kind, int integer) {
    const float *residual = e->residual ? e->residual + row * e->stride : NULL;
    const float scale = integer ? e->weight_scale[row] : 1.0f, bias = e->bias ? e->bias[row] : 0.0f;
    const int64_t count = e->count;
    /* Through a local row, because out may be residual: a possible overlap would keep the loop from being vectorised. */
    float value[FC_LANES];
    for (int64_t i = 0; i < count; i++) {
        const float v = integer ? (float)((const int32_t *)e->sum)[row * e->width + i] * (e->scales[i] * scale)
                                : ((const float *)e->sum)[row * e->width + i];
        const float activated = fc_activate(kind, v + bias);
        value[i] = residual ? activated + residual[i] : activated;
    }
    memcpy(e->out + row * e->stride, value, (size_t)count * sizeof *value);
}

FC_INLINE void finish_rows(const fc_lanes_epilogue *e, fc_activation kind, int integer) {
    for (int64_t row = 0; row < e->rows; row++) finish_row(e, row, kind, integer);
}

FC_INLINE void finish_lanes(const fc_lanes_epilogue *e, int integer) {
    switch (e->activation) {
    case FC_RELU: finish_rows(e, FC_RELU, integer); break;
    case FC_GELU: finish_rows(e, FC_GELU, integer); break;
    case FC_GELU_TANH: finish_rows(e, FC_GELU_TANH, integer); break;
    case FC_TANH: finish_rows(e, FC_TANH, integer); break;
    case FC_SIGMOID: finish_rows(e, FC_SIGMOID, integer); break;
    case FC_SILU: finish_rows(e, FC_SILU, integer); break;
    default: finish_rows(e, FC_IDENTITY, integer); break;
    }
}

#endif
