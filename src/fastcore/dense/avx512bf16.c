/* bf16 product for AVX-512 BF16: the 12 x 32 register tile of avx512.c, a word of two depths in the place of a float.
 *
 * Bound by vdpbf16ps, one 512-bit instruction per cycle on Zen 4 for twice the work of an FMA; per step 24 of them hide 2 vector
 * loads and 12 broadcasts. It adds the product of the high halves, then that of the low ones, each rounded to fp32. Converting is
 * vcvtne2ps2bf16, 32 values at a time. Goto & van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008.
 */
#include "../fastcore.h"
#include "body.h"

#ifdef FC_X86
FC_TARGET_AVX512BF16

enum { MR = 12, NR = 32, LANES = 16, PAIR = 4 }; /* the tile of avx512.c, whose tuning constants hold here */

FC_INLINE __mmask16 first_lanes(int64_t n) { return n >= LANES ? 0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1); }

/* One tile of rows x vectors; vector v belongs to panel v / 2, and `last` says which lanes of the last one exist. */
FC_INLINE void tile(const int rows, const int vectors, int64_t depth, const uint32_t *a, const uint32_t *b, int64_t b_step,
                    int64_t b_panel, float *c, int64_t c_stride, __mmask16 last, int accumulate) {
    __m512 sum[MR][PAIR];
    __asm__("" : "+r"(c)); /* opaque, or the compiler carries twelve row pointers from tile to tile, on the stack */
    float *row = c;
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++, row += c_stride)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            const __mmask16 lanes = v + 1 == vectors ? last : 0xffff;
            sum[i][v] = accumulate ? _mm512_maskz_loadu_ps(lanes, row + v * LANES) : _mm512_setzero_ps();
        }
    for (int64_t d = 0; d < depth; d++, a += rows, b += b_step) {
        __m512bh column[PAIR];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) column[v] = (__m512bh)_mm512_loadu_si512(b + v / 2 * b_panel + v % 2 * LANES);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            const __m512bh factor = (__m512bh)_mm512_set1_epi32((int32_t)a[i]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                sum[i][v] = _mm512_dpbf16_ps(sum[i][v], factor, column[v]);
                __asm__("" : "+v"(sum[i][v])); /* stays in its register: GCC 12 renames and spills */
            }
        }
    }
    row = c;
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++, row += c_stride)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) _mm512_mask_storeu_ps(row + v * LANES, v + 1 < vectors ? 0xffff : last, sum[i][v]);
}

FC_INLINE void panels(const int rows, int64_t cols, int64_t depth, const uint32_t *a, const uint32_t *b, int64_t b_step,
                      int64_t b_panel, float *c, int64_t c_stride, int accumulate) {
    int64_t j = 0;
    if (rows <= 4) /* few rows: twice the chains in flight */
        for (; j + 2 * NR <= cols; j += 2 * NR, b += 2 * b_panel)
            tile(rows <= 4 ? rows : 1, 4, depth, a, b, b_step, b_panel, c + j, c_stride, 0xffff, accumulate);
    for (; j + NR <= cols; j += NR, b += b_panel)
        tile(rows, 2, depth, a, b, b_step, b_panel, c + j, c_stride, 0xffff, accumulate);
    const int64_t rest = cols - j;
    if (rest > LANES)
        tile(rows, 2, depth, a, b, b_step, b_panel, c + j, c_stride, first_lanes(rest - LANES), accumulate);
    else if (rest > 0)
        tile(rows, 1, depth, a, b, b_step, b_panel, c + j, c_stride, first_lanes(rest), accumulate);
}

static void gemm_bf16_avx512bf16(int64_t rows, int64_t cols, int64_t depth, const uint32_t *a, const uint32_t *b, int64_t b_step,
                                 int64_t b_panel, float *c, int64_t c_stride, int accumulate) {
    switch (rows) {
    case 1: panels(1, cols, depth, a, b, b_step, b_panel, c, c_stride, accumulate); break;
    case 2: panels(2, cols, depth, a, b, b_step, b_panel, c, c_stride, accumulate); break;
    case 3: panels(3, cols, depth, a, b, b_step, b_panel, c, c_stride, accumulate); break;
    case 4: panels(4, cols, depth, a, b, b_step, b_panel, c, c_stride, accumulate); break;
    case 5: panels(5, cols, depth, a, b, b_step, b_panel, c, c_stride, accumulate); break;
    case 6: panels(6, cols, depth, a, b, b_step, b_panel, c, c_stride, accumulate); break;
    case 7: panels(7, cols, depth, a, b, b_step, b_panel, c, c_stride, accumulate); break;
    case 8: panels(8, cols, depth, a, b, b_step, b_panel, c, c_stride, accumulate); break;
    case 9: panels(9, cols, depth, a, b, b_step, b_panel, c, c_stride, accumulate); break;
    case 10: panels(10, cols, depth, a, b, b_step, b_panel, c, c_stride, accumulate); break;
    case 11: panels(11, cols, depth, a, b, b_step, b_panel, c, c_stride, accumulate); break;
    default: panels(12, cols, depth, a, b, b_step, b_panel, c, c_stride, accumulate); break;
    }
}

static void convert_f32_bf16_avx512bf16(const float *in, int64_t n, uint16_t *out) {
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES)
        _mm512_storeu_si512(out + i, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(in + i + LANES), _mm512_loadu_ps(in + i)));
    if (i == n) return;
    const __m512 low = _mm512_maskz_loadu_ps(first_lanes(n - i), in + i);
    const __m512 high = _mm512_maskz_loadu_ps(first_lanes(n - i - LANES), in + i + LANES);
    _mm512_mask_storeu_epi16(out + i, (__mmask32)((1ull << (n - i)) - 1), (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

static void pair_f32_bf16_avx512bf16(const float *first, const float *second, int64_t n, uint32_t *out) {
    for (int64_t j = 0; j < n; j += LANES) {
        const __mmask16 live = first_lanes(n - j);
        const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(live, first + j)));
        __m512i high = _mm512_setzero_si512();
        if (second) high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(live, second + j)));
        _mm512_mask_storeu_epi32(out + j, live, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
}

FC_TARGET_END

void fc_dense_install_avx512bf16(fc_table *table) {
    FC_INSTALL(table, gemm_bf16, avx512bf16);
    FC_INSTALL(table, convert_f32_bf16, avx512bf16);
    FC_INSTALL(table, pair_f32_bf16, avx512bf16);
}
#endif
