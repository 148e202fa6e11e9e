/* int8 with AVX-512 VNNI.
 *
 * Product: a 12 x 32 tile, 24 accumulators of 16 columns. Per dword of k: two loads of packed weights, twelve broadcasts of
 * packed codes, 24 vpdpbusd (u8 codes x s8 weights), which bind: 14 loads hide beside them. Tiles of few rows split k over more
 * accumulators, to cover the latency of vpdpbusd. Outer-product register blocking after Goto and van de Geijn, "Anatomy of
 * High-Performance Matrix Multiplication" (2008).
 * Quantising rows: 4 rows x 64 columns at a time; packs bring four columns into a dword, then dwords are transposed 4 x 4
 * within 128-bit lanes, each of which is stored as one row of the panel.
 */
#include "../fastcore.h"
#include "body.h"

#ifdef FC_X86
FC_TARGET_AVX512VNNI

enum { LANES = 16 };

FC_INLINE __mmask16 first_lanes(int64_t count) {
    return count >= LANES ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1);
}

/* ---- ranges: on the bits, so that infinity and NaN come out on top ---- */

typedef struct range {
    __m512i low, high;
} range;

FC_INLINE range no_range(void) { return (range){_mm512_set1_epi32(INT32_MIN), _mm512_setzero_si512()}; }

FC_INLINE range join(range a, range b) { return (range){_mm512_max_epu32(a.low, b.low), _mm512_max_epi32(a.high, b.high)}; }

FC_INLINE range widen(range r, __m512 x) { return join(r, (range){_mm512_castps_si512(x), _mm512_castps_si512(x)}); }

static void range_f32_avx512vnni(const float *x, int64_t n, float *low, float *high) {
    range r[4] = {no_range(), no_range(), no_range(), no_range()};
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (int j = 0; j < 4; j++) r[j] = widen(r[j], _mm512_loadu_ps(x + i + j * LANES));
    for (; i < n; i += LANES) r[0] = widen(r[0], _mm512_maskz_loadu_ps(first_lanes(n - i), x + i));
    const range all = join(join(r[0], r[1]), join(r[2], r[3]));
    const uint32_t least = _mm512_reduce_max_epu32(all.low);
    const int32_t most = _mm512_reduce_max_epi32(all.high);
    memcpy(low, &least, 4);
    memcpy(high, &most, 4);
}

/* Four vectors of columns side by side: whole pages of x are streamed, and four chains cover the latency. */
static void range_lanes_f32_avx512vnni(const float *x, int64_t stride, int64_t columns, int64_t k, float *low, float *high) {
    for (int64_t c = 0; c < columns; c += 4 * LANES) {
        range r[4] = {no_range(), no_range(), no_range(), no_range()};
        __mmask16 live[4];
        for (int j = 0; j < 4; j++) live[j] = first_lanes(columns - c - j * LANES);
        for (int64_t i = 0; i < k; i++)
            for (int j = 0; j < 4; j++) r[j] = widen(r[j], _mm512_maskz_loadu_ps(live[j], x + i * stride + c + j * LANES));
        for (int j = 0; j < 4; j++) {
            _mm512_mask_storeu_ps(low + c + j * LANES, live[j], _mm512_castsi512_ps(r[j].low));
            _mm512_mask_storeu_ps(high + c + j * LANES, live[j], _mm512_castsi512_ps(r[j].high));
        }
    }
}

/* ---- quantising ---- */

static void quantize_f32_s8_avx512vnni(const float *x, int64_t n, float scale, int8_t *codes) {
    const __m512 divisor = _mm512_set1_ps(scale);
    for (int64_t i = 0; i < n; i += LANES) {
        const __mmask16 live = first_lanes(n - i);
        const __m512 v = _mm512_div_ps(_mm512_maskz_loadu_ps(live, x + i), divisor);
        _mm_mask_storeu_epi8(codes + i, live, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v)));
    }
}

FC_INLINE __m512i quantize(__m512 x, __m512 inverse) { return _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse)); }

/* Lane l of the result: four bytes of a, of b, of c, of d, the zero point (16 bits) added. What does not fit is clipped, so that
 * NaN, which became -2^31, is 0. */
FC_INLINE __m512i pack_bytes(__m512i a, __m512i b, __m512i c, __m512i d, __m512i zero) {
    const __m512i ab = _mm512_adds_epi16(_mm512_packs_epi32(a, b), zero);
    return _mm512_packus_epi16(ab, _mm512_adds_epi16(_mm512_packs_epi32(c, d), zero));
}

/* A scale chosen beforehand. */
typedef struct static_scale {
    __m512 scale, inverse, most;
} static_scale;

/* static_code of body.h, before the zero point and the clipping, which pack_bytes does. What is far below has no bound here: it
 * becomes -2^31, by a NaN on the way or not. */
FC_INLINE __m512i quantize_static(__m512 x, const static_scale *s) {
    x = _mm512_maskz_min_ps(_mm512_cmp_ps_mask(x, x, _CMP_ORD_Q), x, s->most);
    const __m512 q = _mm512_mul_ps(x, s->inverse);
    return _mm512_cvtps_epi32(_mm512_fmadd_ps(_mm512_fnmadd_ps(q, s->scale, x), s->inverse, q));
}

/* Where four rows of a panel go, and how much of them there is. */
typedef struct row_target {
    uint8_t *out;
    int64_t stride, k4; /* dwords */
    __mmask8 rows;
} row_target;

/* Up to 64 columns of a row; dword j of lane l holds columns 16 j + 4 l. `whole` is a constant: nothing to mask. */
FC_INLINE __m512i quantize_columns(const float *x, int64_t columns, __m512 inverse, __m512i zero, const static_scale *fixed,
                                   const int whole) {
    __m512i q[4];
    for (int j = 0; j < 4; j++) {
        const float *at = x + j * LANES;
        const __m512 v = whole ? _mm512_loadu_ps(at) : _mm512_maskz_loadu_ps(first_lanes(columns - j * LANES), at);
        q[j] = fixed ? quantize_static(v, fixed) : quantize(v, inverse);
    }
    return pack_bytes(q[0], q[1], q[2], q[3], zero);
}

/* Four lanes of four rows each, for the dwords first, first + 1, ... of a panel. */
FC_INLINE void store_dwords(__m512i lanes, const row_target *to, int64_t first, const int whole) {
    const __m128i part[4] = {_mm512_castsi512_si128(lanes), _mm512_extracti32x4_epi32(lanes, 1),
                             _mm512_extracti32x4_epi32(lanes, 2), _mm512_extracti32x4_epi32(lanes, 3)};
    for (int l = 0; l < 4; l++) {
        uint8_t *out = to->out + (first + l) * to->stride * 4;
        if (whole)
            _mm_storeu_si128((__m128i *)out, part[l]);
        else if (first + l < to->k4)
            _mm_mask_storeu_epi32(out, to->rows, part[l]);
    }
}

/* Four rows by up to 64 columns from column i on. */
FC_INLINE void quantize_square(const float *const *row, const float *inverse, const int32_t *zero, const static_scale *fixed,
                               int64_t i, int64_t k, const row_target *to, const int whole) {
    __m512i q[4];
    for (int j = 0; j < 4; j++) {
        const __m512 factor = _mm512_set1_ps(inverse[j]);
        q[j] = quantize_columns(row[j] + i, k - i, factor, _mm512_set1_epi16((int16_t)zero[j]), fixed, whole);
    }
    const __m512i low01 = _mm512_unpacklo_epi32(q[0], q[1]), high01 = _mm512_unpackhi_epi32(q[0], q[1]);
    const __m512i low23 = _mm512_unpacklo_epi32(q[2], q[3]), high23 = _mm512_unpackhi_epi32(q[2], q[3]);
    store_dwords(_mm512_unpacklo_epi64(low01, low23), to, i / 4, whole);
    store_dwords(_mm512_unpackhi_epi64(low01, low23), to, i / 4 + 4, whole);
    store_dwords(_mm512_unpacklo_epi64(high01, high23), to, i / 4 + 8, whole);
    store_dwords(_mm512_unpackhi_epi64(high01, high23), to, i / 4 + 12, whole);
}

/* Each row with its own factor and zero point, or all of them with one scale and zeros[0]. */
FC_INLINE void quantize_rows(const float *x, int64_t stride, int64_t rows, int64_t k, const float *inverse, const int32_t *zeros,
                             const static_scale *fixed, uint8_t *out, int64_t out_stride) {
    for (int64_t r = 0; r < rows; r += 4) {
        const int64_t count = rows - r < 4 ? rows - r : 4;
        const row_target to = {out + r * 4, out_stride, (k + 3) / 4, (__mmask8)((1 << count) - 1)};
        const float *row[4];
        float factor[4] = {0};
        int32_t zero[4];
        for (int j = 0; j < 4; j++) { /* a missing row repeats the first, and is not stored */
            const int64_t at = r + (j < count ? j : 0);
            row[j] = x + at * stride;
            if (!fixed) factor[j] = inverse[at];
            zero[j] = zeros[fixed ? 0 : at];
        }
        int64_t i = 0;
        if (count == 4)
            for (; i + 64 <= k; i += 64) quantize_square(row, factor, zero, fixed, i, k, &to, 1);
        for (; i < k; i += 64) quantize_square(row, factor, zero, fixed, i, k, &to, 0);
    }
}

static void quantize_rows_f32_u8_avx512vnni(const float *x, int64_t stride, int64_t rows, int64_t k, const float *inverse,
                                            const int32_t *zeros, uint8_t *out, int64_t out_stride) {
    quantize_rows(x, stride, rows, k, inverse, zeros, NULL, out, out_stride);
}

static void quantize_static_rows_f32_u8_avx512vnni(const float *x, int64_t stride, int64_t rows, int64_t k, float scale,
                                                   int zero_point, uint8_t *out, int64_t out_stride) {
    const static_scale fixed = {_mm512_set1_ps(scale), _mm512_set1_ps(1.0f / scale), _mm512_set1_ps(512.0f * scale)};
    quantize_rows(x, stride, rows, k, NULL, &zero_point, &fixed, out, out_stride);
}

/* Sixteen lanes at four depths; depths from `depth` on are the zero point. */
FC_INLINE __m512i quantize_depths(const float *x, int64_t stride, int64_t depth, __mmask16 live, __m512 inverse, __m512i zero,
                                  const static_scale *fixed) {
    const __m512i by_lane = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    __m512i q[4];
    for (int j = 0; j < 4; j++) {
        const __m512 v = j < depth ? _mm512_maskz_loadu_ps(live, x + j * stride) : _mm512_setzero_ps();
        q[j] = fixed ? quantize_static(v, fixed) : quantize(v, inverse);
    }
    return _mm512_shuffle_epi8(pack_bytes(q[0], q[1], q[2], q[3], _mm512_packs_epi32(zero, zero)), by_lane);
}

/* Each lane with its own factor and zero point, or all of them with one scale and zeros[0]. */
FC_INLINE void quantize_lanes(const float *x, int64_t stride, int64_t rows, int64_t k, const float *inverse, const int32_t *zeros,
                              const static_scale *fixed, uint8_t *out, int64_t out_stride) {
    __m512 factor = _mm512_setzero_ps();
    __m512i zero = _mm512_set1_epi32(fixed ? zeros[0] : 0);
    for (int64_t i = 0; i < k; i += 4) {
        uint8_t *to = out + i * out_stride;
        int64_t r = 0;
        for (; r + LANES <= rows && i + 4 <= k; r += LANES) {
            if (!fixed) factor = _mm512_loadu_ps(inverse + r), zero = _mm512_loadu_si512(zeros + r);
            _mm512_storeu_si512(to + r * 4, quantize_depths(x + i * stride + r, stride, 4, 0xffff, factor, zero, fixed));
        }
        for (; r < rows; r += LANES) {
            const __mmask16 live = first_lanes(rows - r);
            if (!fixed) factor = _mm512_maskz_loadu_ps(live, inverse + r), zero = _mm512_maskz_loadu_epi32(live, zeros + r);
            const __m512i codes = quantize_depths(x + i * stride + r, stride, k - i, live, factor, zero, fixed);
            _mm512_mask_storeu_epi32(to + r * 4, live, codes);
        }
    }
}

static void quantize_lanes_f32_u8_avx512vnni(const float *x, int64_t stride, int64_t rows, int64_t k, const float *inverse,
                                             const int32_t *zeros, uint8_t *out, int64_t out_stride) {
    quantize_lanes(x, stride, rows, k, inverse, zeros, NULL, out, out_stride);
}

static void quantize_static_lanes_f32_u8_avx512vnni(const float *x, int64_t stride, int64_t rows, int64_t k, float scale,
                                                    int zero_point, uint8_t *out, int64_t out_stride) {
    const int32_t zero = zero_point;
    const static_scale fixed = {_mm512_set1_ps(scale), _mm512_set1_ps(1.0f / scale), _mm512_set1_ps(512.0f * scale)};
    quantize_lanes(x, stride, rows, k, NULL, &zero, &fixed, out, out_stride);
}

/* ---- the product ---- */

FC_INLINE __m512i broadcast_dword(const uint8_t *p) {
    int32_t dword;
    memcpy(&dword, p, 4);
    return _mm512_set1_epi32(dword);
}

/* The empty asm keeps each accumulator in the register it is in: GCC 12 renames them across the unrolled loop, and spills. */
FC_INLINE void accumulate(__m512i acc[][2], const uint8_t *a, const int8_t *w, const int rows) {
    const __m512i w0 = _mm512_load_si512(w), w1 = _mm512_load_si512(w + 64);
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
        const __m512i codes = broadcast_dword(a + r * 4);
        acc[r][0] = _mm512_dpbusd_epi32(acc[r][0], codes, w0);
        acc[r][1] = _mm512_dpbusd_epi32(acc[r][1], codes, w1);
        __asm__("" : "+v"(acc[r][0]), "+v"(acc[r][1]));
    }
}

/* What the zero points of the rows come to is off the sums from the start. `rows` and `splits` (independent sums along k) are
 * constants of each instance. */
FC_INLINE void sum_tile(const fc_int8_tile *t, __m512i acc[][2], const int rows, const int splits) {
    const uint8_t *a = t->codes;
    const int8_t *w = t->weight;
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
        const __m512i zero = _mm512_set1_epi32(t->zeros[r]);
        acc[r][0] = _mm512_mullo_epi32(zero, _mm512_loadu_si512(t->minus_sum));
        acc[r][1] = _mm512_mullo_epi32(zero, _mm512_loadu_si512(t->minus_sum + LANES));
    }
#pragma GCC unroll 12
    for (int i = rows; i < rows * splits; i++) acc[i][0] = acc[i][1] = _mm512_setzero_si512();
    int64_t i = 0;
    for (; i + splits <= t->k4; i += splits, a += rows * splits * 4, w += splits * 128)
#pragma GCC unroll 4
        for (int s = 0; s < splits; s++) accumulate(acc + s * rows, a + s * rows * 4, w + s * 128, rows);
    if (splits > 1)
        for (; i < t->k4; i++, a += rows * 4, w += 128) accumulate(acc, a, w, rows);
#pragma GCC unroll 12
    for (int j = rows; j < rows * splits; j++) {
        acc[j % rows][0] = _mm512_add_epi32(acc[j % rows][0], acc[j][0]);
        acc[j % rows][1] = _mm512_add_epi32(acc[j % rows][1], acc[j][1]);
    }
}

FC_INLINE __m512 dequantize(const fc_int8_tile *t, __m512i acc, int row, int half) {
    const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(t->scales[row]), _mm512_loadu_ps(t->weight_scale + half * LANES));
    return _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(acc), scale), _mm512_loadu_ps(t->bias + half * LANES));
}

FC_INLINE void store_half(const fc_int8_tile *t, __m512 v, int row, int half) {
    const __mmask16 live = first_lanes(t->columns - half * LANES);
    const int64_t at = row * t->stride + half * LANES;
    if (t->residual) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(live, t->residual + at));
    _mm512_mask_storeu_ps(t->out + at, live, v);
}

static __attribute__((noinline)) void activate_and_store(const fc_int8_tile *t, float v[][FC_INT8_COLUMNS]) {
    const fc_int8_tile here = *t; /* which no store through `out` can change */
    const __mmask16 live[2] = {first_lanes(t->columns), first_lanes(t->columns - LANES)};
    activate_tile(t, v);
    for (int r = 0; r < here.rows; r++)
        for (int half = 0; half < 2; half++) {
            const int64_t at = r * here.stride + half * LANES;
            __m512 value = _mm512_loadu_ps(v[r] + half * LANES);
            if (here.residual) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(live[half], here.residual + at));
            _mm512_mask_storeu_ps(here.out + at, live[half], value);
        }
}

/* Identity and ReLU stay in registers. max(0, v) gives v when v is NaN. */
FC_INLINE void run_tile(const fc_int8_tile *t, const int rows, const int splits) {
    __m512i acc[FC_INT8_ROWS][2];
    float v[FC_INT8_ROWS][FC_INT8_COLUMNS];
    sum_tile(t, acc, rows, splits);
    const int in_registers = t->activation == FC_IDENTITY || t->activation == FC_RELU;
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            __m512 value = dequantize(t, acc[r][half], r, half);
            if (t->activation == FC_RELU) value = _mm512_max_ps(_mm512_setzero_ps(), value);
            if (in_registers)
                store_half(t, value, r, half);
            else
                _mm512_storeu_ps(v[r] + half * LANES, value);
        }
    if (!in_registers) activate_and_store(t, v);
}

static void linear_u8_s8_f32_avx512vnni(const fc_int8_tile *t) {
    switch (t->rows) {
    case 1: run_tile(t, 1, 4); break;
    case 2: run_tile(t, 2, 4); break;
    case 3: run_tile(t, 3, 4); break;
    case 4: run_tile(t, 4, 2); break;
    case 5: run_tile(t, 5, 2); break;
    case 6: run_tile(t, 6, 2); break;
    case 7: run_tile(t, 7, 1); break;
    case 8: run_tile(t, 8, 1); break;
    case 9: run_tile(t, 9, 1); break;
    case 10: run_tile(t, 10, 1); break;
    case 11: run_tile(t, 11, 1); break;
    default: run_tile(t, 12, 1); break;
    }
}

FC_TARGET_END

void fc_quant_install_avx512vnni(fc_table *table) {
    FC_INSTALL(table, range_f32, avx512vnni);
    FC_INSTALL(table, range_lanes_f32, avx512vnni);
    FC_INSTALL(table, quantize_f32_s8, avx512vnni);
    FC_INSTALL(table, quantize_rows_f32_u8, avx512vnni);
    FC_INSTALL(table, quantize_lanes_f32_u8, avx512vnni);
    FC_INSTALL(table, linear_u8_s8_f32, avx512vnni);
    FC_INSTALL(table, quantize_static_rows_f32_u8, avx512vnni);
    FC_INSTALL(table, quantize_static_lanes_f32_u8, avx512vnni);
}
#endif
