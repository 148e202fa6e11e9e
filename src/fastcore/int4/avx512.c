/* int4 with AVX-512 alone: what is not bound by multiplication. Without VNNI the product of avx2.c is as good.
 *
 * A row is expanded by table: the 16 values of a group in one register, from which each code picks its own (vpermps).
 */
#include "../fastcore.h"
#include "body.h"

#ifdef FC_X86
FC_TARGET_AVX512

static void quantize_groups_f32_s8_avx512(const float *x, int64_t k, int64_t group, int64_t rows, int8_t *codes, float *scales,
                                          int32_t *offsets) {
    quantize_groups_body(x, k, group, rows, codes, scales, offsets);
}

FC_INLINE __m512 values_of_codes(float scale) {
    const __m512 codes = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return _mm512_mul_ps(codes, _mm512_set1_ps(scale));
}

/* Sixteen values of two words, or of the one that is left. */
FC_INLINE __m512 expand_words(const uint32_t *words, int64_t left, __m512 values) {
    uint64_t both = words[0];
    if (left > 8) both |= (uint64_t)words[1] << 32;
    const __m128i bytes = _mm_cvtsi64_si128((int64_t)both), low = _mm_set1_epi8(15);
    const __m128i codes = _mm_unpacklo_epi8(_mm_and_si128(bytes, low), _mm_and_si128(_mm_srli_epi16(bytes, 4), low));
    return _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(codes), values);
}

static void expand_u4_f32_avx512(const fc_int4_weight *w, int64_t row, int add, float *out) {
    const uint32_t *words = w->words + row * fc_int4_octets(w->k);
    const int64_t groups = fc_int4_groups(w->k, w->group);
    for (int64_t first = 0, g = row * groups; first < w->k; first += w->group, g++) {
        const int64_t end = first + group_length(w->k, w->group, first);
        const __m512 values = values_of_codes(fc_int4_scale(w->scales, w->wide, g));
        for (int64_t j = first; j < end; j += 16) {
            const __mmask16 live = end - j >= 16 ? 0xffff : (__mmask16)((1u << (end - j)) - 1);
            __m512 v = expand_words(words + j / 8, end - j, values);
            if (add) v = _mm512_add_ps(_mm512_maskz_loadu_ps(live, out + j), v);
            _mm512_mask_storeu_ps(out + j, live, v);
        }
    }
}

FC_TARGET_END

void fc_int4_install_avx512(fc_table *table) {
    FC_INSTALL(table, quantize_groups_f32_s8, avx512);
    FC_INSTALL(table, expand_u4_f32, avx512);
}
#endif
