/* AVX-512: the shared bodies in vectors of 16. */
#include "../fastcore.h"

#ifdef FC_X86

FC_TARGET_AVX512

FC_INLINE void load_part(const float *x, int count, float *lanes) {
    _mm512_storeu_ps(lanes, _mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1u), x));
}

#include "body.h"

static void accumulate_f32_avx512(const float *x, float weight, int64_t n, float *out) { accumulate_body(x, weight, n, out); }
static void maximum_f32_avx512(const float *x, int64_t n, float *out) { maximum_body(x, n, out); }
static void dots_f32_avx512(const float *x, const float *y, int64_t n, float sums[3]) { dots_body(x, y, n, sums); }
static void combine_f32_avx512(const float *x, float a, const float *y, float b, int64_t n, float *out) {
    combine_body(x, a, y, b, n, out);
}

FC_TARGET_END

void fc_text_install_avx512(fc_table *table) {
    FC_INSTALL(table, accumulate_f32, avx512);
    FC_INSTALL(table, maximum_f32, avx512);
    FC_INSTALL(table, dots_f32, avx512);
    FC_INSTALL(table, combine_f32, avx512);
}

#endif
