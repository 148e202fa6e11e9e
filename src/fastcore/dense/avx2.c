/* fp32 product for AVX2 and FMA: a 6 x 16 register tile (12 accumulators), one outer product per step of the depth.
 *
 * Layouts as in avx512.c with panels 16 wide. Bound by the two FMA ports: per step 12 vfmadd231ps against 2 vector loads and
 * 6 broadcasts. One row takes four panels at a time, for eight chains in flight. A tile with fewer than 16 columns goes through
 * a buffer: masked stores are microcoded on several cores of this class.
 * Goto & van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008.
 */
#include <string.h>

#include "../fastcore.h"
#include "body.h"

#ifdef FC_X86
FC_TARGET_AVX2

enum { MR = 6, NR = 16, KC = 256, LANES = 8, WIDEST = 8 };

/* One tile of rows x vectors; vector v belongs to panel v / 2. */
FC_INLINE void tile(const int rows, const int vectors, int64_t depth, const float *a, const float *b, int64_t b_step,
                    int64_t b_panel, float *c, int64_t c_stride, int accumulate) {
    __m256 sum[MR][WIDEST];
    /* Opaque, or the compiler carries a pointer for each row from tile to tile, on the stack. */
    __asm__("" : "+r"(c));
    float *row = c;
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++, row += c_stride)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) sum[i][v] = accumulate ? _mm256_loadu_ps(row + v * LANES) : _mm256_setzero_ps();
    for (int64_t d = 0; d < depth; d++, a += rows, b += b_step) {
        __m256 column[WIDEST];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) column[v] = _mm256_loadu_ps(b + v / 2 * b_panel + v % 2 * LANES);
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) {
            const __m256 factor = _mm256_set1_ps(a[i]);
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++) sum[i][v] = _mm256_fmadd_ps(factor, column[v], sum[i][v]);
        }
    }
    row = c;
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++, row += c_stride)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) _mm256_storeu_ps(row + v * LANES, sum[i][v]);
}

FC_INLINE void copy_tile(const float *from, int64_t from_stride, float *to, int64_t to_stride, int64_t rows, int64_t cols) {
    for (int64_t i = 0; i < rows; i++) memcpy(to + i * to_stride, from + i * from_stride, (size_t)cols * sizeof(float));
}

FC_INLINE void panels(const int rows, int64_t cols, int64_t depth, const float *a, const float *b, int64_t b_step,
                      int64_t b_panel, float *c, int64_t c_stride, int accumulate) {
    int64_t j = 0;
    if (rows == 1)
        for (; j + 4 * NR <= cols; j += 4 * NR, b += 4 * b_panel)
            tile(1, 8, depth, a, b, b_step, b_panel, c + j, c_stride, accumulate);
    for (; j + NR <= cols; j += NR, b += b_panel) tile(rows, 2, depth, a, b, b_step, b_panel, c + j, c_stride, accumulate);
    if (j == cols) return;
    float edge[MR * NR] = {0};
    if (accumulate) copy_tile(c + j, c_stride, edge, NR, rows, cols - j);
    if (cols - j > LANES)
        tile(rows, 2, depth, a, b, b_step, b_panel, edge, NR, accumulate);
    else
        tile(rows, 1, depth, a, b, b_step, b_panel, edge, NR, accumulate);
    copy_tile(edge, NR, c + j, c_stride, rows, cols - j);
}

static void gemm_f32_avx2(int64_t rows, int64_t cols, int64_t depth, const float *a, const float *b, int64_t b_step,
                          int64_t b_panel, float *c, int64_t c_stride, int accumulate) {
    switch (rows) {
    case 1: panels(1, cols, depth, a, b, b_step, b_panel, c, c_stride, accumulate); break;
    case 2: panels(2, cols, depth, a, b, b_step, b_panel, c, c_stride, accumulate); break;
    case 3: panels(3, cols, depth, a, b, b_step, b_panel, c, c_stride, accumulate); break;
    case 4: panels(4, cols, depth, a, b, b_step, b_panel, c, c_stride, accumulate); break;
    case 5: panels(5, cols, depth, a, b, b_step, b_panel, c, c_stride, accumulate); break;
    default: panels(6, cols, depth, a, b, b_step, b_panel, c, c_stride, accumulate); break;
    }
}

FC_INLINE void transpose8(__m256 x[8]) {
    __m256 t[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        x[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        x[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        x[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        x[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        t[c] = _mm256_permute2f128_ps(x[c], x[4 + c], 0x20);
        t[4 + c] = _mm256_permute2f128_ps(x[c], x[4 + c], 0x31);
    }
#pragma GCC unroll 8
    for (int c = 0; c < 8; c++) x[c] = t[c];
}

static void pack_rows_f32_avx2(const float *in, int64_t stride, int64_t rows, int64_t depth, float *out, int64_t width) {
    for (int64_t i = 0; i < width; i += LANES, in += LANES * stride, out += LANES) {
        const int64_t present = rows - i < LANES ? rows - i : LANES, lanes = width - i < LANES ? width - i : LANES;
        int64_t d = 0;
        for (; d + LANES <= depth; d += LANES) {
            __m256 x[8];
#pragma GCC unroll 8
            for (int r = 0; r < 8; r++) x[r] = r < present ? _mm256_loadu_ps(in + r * stride + d) : _mm256_setzero_ps();
            transpose8(x);
            float square[64];
            if (lanes == LANES) {
#pragma GCC unroll 8
                for (int r = 0; r < 8; r++) _mm256_storeu_ps(out + (d + r) * width, x[r]);
                continue;
            }
#pragma GCC unroll 8
            for (int r = 0; r < 8; r++) _mm256_storeu_ps(square + 8 * r, x[r]);
            copy_tile(square, 8, out + d * width, width, 8, lanes);
        }
        for (; d < depth; d++)
            for (int64_t r = 0; r < lanes; r++) out[d * width + r] = r < present ? in[r * stride + d] : 0.0f;
    }
}

static void pack_columns_f32_avx2(const float *in, int64_t stride, int64_t cols, int64_t depth, float *out, int64_t width) {
    if (cols == NR && width == NR) {
        for (int64_t d = 0; d < depth; d++, in += stride, out += NR) {
            _mm256_storeu_ps(out, _mm256_loadu_ps(in));
            _mm256_storeu_ps(out + LANES, _mm256_loadu_ps(in + LANES));
        }
        return;
    }
    for (int64_t d = 0; d < depth; d++)
        for (int64_t j = 0; j < width; j++) out[d * width + j] = j < cols ? in[d * stride + j] : 0.0f;
}

static void expand_s8_f32_avx2(const int8_t *codes, float scale, int64_t n, float *out) {
    const __m256 factor = _mm256_set1_ps(scale);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(codes + i)));
        _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_cvtepi32_ps(wide), factor));
    }
    for (; i < n; i++) out[i] = (float)codes[i] * scale;
}

static float dot_f32_avx2(const float *a, const float *b, int64_t n) {
    __m256 s[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) s[v] = _mm256_setzero_ps();
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++)
            s[v] = _mm256_fmadd_ps(_mm256_loadu_ps(a + i + v * LANES), _mm256_loadu_ps(b + i + v * LANES), s[v]);
    float lanes[LANES], sum = 0.0f;
    _mm256_storeu_ps(lanes, _mm256_add_ps(_mm256_add_ps(s[0], s[1]), _mm256_add_ps(s[2], s[3])));
    for (; i < n; i++) sum = fc_fma(a[i], b[i], sum);
    for (int v = 0; v < LANES; v++) sum += lanes[v];
    return sum;
}

static void epilogue_f32_avx2(float *c, int64_t c_stride, int64_t rows, int64_t cols, const float *bias, fc_activation activation,
                              const float *residual, int64_t residual_stride) {
    epilogue_body(c, c_stride, rows, cols, bias, activation, residual, residual_stride);
}

FC_TARGET_END

void fc_dense_install_avx2(fc_table *table) {
    FC_INSTALL(table, gemm_f32, avx2);
    FC_INSTALL(table, pack_rows_f32, avx2);
    FC_INSTALL(table, pack_columns_f32, avx2);
    FC_INSTALL(table, expand_s8_f32, avx2);
    FC_INSTALL(table, dot_f32, avx2);
    FC_INSTALL(table, epilogue_f32, avx2);
    table->gemm_rows = MR;
    table->gemm_cols = NR;
    table->gemm_depth = KC;
}
#endif
