/* The bodies of the text kernels: plain loops that the compiler turns into vectors of each target's width.
 *
 * Every <isa>.c includes this inside its target region, after load_part. One load or two and a store for each element: bound by
 * L1 where a row of the output stays there, else by memory.
 */
#ifndef FC_TEXT_BODY_H
#define FC_TEXT_BODY_H

#include "../fastcore.h"

#if defined(__clang__)
#define FC_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#define FC_LANES_AT_ONCE
#else
#define FC_LANES_AT_ONCE _Pragma("GCC unroll 1")
#define FC_INDEPENDENT _Pragma("GCC ivdep")
#endif

enum { LANES = 16 };

FC_INLINE float fold_sum(const float *lanes) {
    float a[8], b[4];
    for (int l = 0; l < 8; l++) a[l] = lanes[l] + lanes[l + 8];
    for (int l = 0; l < 4; l++) b[l] = a[l] + a[l + 4];
    return (b[0] + b[2]) + (b[1] + b[3]);
}

FC_INLINE void accumulate_body(const float *x, float weight, int64_t n, float *out) {
    FC_INDEPENDENT
    for (int64_t j = 0; j < n; j++) out[j] = fc_fma(weight, x[j], out[j]);
}

FC_INLINE void maximum_body(const float *x, int64_t n, float *out) {
    FC_INDEPENDENT
    for (int64_t j = 0; j < n; j++) out[j] = x[j] > out[j] || x[j] != x[j] ? x[j] : out[j];
}

FC_INLINE void add_products(const float *x, const float *y, float *xx, float *xy, float *yy) {
    FC_LANES_AT_ONCE
    for (int l = 0; l < LANES; l++) {
        xx[l] = fc_fma(x[l], x[l], xx[l]);
        xy[l] = fc_fma(x[l], y[l], xy[l]);
        yy[l] = fc_fma(y[l], y[l], yy[l]);
    }
}

FC_INLINE void dots_body(const float *x, const float *y, int64_t n, float sums[3]) {
    float xx[LANES] = {0}, xy[LANES] = {0}, yy[LANES] = {0}, u[LANES], v[LANES];
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) add_products(x + j, y + j, xx, xy, yy);
    if (j < n) {
        load_part(x + j, (int)(n - j), u);
        load_part(y + j, (int)(n - j), v);
        add_products(u, v, xx, xy, yy);
    }
    sums[0] = fold_sum(xx);
    sums[1] = fold_sum(xy);
    sums[2] = fold_sum(yy);
}

FC_INLINE void combine_body(const float *x, float a, const float *y, float b, int64_t n, float *out) {
    FC_INDEPENDENT
    for (int64_t j = 0; j < n; j++) out[j] = fc_fma(b, y[j], a * x[j]);
}

#endif
