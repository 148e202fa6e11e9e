/* What the variants of a slot share: the polynomial of exp2, and rounding to bf16. */
#ifndef FC_ATTENTION_BODY_H
#define FC_ATTENTION_BODY_H

#include "../nn/activation.h"

/* 2^f - 1 over f on [-1/2, 1/2], a weighted minimax fit: relative error of 2^f below 1.6 * 2^-24. The form of nn/activation.h
 * with ln 2 in the coefficients and one term less: scores come in units of log 2, for the factor is applied anyway. */
static const float fc_exp2_terms[5] = {0x1.62e42ap-1f, 0x1.ebf9bcp-3f, 0x1.c6b752p-5f, 0x1.3cea88p-7f, 0x1.5bba14p-10f};

/* The same to 3e-6, which is enough before rounding to bf16. */
static const float fc_exp2_terms_bf16[4] = {0x1.62e12cp-1f, 0x1.ec0378p-3f, 0x1.c9fc46p-5f, 0x1.3a02ccp-7f};

/* 2^x for x <= 0 (or a little above); at most 3 ulp; below 2^-126 it is 0; NaN stays NaN. */
FC_INLINE float fc_exp2(float x) {
    const float magic = 0x1.8p23f;
    const float z = x + magic, f = x - (z - magic);
    float p = fc_exp2_terms[4];
    for (int t = 3; t >= 0; t--) p = fc_fma(p, f, fc_exp2_terms[t]);
    p = fc_fma(p, f, 1.0f);
    uint32_t shift, bits;
    memcpy(&shift, &z, 4);
    memcpy(&bits, &p, 4);
    bits += shift << 23;
    float y;
    memcpy(&y, &bits, 4);
    return x < -126.0f ? 0.0f : x >= -126.0f ? y : x;
}

/* Round to nearest even; subnormal numbers become 0, NaN stays NaN: as vcvtneps2bf16 does. */
FC_INLINE uint32_t fc_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return bits >> 16 | 0x40;
    if ((bits & 0x7f800000) == 0) return bits >> 16 & 0x8000;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

FC_INLINE uint32_t fc_bf16_pair(float first, float second) { return fc_bf16(first) | fc_bf16(second) << 16; }

FC_INLINE float fc_bf16_half(uint32_t pair, int second) {
    const uint32_t bits = second ? pair & 0xffff0000 : pair << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

#endif
