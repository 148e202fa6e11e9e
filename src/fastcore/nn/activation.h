/* The one definition of every activation: plain C that the compiler vectorises in each target region.
 *
 * Explicit fused multiply-adds in a fixed order make the vector forms bit-equal to the scalar one.
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

/* exp(x) = 2^n exp(r), |r| <= ln2/2, degree-6 polynomial (Cephes expf); below 1.5 ulp; 0 and inf at the ends, NaN kept. */
FC_INLINE float fc_exp(float x) {
    const float clamped = x < -87.3f ? -87.3f : x > 88.7f ? 88.7f : x;
    const float n = __builtin_rintf(clamped * 1.44269504f);
    float r = fc_fma(n, -0.693359375f, clamped);
    r = fc_fma(n, 2.12194440e-4f, r);
    float p = 1.9875691500e-4f;
    p = fc_fma(p, r, 1.3981999507e-3f);
    p = fc_fma(p, r, 8.3334519073e-3f);
    p = fc_fma(p, r, 4.1665795894e-2f);
    p = fc_fma(p, r, 1.6666665459e-1f);
    p = fc_fma(p, r, 5.0000001201e-1f);
    p = fc_fma(p, r * r, r + 1.0f);
    const int32_t half = (int32_t)n / 2, rest = (int32_t)n - half; /* two factors: n = 128 has no single one */
    const int32_t bits1 = (half + 127) << 23, bits2 = (rest + 127) << 23;
    float s1, s2;
    memcpy(&s1, &bits1, 4);
    memcpy(&s2, &bits2, 4);
    const float y = p * s1 * s2;
    return x != x ? x : x < -87.3f ? 0.0f : x > 88.72283f ? __builtin_inff() : y;
}

FC_INLINE float fc_sigmoid(float x) { return 1.0f / (1.0f + fc_exp(-x)); }

/* Odd polynomial near 0, 1 - 2 / (exp(2|x|) + 1) elsewhere (Cephes tanhf). */
FC_INLINE float fc_tanh(float x) {
    const float z = x * x;
    float p = -5.70498872745e-3f;
    p = fc_fma(p, z, 2.06390887954e-2f);
    p = fc_fma(p, z, -5.37397155531e-2f);
    p = fc_fma(p, z, 1.33314422036e-1f);
    p = fc_fma(p, z, -3.33332819422e-1f);
    const float near = fc_fma(p * z, x, x);
    const float a = __builtin_fabsf(x);
    const float far = 1.0f - 2.0f / (fc_exp(a + a) + 1.0f);
    return a < 0.625f ? near : __builtin_copysignf(far, x);
}

/* Abramowitz & Stegun 7.1.26 refined is not enough for gradients; the nn family owns the final form. */
FC_INLINE float fc_erf(float x) {
    const float a = __builtin_fabsf(x);
    const float t = 1.0f / fc_fma(0.3275911f, a, 1.0f);
    float p = 1.061405429f;
    p = fc_fma(p, t, -1.453152027f);
    p = fc_fma(p, t, 1.421413741f);
    p = fc_fma(p, t, -0.284496736f);
    p = fc_fma(p, t, 0.254829592f);
    const float y = 1.0f - p * t * fc_exp(-a * a);
    return __builtin_copysignf(y, x);
}

FC_INLINE float fc_activate(fc_activation kind, float x) {
    switch (kind) {
    case FC_RELU: return x < 0.0f ? 0.0f : x; /* NaN passes */
    case FC_GELU: return 0.5f * x * (1.0f + fc_erf(x * 0.70710678f));
    case FC_GELU_TANH: return 0.5f * x * (1.0f + fc_tanh(0.79788456f * fc_fma(0.044715f * x * x, x, x)));
    case FC_TANH: return fc_tanh(x);
    case FC_SIGMOID: return fc_sigmoid(x);
    case FC_SILU: return x * fc_sigmoid(x);
    default: return x;
    }
}

#endif
