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

enum { LANES = 16, SCALES = 16 /* converted at a time */ };

FC_INLINE __mmask16 first_lanes(int64_t count) { return count >= LANES ? 0xffff : (__mmask16)((1u << count) - 1); }

/* Up to 16 scales from `at` on. */
FC_INLINE __m512 load_scales(const fc_int4_weight *w, int64_t at, __mmask16 live) {
    if (w->wide) return _mm512_maskz_loadu_ps(live, (const float *)w->scales + at);
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(live, (const uint16_t *)w->scales + at));
}

/* `add` and `whole`, nothing to mask, are constants. Masked stores would not forward to the loads of the next table. */
FC_INLINE void store_values(float *out, __m512 v, __mmask16 live, const int add, const int whole) {
    if (add) v = _mm512_add_ps(whole ? _mm512_loadu_ps(out) : _mm512_maskz_loadu_ps(live, out), v);
    if (whole)
        _mm512_storeu_ps(out, v);
    else
        _mm512_mask_storeu_ps(out, live, v);
}

/* Up to 32 values of a group, whose codes pick theirs of `values`. */
FC_INLINE void expand_words(const uint32_t *words, int64_t n, __m512 values, const int add, const int whole, float *out) {
    const __m128i low = _mm_set1_epi8(15);
    const __mmask8 inside = n > 24 ? 15 : (__mmask8)((1u << (n + 7) / 8) - 1);
    const __m128i bytes = whole ? _mm_loadu_si128((const __m128i *)words) : _mm_maskz_loadu_epi32(inside, words);
    const __m128i even = _mm_and_si128(bytes, low), odd = _mm_and_si128(_mm_srli_epi16(bytes, 4), low);
    const __m512i first = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(even, odd));
    const __m512i second = _mm512_cvtepu8_epi32(_mm_unpackhi_epi8(even, odd));
    store_values(out, _mm512_permutexvar_ps(first, values), first_lanes(n), add, whole);
    if (whole || n > LANES) store_values(out + LANES, _mm512_permutexvar_ps(second, values), first_lanes(n - LANES), add, whole);
}

FC_INLINE void expand_row(const fc_int4_weight *w, int64_t row, const int add, float *out) {
    const __m512 codes = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const uint32_t *words = w->words + row * fc_int4_octets(w->k);
    const int64_t groups = fc_int4_groups(w->k, w->group);
    for (int64_t g = 0; g < groups; g += SCALES) {
        const int64_t count = groups - g < SCALES ? groups - g : SCALES;
        float scales[SCALES];
        _mm512_storeu_ps(scales, load_scales(w, row * groups + g, first_lanes(count)));
        for (int64_t i = 0; i < count; i++) {
            const __m512 values = _mm512_mul_ps(codes, _mm512_set1_ps(scales[i]));
            int64_t j = (g + i) * w->group;
            const int64_t end = j + group_length(w->k, w->group, j);
            for (; j + 2 * LANES <= end; j += 2 * LANES) expand_words(words + j / 8, 2 * LANES, values, add, 1, out + j);
            if (j < end) expand_words(words + j / 8, end - j, values, add, 0, out + j);
        }
    }
}

static void expand_u4_f32_avx512(const fc_int4_weight *w, int64_t row, int add, float *out) {
    if (add)
        expand_row(w, row, 1, out);
    else
        expand_row(w, row, 0, out);
}

FC_TARGET_END

void fc_int4_install_avx512(fc_table *table) {
    FC_INSTALL(table, quantize_groups_f32_s8, avx512);
    FC_INSTALL(table, expand_u4_f32, avx512);
}
#endif
