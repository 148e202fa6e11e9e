/* fp32 product for AVX-512: a 12 x 32 register tile (24 accumulators), one outer product per step of the depth.
 *
 * A is packed [depth][rows], so that a step reads its 12 factors from one or two cache lines by broadcast; B is [depth][32], in
 * its panel or in place. Bound by the FMA port: per step 24 vfmadd231ps against 2 vector loads and 12 broadcasts. Few rows give
 * shorter tiles, never wasted work; one row takes two panels at a time, for four chains in flight, and is bound by memory.
 * Packing rows transposes 8 x 4 at a time in 256-bit registers, half of it by the loads; it is bound by the stores.
 * Goto & van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008.
 */
#include "../fastcore.h"
#include "body.h"

#ifdef FC_X86
FC_TARGET_AVX512
#include "../nn/gelu512.h"

enum { MR = 12, NR = 32, KC = 256, LANES = 16, PAIR = 4 };

FC_INLINE __mmask16 first_lanes(int64_t n) { return n >= LANES ? 0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1); }

/* One tile of rows x vectors; vector v belongs to panel v / 2, and `last` says which lanes of the last one exist. */
FC_INLINE void tile(const int rows, const int vectors, int64_t depth, const float *a, const float *b, int64_t b_step,
                    int64_t b_panel, float *c, int64_t c_stride, __mmask16 last, int accumulate) {
    __m512 sum[MR][PAIR];
    /* Opaque, or the compiler carries twelve row pointers from tile to tile, on the stack. */
    __asm__("" : "+r"(c));
    float *row = c;
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++, row += c_stride)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            const __mmask16 lanes = v + 1 == vectors ? last : 0xffff;
            sum[i][v] = accumulate ? _mm512_maskz_loadu_ps(lanes, row + v * LANES) : _mm512_setzero_ps();
        }
    for (int64_t d = 0; d < depth; d++, a += rows, b += b_step) {
        __m512 column[PAIR];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) column[v] = _mm512_loadu_ps(b + v / 2 * b_panel + v % 2 * LANES);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            const __m512 factor = _mm512_set1_ps(a[i]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sum[i][v] = _mm512_fmadd_ps(factor, column[v], sum[i][v]);
        }
    }
    row = c;
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++, row += c_stride)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            if (v + 1 < vectors || last == 0xffff)
                _mm512_storeu_ps(row + v * LANES, sum[i][v]);
            else
                _mm512_mask_storeu_ps(row + v * LANES, last, sum[i][v]);
}

FC_INLINE void panels(const int rows, int64_t cols, int64_t depth, const float *a, const float *b, int64_t b_step,
                      int64_t b_panel, float *c, int64_t c_stride, int accumulate) {
    int64_t j = 0;
    if (rows == 1)
        for (; j + 2 * NR <= cols; j += 2 * NR, b += 2 * b_panel)
            tile(1, 4, depth, a, b, b_step, b_panel, c + j, c_stride, 0xffff, accumulate);
    for (; j + NR <= cols; j += NR, b += b_panel)
        tile(rows, 2, depth, a, b, b_step, b_panel, c + j, c_stride, 0xffff, accumulate);
    const int64_t rest = cols - j;
    if (rest > LANES)
        tile(rows, 2, depth, a, b, b_step, b_panel, c + j, c_stride, first_lanes(rest - LANES), accumulate);
    else if (rest > 0)
        tile(rows, 1, depth, a, b, b_step, b_panel, c + j, c_stride, first_lanes(rest), accumulate);
}

static void gemm_f32_avx512(int64_t rows, int64_t cols, int64_t depth, const float *a, const float *b, int64_t b_step,
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

/* Transpose four depths of eight rows, x[d] = depth d of all rows; rows from `rows` on repeat row 0. */
FC_INLINE void transpose8x4(const float *in, int64_t stride, int64_t rows, __m256 x[4]) {
    __m256 pair[4], t[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++)
        pair[r] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(in + (r < rows ? r * stride : 0))),
                                       _mm_loadu_ps(in + (r + 4 < rows ? (r + 4) * stride : 0)), 1);
#pragma GCC unroll 2
    for (int r = 0; r < 4; r += 2) {
        t[r] = _mm256_unpacklo_ps(pair[r], pair[r + 1]);
        t[r + 1] = _mm256_unpackhi_ps(pair[r], pair[r + 1]);
    }
    x[0] = _mm256_shuffle_ps(t[0], t[2], 0x44);
    x[1] = _mm256_shuffle_ps(t[0], t[2], 0xee);
    x[2] = _mm256_shuffle_ps(t[1], t[3], 0x44);
    x[3] = _mm256_shuffle_ps(t[1], t[3], 0xee);
}

/* Eight whole rows by a multiple of four depths. */
FC_INLINE void pack_strip(const float *in, int64_t stride, int64_t depth, float *out, int64_t width) {
    for (int64_t d = 0; d < depth; d += 4, out += 4 * width) {
        __m256 x[4];
        transpose8x4(in + d, stride, 8, x);
        _mm256_storeu_ps(out, x[0]);
        _mm256_storeu_ps(out + width, x[1]);
        _mm256_storeu_ps(out + 2 * width, x[2]);
        _mm256_storeu_ps(out + 3 * width, x[3]);
    }
}

/* Any rows up to eight by at least four depths; the last four may overlap the ones before. */
FC_INLINE void pack_edge(const float *in, int64_t stride, int64_t rows, int64_t depth, float *out, int64_t width, int64_t lanes) {
    const __mmask8 present = (__mmask8)first_lanes(rows), stored = (__mmask8)first_lanes(lanes);
    for (int64_t d = 0; d < depth; d += 4) {
        __m256 x[4];
        if (d + 4 > depth) d = depth - 4;
        transpose8x4(in + d, stride, rows, x);
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) _mm256_mask_storeu_ps(out + (d + r) * width, stored, _mm256_maskz_mov_ps(present, x[r]));
    }
}

static void pack_rows_f32_avx512(const float *in, int64_t stride, int64_t rows, int64_t depth, float *out, int64_t width) {
    enum { REACH = 64 }; /* depths that one strip of eight rows runs ahead of the next: whole cache lines in, 8 KiB out */
    if (depth < 4) {
        for (int64_t d = 0; d < depth; d++)
            for (int64_t i = 0; i < width; i++) out[d * width + i] = i < rows ? in[i * stride + d] : 0.0f;
        return;
    }
    for (int64_t d = 0; d < depth; d += REACH) {
        const int64_t depths = depth - d < REACH ? depth - d : REACH, from = depths < 4 ? depth - 4 : d;
        for (int64_t i = 0; i < width; i += 8) {
            const float *strip = in + from + (i < rows ? i * stride : 0);
            float *to = out + from * width + i;
            if (rows - i >= 8 && depths % 4 == 0)
                pack_strip(strip, stride, depths, to, width);
            else
                pack_edge(strip, stride, rows - i, d + depths - from, to, width, width - i);
        }
    }
}

static void pack_columns_f32_avx512(const float *in, int64_t stride, int64_t cols, int64_t depth, float *out, int64_t width) {
    if (cols == NR && width == NR) {
        for (int64_t d = 0; d < depth; d++, in += stride, out += NR) {
            _mm512_storeu_ps(out, _mm512_loadu_ps(in));
            _mm512_storeu_ps(out + LANES, _mm512_loadu_ps(in + LANES));
        }
        return;
    }
    for (int64_t j = 0; j < width; j += LANES) {
        const __mmask16 from = first_lanes(cols - j), to = first_lanes(width - j);
        for (int64_t d = 0; d < depth; d++)
            _mm512_mask_storeu_ps(out + d * width + j, to, _mm512_maskz_loadu_ps(from, in + d * stride + j));
    }
}

static void expand_s8_f32_avx512(const int8_t *codes, float scale, int64_t n, float *out) {
    const __m512 factor = _mm512_set1_ps(scale);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(codes + i)));
        _mm512_storeu_ps(out + i, _mm512_mul_ps(_mm512_cvtepi32_ps(wide), factor));
    }
    const __mmask16 rest = first_lanes(n - i);
    const __m512i wide = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(rest, codes + i));
    _mm512_mask_storeu_ps(out + i, rest, _mm512_mul_ps(_mm512_cvtepi32_ps(wide), factor));
}

static float dot_f32_avx512(const float *a, const float *b, int64_t n) {
    __m512 s0 = _mm512_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES) {
        s0 = _mm512_fmadd_ps(_mm512_loadu_ps(a + i), _mm512_loadu_ps(b + i), s0);
        s1 = _mm512_fmadd_ps(_mm512_loadu_ps(a + i + 16), _mm512_loadu_ps(b + i + 16), s1);
        s2 = _mm512_fmadd_ps(_mm512_loadu_ps(a + i + 32), _mm512_loadu_ps(b + i + 32), s2);
        s3 = _mm512_fmadd_ps(_mm512_loadu_ps(a + i + 48), _mm512_loadu_ps(b + i + 48), s3);
    }
    for (; i < n; i += LANES) {
        const __mmask16 lanes = first_lanes(n - i);
        s0 = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(lanes, a + i), _mm512_maskz_loadu_ps(lanes, b + i), s0);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(s0, s1), _mm512_add_ps(s2, s3)));
}

/* Up to four rows by up to two vectors: all that happens to a value happens in a register. */
FC_INLINE void finish(const int rows, const int vectors, const int gelu, float *c, int64_t c_stride, const float *bias,
                      const float *residual, int64_t residual_stride, __mmask16 last) {
    __m512 x[8];
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            const __mmask16 lanes = v + 1 == vectors ? last : 0xffff;
            x[i * vectors + v] = _mm512_maskz_loadu_ps(lanes, c + i * c_stride + v * LANES);
            if (bias) x[i * vectors + v] = _mm512_add_ps(x[i * vectors + v], _mm512_maskz_loadu_ps(lanes, bias + v * LANES));
        }
    if (gelu) gelu_vectors(x, rows * vectors);
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            const __mmask16 lanes = v + 1 == vectors ? last : 0xffff;
            __m512 y = x[i * vectors + v];
            if (residual) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(lanes, residual + i * residual_stride + v * LANES));
            _mm512_mask_storeu_ps(c + i * c_stride + v * LANES, lanes, y);
        }
}

FC_INLINE void finish_columns(const int rows, const int gelu, float *c, int64_t c_stride, int64_t cols, const float *bias,
                              const float *residual, int64_t residual_stride) {
    for (int64_t j = 0; j < cols; j += 2 * LANES) {
        const float *b = bias ? bias + j : NULL, *r = residual ? residual + j : NULL;
        if (cols - j > LANES)
            finish(rows, 2, gelu, c + j, c_stride, b, r, residual_stride, first_lanes(cols - j - LANES));
        else
            finish(rows, 1, gelu, c + j, c_stride, b, r, residual_stride, first_lanes(cols - j));
    }
}

FC_INLINE void finish_rows(const int gelu, float *c, int64_t c_stride, int64_t rows, int64_t cols, const float *bias,
                           const float *residual, int64_t residual_stride) {
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4, c += 4 * c_stride, residual += residual ? 4 * residual_stride : 0)
        finish_columns(4, gelu, c, c_stride, cols, bias, residual, residual_stride);
    for (; i < rows; i++, c += c_stride, residual += residual ? residual_stride : 0)
        finish_columns(1, gelu, c, c_stride, cols, bias, residual, residual_stride);
}

static void epilogue_f32_avx512(float *c, int64_t c_stride, int64_t rows, int64_t cols, const float *bias,
                                fc_activation activation, const float *residual, int64_t residual_stride) {
    if (activation == FC_GELU)
        finish_rows(1, c, c_stride, rows, cols, bias, residual, residual_stride);
    else if (activation == FC_IDENTITY)
        finish_rows(0, c, c_stride, rows, cols, bias, residual, residual_stride);
    else
        epilogue_body(c, c_stride, rows, cols, bias, activation, residual, residual_stride);
}

FC_TARGET_END

void fc_dense_install_avx512(fc_table *table) {
    FC_INSTALL(table, gemm_f32, avx512);
    FC_INSTALL(table, pack_rows_f32, avx512);
    FC_INSTALL(table, pack_columns_f32, avx512);
    FC_INSTALL(table, expand_s8_f32, avx512);
    FC_INSTALL(table, dot_f32, avx512);
    FC_INSTALL(table, epilogue_f32, avx512);
    table->gemm_rows = MR;
    table->gemm_cols = NR;
    table->gemm_depth = KC;
}
#endif
