/* Packing of pixel panels and walks over taps for AVX-512.
 *
 * A panel's vector takes its lanes from one run or several (a run ends where an output row does): one masked load each, which
 * suppresses faults on lanes that are not there. Steps of two take the even elements of two loads by vpermt2ps. Bound by the
 * stores where M is small, else nothing beside the product. Sums over taps keep four vectors in flight and are bound by the one
 * 64-byte load per cycle.
 */
#include "../fastcore.h"
#include "body.h"

#ifdef FC_X86
FC_TARGET_AVX512

enum { LANES = 16, BLOCK = 4, MOST = 16 };

FC_INLINE __mmask16 first_lanes(int64_t n) { return n >= LANES ? 0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1); }

/* Lanes of the vector that begins at lane `first` which a run fills. */
FC_INLINE __mmask16 lanes_of(const fc_run *run, int64_t first) {
    return (__mmask16)(first_lanes(run->at + run->count - first) & ~first_lanes(run->at - first));
}

typedef struct piece {
    int64_t from; /* of lane 0 */
    __mmask16 lanes;
} piece;

FC_INLINE void pack_dense_rows(const float *in, int64_t plane, int64_t channels, const piece *pieces, int64_t count, float *out,
                               int64_t width) {
    for (int64_t c = 0; c < channels; c++, in += plane, out += width) {
        __m512 x = _mm512_setzero_ps();
        for (int64_t p = 0; p < count; p++) x = _mm512_mask_loadu_ps(x, pieces[p].lanes, in + pieces[p].from);
        _mm512_storeu_ps(out, x);
    }
}

FC_INLINE void pack_every_second(const float *in, int64_t plane, int64_t channels, const piece *pieces, int64_t count, float *out,
                                 int64_t width) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    for (int64_t c = 0; c < channels; c++, in += plane, out += width) {
        __m512 x = _mm512_setzero_ps();
        for (int64_t p = 0; p < count; p++) {
            const uint32_t lanes = pieces[p].lanes, spread = _pdep_u32(lanes, 0x55555555u);
            const __m512 low = _mm512_maskz_loadu_ps((__mmask16)spread, in + pieces[p].from);
            const __m512 high = _mm512_maskz_loadu_ps((__mmask16)(spread >> 16), in + pieces[p].from + LANES);
            x = _mm512_or_ps(x, _mm512_permutex2var_ps(low, even, high));
        }
        _mm512_storeu_ps(out, x);
    }
}

static void pack_window_f32_avx512(const float *in, int64_t plane, int64_t channels, int64_t stride, const fc_run *runs,
                                   int64_t count, float *out, int64_t width) {
    if (stride > 2) {
        pack_window_body(in, plane, channels, stride, runs, count, out, width);
        return;
    }
    for (int64_t first = 0; first < width; first += LANES) {
        piece pieces[MOST];
        int64_t found = 0;
        for (int64_t r = 0; r < count; r++) {
            const __mmask16 lanes = lanes_of(runs + r, first);
            if (lanes) pieces[found++] = (piece){runs[r].from + (first - runs[r].at) * stride, lanes};
        }
        if (stride == 1)
            pack_dense_rows(in, plane, channels, pieces, found, out + first, width);
        else
            pack_every_second(in, plane, channels, pieces, found, out + first, width);
    }
}

/* A tile of rows x vectors at offset j of rows [r, r + rows). */
FC_INLINE void sum_tile(const int rows, const int vectors, const float *const *taps, const float *factors, int64_t count,
                        float bias, float *out, const fc_rows_walk *w, int64_t r, int64_t j, __mmask16 lanes) {
    __m512 sum[BLOCK];
#pragma GCC unroll 4
    for (int v = 0; v < rows * vectors; v++) sum[v] = _mm512_set1_ps(bias);
    for (int64_t t = 0; t < count; t++) {
        const __m512 factor = _mm512_set1_ps(factors[t]);
        const float *tap = taps[t] + r * w->in + j;
#pragma GCC unroll 4
        for (int v = 0; v < rows * vectors; v++)
            sum[v] =
                _mm512_fmadd_ps(factor, _mm512_maskz_loadu_ps(lanes, tap + v / vectors * w->in + v % vectors * LANES), sum[v]);
    }
#pragma GCC unroll 4
    for (int v = 0; v < rows * vectors; v++)
        _mm512_mask_storeu_ps(out + (r + v / vectors) * w->out + j + v % vectors * LANES, lanes, sum[v]);
}

/* One vector of every row, four rows at a time. */
FC_INLINE void sum_strip(const float *const *taps, const float *factors, int64_t count, float bias, float *out, fc_rows_walk w,
                         int64_t j, __mmask16 lanes) {
    int64_t r = 0;
    for (; r + BLOCK <= w.rows; r += BLOCK) sum_tile(BLOCK, 1, taps, factors, count, bias, out, &w, r, j, lanes);
    for (; r < w.rows; r++) sum_tile(1, 1, taps, factors, count, bias, out, &w, r, j, lanes);
}

static void tap_sum_f32_avx512(const float *const *taps, const float *factors, int64_t count, float bias, float *out,
                               fc_rows_walk w) {
    int64_t j = 0;
    for (; j + BLOCK * LANES <= w.n; j += BLOCK * LANES)
        for (int64_t r = 0; r < w.rows; r++) sum_tile(1, BLOCK, taps, factors, count, bias, out, &w, r, j, 0xffff);
    for (; j < w.n; j += LANES) sum_strip(taps, factors, count, bias, out, w, j, first_lanes(w.n - j));
}

/* vmaxps gives its second operand where one is NaN. */
FC_INLINE __m512 larger_or_nan_x16(__m512 best, __m512 x) {
    return _mm512_mask_mov_ps(_mm512_max_ps(x, best), _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), x);
}

FC_INLINE void max_tile(const int rows, const int vectors, const float *const *taps, int64_t count, float *out,
                        const fc_rows_walk *w, int64_t r, int64_t j, __mmask16 lanes) {
    __m512 best[BLOCK];
    const float *first = taps[0] + r * w->in + j;
#pragma GCC unroll 4
    for (int v = 0; v < rows * vectors; v++)
        best[v] = _mm512_maskz_loadu_ps(lanes, first + v / vectors * w->in + v % vectors * LANES);
    for (int64_t t = 1; t < count; t++) {
        const float *tap = taps[t] + r * w->in + j;
#pragma GCC unroll 4
        for (int v = 0; v < rows * vectors; v++)
            best[v] = larger_or_nan_x16(best[v], _mm512_maskz_loadu_ps(lanes, tap + v / vectors * w->in + v % vectors * LANES));
    }
#pragma GCC unroll 4
    for (int v = 0; v < rows * vectors; v++)
        _mm512_mask_storeu_ps(out + (r + v / vectors) * w->out + j + v % vectors * LANES, lanes, best[v]);
}

FC_INLINE void max_strip(const float *const *taps, int64_t count, float *out, fc_rows_walk w, int64_t j, __mmask16 lanes) {
    int64_t r = 0;
    for (; r + BLOCK <= w.rows; r += BLOCK) max_tile(BLOCK, 1, taps, count, out, &w, r, j, lanes);
    for (; r < w.rows; r++) max_tile(1, 1, taps, count, out, &w, r, j, lanes);
}

static void tap_max_f32_avx512(const float *const *taps, int64_t count, float *out, fc_rows_walk w) {
    int64_t j = 0;
    for (; j + BLOCK * LANES <= w.n; j += BLOCK * LANES)
        for (int64_t r = 0; r < w.rows; r++) max_tile(1, BLOCK, taps, count, out, &w, r, j, 0xffff);
    for (; j < w.n; j += LANES) max_strip(taps, count, out, w, j, first_lanes(w.n - j));
}

static float sum_f32_avx512(const float *x, int64_t n) {
    __m512 s[BLOCK];
#pragma GCC unroll 4
    for (int v = 0; v < BLOCK; v++) s[v] = _mm512_setzero_ps();
    int64_t i = 0;
    for (; i + BLOCK * LANES <= n; i += BLOCK * LANES)
#pragma GCC unroll 4
        for (int v = 0; v < BLOCK; v++) s[v] = _mm512_add_ps(s[v], _mm512_loadu_ps(x + i + v * LANES));
    for (; i < n; i += LANES) s[0] = _mm512_add_ps(s[0], _mm512_maskz_loadu_ps(first_lanes(n - i), x + i));
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(s[0], s[1]), _mm512_add_ps(s[2], s[3])));
}

static void bias_clip_f32_avx512(float *c, int64_t stride, int64_t rows, int64_t cols, const float *bias, const float *addend,
                                 float low, float high) {
    bias_clip_body(c, stride, rows, cols, bias, addend, low, high);
}

FC_TARGET_END

void fc_vision_install_avx512(fc_table *table) {
    FC_INSTALL(table, pack_window_f32, avx512);
    FC_INSTALL(table, tap_sum_f32, avx512);
    FC_INSTALL(table, tap_max_f32, avx512);
    FC_INSTALL(table, sum_f32, avx512);
    FC_INSTALL(table, bias_clip_f32, avx512);
}
#endif
