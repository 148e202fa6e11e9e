/* Packing of pixel panels and walks over taps for AVX2 and FMA.
 *
 * As avx512.c with vectors of eight: a panel's vector takes its lanes from each run that reaches it by one vmaskmovps, which
 * suppresses faults. Steps of more than one go element by element.
 */
#include "../fastcore.h"
#include "body.h"

#ifdef FC_X86
FC_TARGET_AVX2

enum { LANES = 8, BLOCK = 4, MOST = 8 };

/* All ones in lanes [first, end) of 0 .. 7. */
FC_INLINE __m256i lanes_between(int64_t first, int64_t end) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const int from = first < 0 ? 0 : (int)first, to = end > LANES ? LANES : (int)end;
    return _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(from), lane),
                               _mm256_cmpgt_epi32(_mm256_set1_epi32(to), lane));
}

static void pack_window_f32_avx2(const float *in, int64_t plane, int64_t channels, int64_t stride, const fc_run *runs,
                                 int64_t count, float *out, int64_t width) {
    if (stride != 1) {
        pack_window_body(in, plane, channels, stride, runs, count, out, width);
        return;
    }
    for (int64_t first = 0; first < width; first += LANES) {
        int64_t from[MOST], found = 0;
        __m256i lanes[MOST];
        for (int64_t r = 0; r < count; r++) {
            const int64_t at = runs[r].at - first;
            if (at >= LANES || at + runs[r].count <= 0) continue;
            lanes[found] = lanes_between(at, at + runs[r].count);
            from[found++] = runs[r].from - at;
        }
        for (int64_t c = 0; c < channels; c++) {
            __m256 x = _mm256_setzero_ps();
            for (int64_t p = 0; p < found; p++) x = _mm256_or_ps(x, _mm256_maskload_ps(in + c * plane + from[p], lanes[p]));
            _mm256_storeu_ps(out + c * width + first, x);
        }
    }
}

/* A tile of rows x vectors at offset j of rows [r, r + rows). */
FC_INLINE void sum_tile(const int rows, const int vectors, const float *const *taps, const float *factors, int64_t count,
                        float bias, float *out, const fc_rows_walk *w, int64_t r, int64_t j) {
    __m256 sum[BLOCK];
#pragma GCC unroll 4
    for (int v = 0; v < rows * vectors; v++) sum[v] = _mm256_set1_ps(bias);
    for (int64_t t = 0; t < count; t++) {
        const __m256 factor = _mm256_set1_ps(factors[t]);
        const float *tap = taps[t] + r * w->in + j;
#pragma GCC unroll 4
        for (int v = 0; v < rows * vectors; v++)
            sum[v] = _mm256_fmadd_ps(factor, _mm256_loadu_ps(tap + v / vectors * w->in + v % vectors * LANES), sum[v]);
    }
#pragma GCC unroll 4
    for (int v = 0; v < rows * vectors; v++) _mm256_storeu_ps(out + (r + v / vectors) * w->out + j + v % vectors * LANES, sum[v]);
}

/* One vector of every row, four rows at a time. */
FC_INLINE void sum_strip(const float *const *taps, const float *factors, int64_t count, float bias, float *out, fc_rows_walk w,
                         int64_t j) {
    int64_t r = 0;
    for (; r + BLOCK <= w.rows; r += BLOCK) sum_tile(BLOCK, 1, taps, factors, count, bias, out, &w, r, j);
    for (; r < w.rows; r++) sum_tile(1, 1, taps, factors, count, bias, out, &w, r, j);
}

static void tap_sum_f32_avx2(const float *const *taps, const float *factors, int64_t count, float bias, float *out,
                             fc_rows_walk w) {
    int64_t j = 0;
    for (; j + BLOCK * LANES <= w.n; j += BLOCK * LANES)
        for (int64_t r = 0; r < w.rows; r++) sum_tile(1, BLOCK, taps, factors, count, bias, out, &w, r, j);
    for (; j + LANES <= w.n; j += LANES) sum_strip(taps, factors, count, bias, out, w, j);
    for (int64_t r = 0; r < w.rows; r++)
        for (int64_t i = j; i < w.n; i++) out[r * w.out + i] = tap_sum_at(taps, factors, count, bias, r * w.in + i);
}

/* vmaxps gives its second operand where one is NaN. */
FC_INLINE __m256 larger_or_nan_x8(__m256 best, __m256 x) {
    return _mm256_blendv_ps(_mm256_max_ps(x, best), x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}

FC_INLINE void max_tile(const int rows, const int vectors, const float *const *taps, int64_t count, float *out,
                        const fc_rows_walk *w, int64_t r, int64_t j) {
    __m256 best[BLOCK];
    const float *first = taps[0] + r * w->in + j;
#pragma GCC unroll 4
    for (int v = 0; v < rows * vectors; v++) best[v] = _mm256_loadu_ps(first + v / vectors * w->in + v % vectors * LANES);
    for (int64_t t = 1; t < count; t++) {
        const float *tap = taps[t] + r * w->in + j;
#pragma GCC unroll 4
        for (int v = 0; v < rows * vectors; v++)
            best[v] = larger_or_nan_x8(best[v], _mm256_loadu_ps(tap + v / vectors * w->in + v % vectors * LANES));
    }
#pragma GCC unroll 4
    for (int v = 0; v < rows * vectors; v++)
        _mm256_storeu_ps(out + (r + v / vectors) * w->out + j + v % vectors * LANES, best[v]);
}

FC_INLINE void max_strip(const float *const *taps, int64_t count, float *out, fc_rows_walk w, int64_t j) {
    int64_t r = 0;
    for (; r + BLOCK <= w.rows; r += BLOCK) max_tile(BLOCK, 1, taps, count, out, &w, r, j);
    for (; r < w.rows; r++) max_tile(1, 1, taps, count, out, &w, r, j);
}

static void tap_max_f32_avx2(const float *const *taps, int64_t count, float *out, fc_rows_walk w) {
    int64_t j = 0;
    for (; j + BLOCK * LANES <= w.n; j += BLOCK * LANES)
        for (int64_t r = 0; r < w.rows; r++) max_tile(1, BLOCK, taps, count, out, &w, r, j);
    for (; j + LANES <= w.n; j += LANES) max_strip(taps, count, out, w, j);
    for (int64_t r = 0; r < w.rows; r++)
        for (int64_t i = j; i < w.n; i++) out[r * w.out + i] = tap_max_at(taps, count, r * w.in + i);
}

static float sum_f32_avx2(const float *x, int64_t n) {
    __m256 s[BLOCK];
#pragma GCC unroll 4
    for (int v = 0; v < BLOCK; v++) s[v] = _mm256_setzero_ps();
    int64_t i = 0;
    for (; i + BLOCK * LANES <= n; i += BLOCK * LANES)
#pragma GCC unroll 4
        for (int v = 0; v < BLOCK; v++) s[v] = _mm256_add_ps(s[v], _mm256_loadu_ps(x + i + v * LANES));
    float lanes[LANES], sum = 0.0f;
    _mm256_storeu_ps(lanes, _mm256_add_ps(_mm256_add_ps(s[0], s[1]), _mm256_add_ps(s[2], s[3])));
    for (; i < n; i++) sum += x[i];
    for (int v = 0; v < LANES; v++) sum += lanes[v];
    return sum;
}

static void bias_clip_f32_avx2(float *c, int64_t stride, int64_t rows, int64_t cols, const float *bias, const float *addend,
                               float low, float high) {
    bias_clip_body(c, stride, rows, cols, bias, addend, low, high);
}

FC_TARGET_END

void fc_vision_install_avx2(fc_table *table) {
    FC_INSTALL(table, pack_window_f32, avx2);
    FC_INSTALL(table, tap_sum_f32, avx2);
    FC_INSTALL(table, tap_max_f32, avx2);
    FC_INSTALL(table, sum_f32, avx2);
    FC_INSTALL(table, bias_clip_f32, avx2);
}
#endif
