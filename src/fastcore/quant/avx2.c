/* int8 with AVX2.
 *
 * Product: a 4 x 16 tile, 8 accumulators. A dword of codes or weights is split into its even and its odd bytes as two vectors of
 * 16-bit numbers, which vpmaddwd multiplies and adds without any saturation (vpmaddubsw on codes up to 255 would saturate). It
 * binds: two per 32 products, as many as the sign and widen scheme needs. The split of the weights is shared by 4 rows.
 * Quantising: as in avx512vnni.c, on 128-bit lanes, two at a time.
 */
#include "../fastcore.h"
#include "body.h"

#ifdef FC_X86
FC_TARGET_AVX2

enum { LANES = 8 };

FC_INLINE __m256i first_lanes(int64_t count) {
    const int32_t limit = count >= LANES ? LANES : count <= 0 ? 0 : (int32_t)count;
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(limit), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

/* ---- ranges: on the bits, so that infinity and NaN come out on top ---- */

typedef struct range {
    __m256i low, high;
} range;

FC_INLINE range no_range(void) { return (range){_mm256_set1_epi32(INT32_MIN), _mm256_setzero_si256()}; }

FC_INLINE range join(range a, range b) { return (range){_mm256_max_epu32(a.low, b.low), _mm256_max_epi32(a.high, b.high)}; }

FC_INLINE range widen(range r, __m256 x) { return join(r, (range){_mm256_castps_si256(x), _mm256_castps_si256(x)}); }

static void range_f32_avx2(const float *x, int64_t n, float *low, float *high) {
    range r[4] = {no_range(), no_range(), no_range(), no_range()};
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (int j = 0; j < 4; j++) r[j] = widen(r[j], _mm256_loadu_ps(x + i + j * LANES));
    for (; i < n; i += LANES) r[0] = widen(r[0], _mm256_maskload_ps(x + i, first_lanes(n - i)));
    const range all = join(join(r[0], r[1]), join(r[2], r[3]));
    __m128i least = _mm_max_epu32(_mm256_castsi256_si128(all.low), _mm256_extracti128_si256(all.low, 1));
    __m128i most = _mm_max_epi32(_mm256_castsi256_si128(all.high), _mm256_extracti128_si256(all.high, 1));
    least = _mm_max_epu32(least, _mm_shuffle_epi32(least, _MM_SHUFFLE(1, 0, 3, 2)));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, _MM_SHUFFLE(1, 0, 3, 2)));
    least = _mm_max_epu32(least, _mm_shuffle_epi32(least, _MM_SHUFFLE(2, 3, 0, 1)));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, _MM_SHUFFLE(2, 3, 0, 1)));
    *low = _mm_cvtss_f32(_mm_castsi128_ps(least));
    *high = _mm_cvtss_f32(_mm_castsi128_ps(most));
}

static void range_lanes_f32_avx2(const float *x, int64_t stride, int64_t columns, int64_t k, float *low, float *high) {
    for (int64_t c = 0; c < columns; c += 4 * LANES) {
        range r[4] = {no_range(), no_range(), no_range(), no_range()};
        __m256i live[4];
        for (int j = 0; j < 4; j++) live[j] = first_lanes(columns - c - j * LANES);
        for (int64_t i = 0; i < k; i++)
            for (int j = 0; j < 4; j++) r[j] = widen(r[j], _mm256_maskload_ps(x + i * stride + c + j * LANES, live[j]));
        for (int j = 0; j < 4; j++) {
            _mm256_maskstore_ps(low + c + j * LANES, live[j], _mm256_castsi256_ps(r[j].low));
            _mm256_maskstore_ps(high + c + j * LANES, live[j], _mm256_castsi256_ps(r[j].high));
        }
    }
}

/* ---- quantising ---- */

/* Lane l of the result: four bytes of a, of b, of c, of d, from -128 to 127. */
FC_INLINE __m256i pack_signed(__m256i a, __m256i b, __m256i c, __m256i d) {
    return _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
}

/* The same from 0 to 255 with the zero point (16 bits) added. What does not fit is clipped, so that NaN, which became -2^31, is
 * 0.
 */
FC_INLINE __m256i pack_bytes(__m256i a, __m256i b, __m256i c, __m256i d, __m256i zero) {
    const __m256i ab = _mm256_adds_epi16(_mm256_packs_epi32(a, b), zero);
    return _mm256_packus_epi16(ab, _mm256_adds_epi16(_mm256_packs_epi32(c, d), zero));
}

FC_INLINE void quantize_32(const float *x, __m256 scale, int8_t *codes) {
    __m256i q[4];
    for (int j = 0; j < 4; j++) q[j] = _mm256_cvtps_epi32(_mm256_div_ps(_mm256_loadu_ps(x + j * LANES), scale));
    const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256((__m256i *)codes, _mm256_permutevar8x32_epi32(pack_signed(q[0], q[1], q[2], q[3]), in_order));
}

static void quantize_f32_s8_avx2(const float *x, int64_t n, float scale, int8_t *codes) {
    const __m256 divisor = _mm256_set1_ps(scale);
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) quantize_32(x + i, divisor, codes + i);
    if (i == n) return;
    float rest[32] = {0};
    int8_t rest_codes[32];
    memcpy(rest, x + i, (size_t)(n - i) * sizeof *x);
    quantize_32(rest, divisor, rest_codes);
    memcpy(codes + i, rest_codes, (size_t)(n - i));
}

FC_INLINE __m256i quantize(__m256 x, __m256 inverse) { return _mm256_cvtps_epi32(_mm256_mul_ps(x, inverse)); }

/* 32 columns of a row; dword j of lane l holds columns 8 j + 4 l. */
FC_INLINE __m256i quantize_columns(const float *x, int64_t columns, __m256 inverse, __m256i zero) {
    __m256i q[4];
    for (int j = 0; j < 4; j++) q[j] = quantize(_mm256_maskload_ps(x + j * LANES, first_lanes(columns - j * LANES)), inverse);
    return pack_bytes(q[0], q[1], q[2], q[3], zero);
}

FC_INLINE void store_dwords(__m256i lanes, uint8_t *out, int64_t out_stride, int64_t first, int64_t k4, __m128i rows) {
    if (first < k4) _mm_maskstore_epi32((int *)(out + first * out_stride * 4), rows, _mm256_castsi256_si128(lanes));
    if (first + 1 < k4)
        _mm_maskstore_epi32((int *)(out + (first + 1) * out_stride * 4), rows, _mm256_extracti128_si256(lanes, 1));
}

static void quantize_rows_f32_u8_avx2(const float *x, int64_t stride, int64_t rows, int64_t k, const float *inverse,
                                      const int32_t *zeros, uint8_t *out, int64_t out_stride) {
    const int64_t k4 = (k + 3) / 4;
    for (int64_t r = 0; r < rows; r += 4) {
        const int64_t count = rows - r < 4 ? rows - r : 4;
        const __m128i live = _mm256_castsi256_si128(first_lanes(count));
        const float *row[4];
        __m256 factor[4];
        __m256i zero[4];
        for (int i = 0; i < 4; i++) {
            const int64_t at = r + (i < count ? i : 0); /* a missing row repeats the first, and is not stored */
            row[i] = x + at * stride;
            factor[i] = _mm256_set1_ps(inverse[at]);
            zero[i] = _mm256_set1_epi16((int16_t)zeros[at]);
        }
        for (int64_t i = 0; i < k; i += 4 * LANES) {
            __m256i q[4];
            for (int j = 0; j < 4; j++) q[j] = quantize_columns(row[j] + i, k - i, factor[j], zero[j]);
            const __m256i low01 = _mm256_unpacklo_epi32(q[0], q[1]), high01 = _mm256_unpackhi_epi32(q[0], q[1]);
            const __m256i low23 = _mm256_unpacklo_epi32(q[2], q[3]), high23 = _mm256_unpackhi_epi32(q[2], q[3]);
            uint8_t *to = out + r * 4;
            store_dwords(_mm256_unpacklo_epi64(low01, low23), to, out_stride, i / 4, k4, live);
            store_dwords(_mm256_unpackhi_epi64(low01, low23), to, out_stride, i / 4 + 2, k4, live);
            store_dwords(_mm256_unpacklo_epi64(high01, high23), to, out_stride, i / 4 + 4, k4, live);
            store_dwords(_mm256_unpackhi_epi64(high01, high23), to, out_stride, i / 4 + 6, k4, live);
        }
    }
}

/* Eight lanes at four depths; depths from `depth` on are the zero point. */
FC_INLINE __m256i quantize_depths(const float *x, int64_t stride, int64_t depth, __m256i live, __m256 inverse, __m256i zero) {
    const __m256i by_lane = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    __m256i q[4];
    for (int j = 0; j < 4; j++)
        q[j] = j < depth ? quantize(_mm256_maskload_ps(x + j * stride, live), inverse) : _mm256_setzero_si256();
    return _mm256_shuffle_epi8(pack_bytes(q[0], q[1], q[2], q[3], _mm256_packs_epi32(zero, zero)), by_lane);
}

static void quantize_lanes_f32_u8_avx2(const float *x, int64_t stride, int64_t rows, int64_t k, const float *inverse,
                                       const int32_t *zeros, uint8_t *out, int64_t out_stride) {
    for (int64_t i = 0; i < k; i += 4)
        for (int64_t r = 0; r < rows; r += LANES) {
            const __m256i live = first_lanes(rows - r);
            const __m256 factor = _mm256_maskload_ps(inverse + r, live);
            const __m256i zero = _mm256_maskload_epi32(zeros + r, live);
            const __m256i codes = quantize_depths(x + i * stride + r, stride, k - i, live, factor, zero);
            _mm256_maskstore_epi32((int *)(out + i * out_stride + r * 4), live, codes);
        }
}

/* ---- the product ---- */

enum { CHUNK = 64 }; /* dwords of k between two visits to the sums: split codes and weights of a chunk share L1 */

/* Each dword of codes as two pairs of 16-bit numbers: bytes 0 and 2, bytes 1 and 3. */
typedef struct split_codes {
    _Alignas(32) uint32_t even[CHUNK * FC_INT8_ROWS], odd[CHUNK * FC_INT8_ROWS];
} split_codes;

FC_INLINE void split(const uint8_t *codes, int64_t dwords, split_codes *out) {
    for (int64_t i = 0; i < dwords; i++) {
        uint32_t dword;
        memcpy(&dword, codes + i * 4, 4);
        out->even[i] = dword & 0x00ff00ff;
        out->odd[i] = dword >> 8 & 0x00ff00ff;
    }
}

/* The empty asm keeps the accumulators in registers: GCC 12 reorders the multiplications, and spills. */
FC_INLINE void accumulate(__m256i acc[][4], const uint32_t *codes, const __m256i *w, const int rows, const int vectors) {
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        const __m256i pair = _mm256_set1_epi32((int32_t)codes[r]);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            acc[r][v] = _mm256_add_epi32(acc[r][v], _mm256_madd_epi16(pair, w[v]));
            __asm__("" : "+x"(acc[r][v]));
        }
    }
}

/* Add `k4` dwords of k to sums[rows][32]; `rows` and `vectors` (of 8 columns) are constants of each instance. */
FC_INLINE void sum_part(const uint32_t *even, const uint32_t *odd, int64_t step, const int8_t *w, int64_t k4, int32_t *sums,
                        const int rows, const int vectors) {
    __m256i acc[6][4], bytes[4];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            acc[r][v] = _mm256_load_si256((const __m256i *)(sums + r * FC_INT8_COLUMNS + v * LANES));
    for (int64_t i = 0; i < k4; i++, even += step, odd += step, w += FC_INT8_COLUMNS * 4) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) bytes[v] = _mm256_srai_epi16(_mm256_load_si256((const __m256i *)(w + v * 32)), 8);
        accumulate(acc, odd, bytes, rows, vectors);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            bytes[v] = _mm256_srai_epi16(_mm256_slli_epi16(_mm256_load_si256((const __m256i *)(w + v * 32)), 8), 8);
        accumulate(acc, even, bytes, rows, vectors);
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) _mm256_store_si256((__m256i *)(sums + r * FC_INT8_COLUMNS + v * LANES), acc[r][v]);
}

FC_INLINE void sum_rows(const split_codes *codes, int row, int rows, int64_t step, const int8_t *w, int64_t k4, int32_t *sums) {
    const uint32_t *even = codes->even + row, *odd = codes->odd + row;
    sums += row * FC_INT8_COLUMNS;
    if (rows == 1) {
        sum_part(even, odd, step, w, k4, sums, 1, 4);
        return;
    }
    for (int column = 0; column < FC_INT8_COLUMNS; column += 16, w += 64, sums += 16) {
        switch (rows) {
        case 2: sum_part(even, odd, step, w, k4, sums, 2, 2); break;
        case 3: sum_part(even, odd, step, w, k4, sums, 3, 2); break;
        case 4: sum_part(even, odd, step, w, k4, sums, 4, 2); break;
        case 5: sum_part(even, odd, step, w, k4, sums, 5, 2); break;
        default: sum_part(even, odd, step, w, k4, sums, 6, 2); break;
        }
    }
}

FC_INLINE void dequantize(const fc_int8_tile *t, const int32_t *sums, int row, float *out) {
    for (int j = 0; j < FC_INT8_COLUMNS; j += LANES) {
        const __m256i sum = _mm256_load_si256((const __m256i *)(sums + j));
        const __m256 scale = _mm256_mul_ps(_mm256_set1_ps(t->scales[row]), _mm256_loadu_ps(t->weight_scale + j));
        const __m256 product = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), scale);
        _mm256_storeu_ps(out + j, _mm256_add_ps(product, _mm256_loadu_ps(t->bias + j)));
    }
}

/* What the zero points of the rows come to is off the sums from the start. */
FC_INLINE void start_sums(const fc_int8_tile *t, int32_t *sums) {
    for (int r = 0; r < t->rows; r++)
        for (int j = 0; j < FC_INT8_COLUMNS; j += LANES, sums += LANES) {
            const __m256i minus_sum = _mm256_loadu_si256((const __m256i *)(t->minus_sum + j));
            _mm256_store_si256((__m256i *)sums, _mm256_mullo_epi32(_mm256_set1_epi32(t->zeros[r]), minus_sum));
        }
}

static void linear_u8_s8_f32_avx2(const fc_int8_tile *t) {
    _Alignas(32) int32_t sums[FC_INT8_ROWS * FC_INT8_COLUMNS];
    float v[FC_INT8_ROWS][FC_INT8_COLUMNS];
    split_codes codes;
    const int upper = t->rows > 6 ? (t->rows + 1) / 2 : t->rows;
    start_sums(t, sums);
    for (int64_t i = 0; i < t->k4; i += CHUNK) {
        const int64_t k4 = t->k4 - i < CHUNK ? t->k4 - i : CHUNK;
        const int8_t *w = t->weight + i * FC_INT8_COLUMNS * 4;
        split(t->codes + i * t->rows * 4, k4 * t->rows, &codes);
        sum_rows(&codes, 0, upper, t->rows, w, k4, sums);
        if (upper < t->rows) sum_rows(&codes, upper, t->rows - upper, t->rows, w, k4, sums);
    }
    for (int r = 0; r < t->rows; r++) dequantize(t, sums + r * FC_INT8_COLUMNS, r, v[r]);
    finish_tile(t, v);
}

static void quantize_static_rows_f32_u8_avx2(const float *x, int64_t stride, int64_t rows, int64_t k, float scale, int zero_point,
                                             uint8_t *out, int64_t out_stride) {
    quantize_static_rows_body(x, stride, rows, k, scale, zero_point, out, out_stride);
}

static void quantize_static_lanes_f32_u8_avx2(const float *x, int64_t stride, int64_t rows, int64_t k, float scale,
                                              int zero_point, uint8_t *out, int64_t out_stride) {
    quantize_static_lanes_body(x, stride, rows, k, scale, zero_point, out, out_stride);
}

FC_TARGET_END

void fc_quant_install_avx2(fc_table *table) {
    FC_INSTALL(table, range_f32, avx2);
    FC_INSTALL(table, range_lanes_f32, avx2);
    FC_INSTALL(table, quantize_f32_s8, avx2);
    FC_INSTALL(table, quantize_rows_f32_u8, avx2);
    FC_INSTALL(table, quantize_lanes_f32_u8, avx2);
    FC_INSTALL(table, linear_u8_s8_f32, avx2);
    FC_INSTALL(table, quantize_static_rows_f32_u8, avx2);
    FC_INSTALL(table, quantize_static_lanes_f32_u8, avx2);
}
#endif
