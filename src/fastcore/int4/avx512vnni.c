/* int4 with AVX-512 VNNI.
 *
 * Product: up to 6 rows by 32 columns. vpdpbusd takes the weight's codes plus 8 as its unsigned side and codes of activations,
 * broadcast from memory, as its signed one; what 8 adds is in the offsets that the accumulators start from. One row is bound by
 * memory: the stream is read once, in order, prefetched; the high halves of bytes are multiplied as they are, times 16, into
 * accumulators of their own, which saves a shift per load and covers the latency. Six rows are bound by vpdpbusd.
 */
#include "../fastcore.h"
#include "body.h"

#ifdef FC_X86
FC_TARGET_AVX512VNNI

enum { LANES = 16, AHEAD = 8192 /* bytes that the stream is prefetched ahead */ };

FC_INLINE __m512i broadcast_dword(const int8_t *p) {
    int32_t dword;
    memcpy(&dword, p, 4);
    return _mm512_set1_epi32(dword);
}

FC_INLINE __m512 load_scales(const uint8_t *scales, const int wide, int v) {
    if (wide) return _mm512_load_ps((const float *)scales + v * LANES);
    return _mm512_cvtph_ps(_mm256_load_si256((const __m256i *)scales + v));
}

/* acc[rows][2] += both columns by one dword of each row. The empty asm keeps accumulators where they are: see the int8 tile. */
FC_INLINE void accumulate(__m512i acc[][2], __m512i w0, __m512i w1, const int8_t *a, const int rows) {
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        const __m512i codes = broadcast_dword(a + r * 4);
        acc[r][0] = _mm512_dpbusd_epi32(acc[r][0], w0, codes);
        acc[r][1] = _mm512_dpbusd_epi32(acc[r][1], w1, codes);
        __asm__("" : "+v"(acc[r][0]), "+v"(acc[r][1]));
    }
}

/* `apart`, a constant: high halves are summed times 16, and shifted down once for the group. */
FC_INLINE void sum_group(const fc_int4_tile *t, const uint8_t *w, const int8_t *a, int64_t octets, const int32_t *offsets,
                         __m512i acc[][2], const int rows, const int apart) {
    const __m512i low = _mm512_set1_epi8(15), high = _mm512_set1_epi8((char)0xf0);
    __m512i upper[2][2];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        acc[r][0] = acc[r][1] = _mm512_set1_epi32(offsets[r]);
        if (apart) upper[r][0] = upper[r][1] = _mm512_setzero_si512();
    }
    for (int64_t i = 0; i < octets; i++, w += 128, a += rows * 8) {
        const __m512i w0 = _mm512_load_si512(w), w1 = _mm512_load_si512(w + 64);
        if (rows <= 2) {
            _mm_prefetch((const char *)w + AHEAD, _MM_HINT_T0);
            _mm_prefetch((const char *)w + AHEAD + 64, _MM_HINT_T0);
        }
        accumulate(acc, _mm512_and_si512(w0, low), _mm512_and_si512(w1, low), a, rows);
        if (apart)
            accumulate(upper, _mm512_and_si512(w0, high), _mm512_and_si512(w1, high), a + rows * 4, rows);
        else
            accumulate(acc, _mm512_and_si512(_mm512_srli_epi16(w0, 4), low), _mm512_and_si512(_mm512_srli_epi16(w1, 4), low),
                       a + rows * 4, rows);
    }
#pragma GCC unroll 2
    for (int r = 0; apart && r < rows; r++)
        for (int v = 0; v < 2; v++) acc[r][v] = _mm512_add_epi32(acc[r][v], _mm512_srai_epi32(upper[r][v], 4));
    (void)t;
}

FC_INLINE void run_tile(const fc_int4_tile *t, const int rows, const int wide) {
    __m512 sum[FC_INT4_ROWS][2];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    const uint8_t *w = t->weight;
    const int8_t *a = t->codes;
    for (int64_t g = 0, first = 0; first < t->k; g++, first += t->group) {
        const int64_t octets = fc_int4_octets(group_length(t->k, t->group, first));
        const __m512 scale0 = load_scales(w, wide, 0), scale1 = load_scales(w, wide, 1);
        __m512i acc[FC_INT4_ROWS][2];
        if (rows <= 2) {
            _mm_prefetch((const char *)w + AHEAD, _MM_HINT_T0);
            if (wide) _mm_prefetch((const char *)w + AHEAD + 64, _MM_HINT_T0);
        }
        w += FC_INT4_COLUMNS * (wide ? 4 : 2);
        sum_group(t, w, a, octets, t->offsets + g * rows, acc, rows, rows <= 2);
        w += octets * 128;
        a += octets * rows * 8;
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            const __m512 scale = _mm512_set1_ps(t->scales[g * rows + r]);
            sum[r][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[r][0]), _mm512_mul_ps(scale0, scale), sum[r][0]);
            sum[r][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[r][1]), _mm512_mul_ps(scale1, scale), sum[r][1]);
        }
    }
    float out[FC_INT4_ROWS][FC_INT8_COLUMNS];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        _mm512_storeu_ps(out[r], sum[r][0]);
        _mm512_storeu_ps(out[r] + LANES, sum[r][1]);
    }
    finish_int4(t, out);
}

FC_INLINE void run_rows(const fc_int4_tile *t, const int wide) {
    switch (t->rows) {
    case 1: run_tile(t, 1, wide); break;
    case 2: run_tile(t, 2, wide); break;
    case 3: run_tile(t, 3, wide); break;
    case 4: run_tile(t, 4, wide); break;
    case 5: run_tile(t, 5, wide); break;
    default: run_tile(t, 6, wide); break;
    }
}

static void linear_u4_s8_f32_avx512vnni(const fc_int4_tile *t) {
    if (t->wide)
        run_rows(t, 1);
    else
        run_rows(t, 0);
}

FC_TARGET_END

void fc_int4_install_avx512vnni(fc_table *table) { FC_INSTALL(table, linear_u4_s8_f32, avx512vnni); }
#endif
