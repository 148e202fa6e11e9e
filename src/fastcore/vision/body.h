/* Bodies that need no intrinsics: the reference, and the rest of wider kernels. */
#ifndef FC_VISION_BODY_H
#define FC_VISION_BODY_H

#include "vision.h"

FC_INLINE void pack_window_body(const float *in, int64_t plane, int64_t channels, int64_t stride, const fc_run *runs,
                                int64_t count, float *out, int64_t width) {
    for (int64_t c = 0; c < channels; c++, in += plane, out += width) {
        for (int64_t lane = 0; lane < width; lane++) out[lane] = 0.0f;
        for (int64_t r = 0; r < count; r++)
            for (int64_t i = 0; i < runs[r].count; i++) out[runs[r].at + i] = in[runs[r].from + i * stride];
    }
}

FC_INLINE float tap_sum_at(const float *const *taps, const float *factors, int64_t count, float bias, int64_t j) {
    for (int64_t t = 0; t < count; t++) bias = fc_fma(factors[t], taps[t][j], bias);
    return bias;
}

FC_INLINE float larger_or_nan(float best, float x) { return x > best || x != x ? x : best; }

FC_INLINE float tap_max_at(const float *const *taps, int64_t count, int64_t j) {
    float best = taps[0][j];
    for (int64_t t = 1; t < count; t++) best = larger_or_nan(best, taps[t][j]);
    return best;
}

FC_INLINE void bias_clip_body(float *c, int64_t stride, int64_t rows, int64_t cols, const float *bias, const float *addend,
                              float low, float high) {
    for (int64_t i = 0; i < rows; i++, c += stride) {
        const float shift = bias ? bias[i] : -0.0f; /* which changes nothing */
        if (addend)
            for (int64_t j = 0; j < cols; j++) {
                const float y = c[j] + shift + addend[i * stride + j];
                c[j] = y < low ? low : y > high ? high : y;
            }
        else
            for (int64_t j = 0; j < cols; j++) {
                const float y = c[j] + shift;
                c[j] = y < low ? low : y > high ? high : y;
            }
    }
}

#endif
