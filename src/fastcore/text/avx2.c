/* AVX2: the shared bodies in vectors of 8. */
#include "../fastcore.h"

#ifdef FC_X86

FC_TARGET_AVX2

FC_INLINE void load_part(const float *x, int count, float *lanes) {
    const __m256i order = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    for (int l = 0; l < 16; l += 8) {
        const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(count - l), order);
        _mm256_storeu_ps(lanes + l, count > l ? _mm256_maskload_ps(x + l, mask) : _mm256_setzero_ps());
    }
}

#include "body.h"

static void accumulate_f32_avx2(const float *x, float weight, int64_t n, float *out) { accumulate_body(x, weight, n, out); }
static void maximum_f32_avx2(const float *x, int64_t n, float *out) { maximum_body(x, n, out); }
static void dots_f32_avx2(const float *x, const float *y, int64_t n, float sums[3]) { dots_body(x, y, n, sums); }
static void combine_f32_avx2(const float *x, float a, const float *y, float b, int64_t n, float *out) {
    combine_body(x, a, y, b, n, out);
}

FC_TARGET_END

void fc_text_install_avx2(fc_table *table) {
    FC_INSTALL(table, accumulate_f32, avx2);
    FC_INSTALL(table, maximum_f32, avx2);
    FC_INSTALL(table, dots_f32, avx2);
    FC_INSTALL(table, combine_f32, avx2);
}

#endif
