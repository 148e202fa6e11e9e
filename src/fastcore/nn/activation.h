/* The one definition of every activation and its derivative: plain C that the compiler vectorises in each target region.
 *
 * Explicit fused multiply-adds in a fixed order, and selects in place of branches and tables, make the vector forms bit-equal
 * to the scalar one. The polynomials are weighted minimax fits (Remez exchange, W. J. Cody's forms) with float32 coefficients;
 * the errors stated are the largest found over all of a dense sweep against float64, in units of the last place.
 */
#ifndef FC_ACTIVATION_H
#define FC_ACTIVATION_H

#include <stdint.h>
#include <string.h>

#include "../isa.h"

typedef enum fc_activation {
    FC_IDENTITY,
    FC_RELU,
    FC_GELU,      /* x/2 (1 + erf(x / sqrt 2)) */
    FC_GELU_TANH, /* its tanh approximation */
    FC_TANH,
    FC_SIGMOID,
    FC_SILU, /* x sigmoid(x) */
} fc_activation;

FC_INLINE float fc_fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

/* exp(x) = 2^n exp(r), |r| <= ln2/2; at most 1.01 ulp. Results below the smallest normal number (x < -87.336) are 0, so that no
 * consumer meets a subnormal; above 88.7228 they are infinite; NaN stays NaN. */
FC_INLINE float fc_exp(float x) {
    const float magic = 0x1.8p23f; /* adding it rounds to an integer, which its low bits then hold */
    const float z = fc_fma(x, 0x1.715476p+0f, magic);
    const float n = z - magic;
    const float r = fc_fma(n, 0x1.05c610p-29f, fc_fma(n, -0x1.62e430p-1f, x));
    float p = 1.3939539203e-3f;
    p = fc_fma(p, r, 8.3688218147e-3f);
    p = fc_fma(p, r, 4.1666414589e-2f);
    p = fc_fma(p, r, 1.6666519642e-1f);
    p = fc_fma(p, r, 0.5f);
    p = fc_fma(p, r * r, r) + 1.0f;
    /* 2^n goes straight into the exponent: n = 128 meets p < 1 only, n = -126 meets p >= 1 only. */
    uint32_t shift, bits;
    memcpy(&shift, &z, 4);
    memcpy(&bits, &p, 4);
    bits += shift << 23;
    float y;
    memcpy(&y, &bits, 4);
    y = x <= 0x1.62e42ep+6f ? y : x + __builtin_inff();
    return x < -0x1.5d589ep+6f ? 0.0f : y;
}

FC_INLINE float fc_sigmoid(float x) { return 1.0f / (1.0f + fc_exp(-x)); }

/* Odd polynomial near 0, 1 - 2 / (exp(2|x|) + 1) elsewhere; below 2 ulp. */
FC_INLINE float fc_tanh(float x) {
    const float z = x * x;
    float p = -5.7153170928e-3f;
    p = fc_fma(p, z, 2.0648997277e-2f);
    p = fc_fma(p, z, -5.3742989898e-2f);
    p = fc_fma(p, z, 1.3331484795e-1f);
    p = fc_fma(p, z, -3.3333283663e-1f);
    const float near = fc_fma(p * z, x, x);
    const float a = __builtin_fabsf(x);
    const float far = 1.0f - 2.0f / (fc_exp(a + a) + 1.0f);
    return a < 0.625f ? near : __builtin_copysignf(far, x);
}

/* (1 - Phi(u)) / exp(-u*u/2) for u >= 0, Phi the normal distribution: a polynomial in t = 1 / (1 + 0.26 u) on [0, 13.25]. */
FC_INLINE float fc_mills(float t) {
    float p = 3.3910974860e-2f;
    p = fc_fma(p, t, -1.7043317854e-1f);
    p = fc_fma(p, t, 2.9077282548e-1f);
    p = fc_fma(p, t, -2.0051926374e-1f);
    p = fc_fma(p, t, 1.9986228645e-1f);
    p = fc_fma(p, t, 3.1352449208e-2f);
    p = fc_fma(p, t, 1.0942830145e-1f);
    p = fc_fma(p, t, 1.0172766447e-1f);
    p = fc_fma(p, t, 1.0390502214e-1f);
    return fc_fma(p, t, -7.0778214649e-6f);
}

/* The normal distribution function, and exp(-x*x/2) on the way; below 8 ulp for x > -3. The lower tail keeps its relative
 * accuracy, which (1 + erf) / 2 loses: the error grows as exp's argument does, to 1.2e-6 at x = -6. */
FC_INLINE float fc_normal_cdf(float x, float *bell) {
    *bell = fc_exp(-0.5f * (x * x));
    const float tail = *bell * fc_mills(1.0f / fc_fma(0.26f, __builtin_fabsf(x), 1.0f));
    return x < 0.0f ? tail : 1.0f - tail;
}

/* x Phi(x), with (Phi(x) - 1/2) / x as a polynomial in t = 2 (x / 5.25)^2 - 1: neither exp nor division, for the inner loops of
 * inference. The error is at most 2.5e-7 max(1, |x|); below -5.25, where Phi is 7.6e-8, the result is 0. */
#define FC_GELU_END 5.25f
enum { FC_GELU_TERMS = 14 };
static const float fc_gelu_terms[FC_GELU_TERMS] = {-5.3686410e-4f, 1.4344503e-3f,  -1.3884285e-3f, 1.9252854e-3f,  -5.0601475e-3f,
                                                   9.0183346e-3f,  -1.2981067e-2f, 1.8347990e-2f,  -2.4989435e-2f, 3.2060143e-2f,
                                                   -3.9769083e-2f, 4.9644172e-2f,  -6.7126639e-2f, 1.3465936e-1f};

FC_INLINE float fc_gelu(float x) {
    const float end = FC_GELU_END, square = x * x;
    const float t = fc_fma(square < end * end ? square : end * end, 2 / (end * end), -1.0f);
    float p = fc_gelu_terms[0];
#pragma GCC unroll 13
    for (int i = 1; i < FC_GELU_TERMS; i++) p = fc_fma(p, t, fc_gelu_terms[i]);
    const float below = x < end ? x : end;
    const float cdf = fc_fma(below, p, 0.5f);
    return x * (x > -end ? cdf : 0.0f);
}

/* 2 sqrt(2/pi) (x + 0.044715 x^3): gelu_tanh(x) = x sigmoid(this). */
FC_INLINE float fc_gelu_tanh_argument(float x) { return 1.59576912f * fc_fma(0.044715f * x * x, x, x); }

FC_INLINE float fc_activate(fc_activation kind, float x) {
    switch (kind) {
    case FC_RELU: return x < 0.0f ? 0.0f : x; /* NaN passes */
    case FC_GELU: return fc_gelu(x);
    case FC_GELU_TANH: return x / (1.0f + fc_exp(-fc_gelu_tanh_argument(x)));
    case FC_TANH: return fc_tanh(x);
    case FC_SIGMOID: return fc_sigmoid(x);
    case FC_SILU: return x / (1.0f + fc_exp(-x));
    default: return x;
    }
}

/* The derivative at x; NaN stays NaN. 1 - s is formed as exp(-x) s, so that nothing cancels. */
FC_INLINE float fc_activate_derivative(fc_activation kind, float x) {
    const float a = __builtin_fabsf(x);
    switch (kind) {
    case FC_RELU: return x > 0.0f ? 1.0f : x <= 0.0f ? 0.0f : x;
    case FC_GELU: {
        float bell;
        const float cdf = fc_normal_cdf(x, &bell);
        return fc_fma(0.39894228f * x, bell, cdf);
    }
    case FC_GELU_TANH: {
        const float c = a > 10.0f ? __builtin_copysignf(10.0f, x) : x; /* constant beyond, and exp stays finite */
        const float e = fc_exp(-fc_gelu_tanh_argument(c));
        const float s = 1.0f / (1.0f + e);
        const float slope = 1.59576912f * fc_fma(0.134145f * c, c, 1.0f);
        return s * fc_fma(c * slope, e * s, 1.0f);
    }
    case FC_TANH: {
        const float e = fc_exp(-2.0f * a);
        const float r = 1.0f / (1.0f + e);
        return 4.0f * (e * r) * r;
    }
    case FC_SIGMOID: {
        const float e = fc_exp(-a);
        const float r = 1.0f / (1.0f + e);
        return e * r * r;
    }
    case FC_SILU: {
        const float c = a > 85.0f ? __builtin_copysignf(85.0f, x) : x;
        const float e = fc_exp(-c);
        const float s = 1.0f / (1.0f + e);
        return s * fc_fma(c, e * s, 1.0f);
    }
    default: return 1.0f;
    }
}

#endif
