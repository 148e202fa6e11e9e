/* AVX-512: magnitudes compared 16 at a time. All of it is meant to run at the speed of memory.
 *
 * Members of a window are compressed without a branch: into a small buffer that feeds the histogram, or into the buffer that the
 * selection goes on with. N of M: every element meets the others of its group by rotations, and counts those that beat it.
 */
#include "body.h"

#ifdef FC_X86
FC_TARGET_AVX512

enum { PIECE = 1024 };

FC_INLINE __m512i magnitudes(const float *x) { return _mm512_and_si512(_mm512_loadu_si512(x), _mm512_set1_epi32(0x7fffffff)); }

FC_INLINE int holds_nan(__m512i largest) { return _mm512_cmpgt_epu32_mask(largest, _mm512_set1_epi32(FC_INFINITY)) != 0; }

static void count_magnitudes_f32_avx512(const float *x, int64_t n, uint32_t low, int shift, int64_t buckets,
                                        fc_magnitude_counts *counts) {
    const __m512i infinity = _mm512_set1_epi32(FC_INFINITY), lows = _mm512_set1_epi32((int)low);
    const __m512i last = _mm512_set1_epi32((int)(uint32_t)(((uint64_t)buckets << shift) - 1));
    const __m128i shifts = _mm_cvtsi32_si128(shift);
    uint32_t member[PIECE + 16];
    int64_t below = 0;
    __mmask16 nan = 0;
    for (int64_t begin = 0; begin < n; begin += PIECE) {
        const int64_t end = begin + PIECE < n ? begin + PIECE : n;
        int64_t members = 0;
        for (int64_t i = begin; i < end; i += 16) {
            const __mmask16 valid = end - i < 16 ? (__mmask16)((1u << (end - i)) - 1) : 0xffff;
            const __m512i raw = valid == 0xffff ? _mm512_loadu_si512(x + i) : _mm512_maskz_loadu_epi32(valid, x + i);
            const __m512i bits = _mm512_and_si512(raw, _mm512_set1_epi32(0x7fffffff)), offset = _mm512_sub_epi32(bits, lows);
            nan |= _mm512_mask_cmpgt_epu32_mask(valid, bits, infinity);
            below += __builtin_popcount(_mm512_mask_cmplt_epu32_mask(valid, bits, lows));
            const __mmask16 inside = _mm512_mask_cmple_epu32_mask(valid, offset, last);
            _mm512_storeu_si512(member + members, _mm512_maskz_compress_epi32(inside, _mm512_srl_epi32(offset, shifts)));
            members += __builtin_popcount(inside);
        }
        for (int64_t i = 0; i < members; i++) counts->buckets[member[i]]++;
    }
    counts->below += below;
    counts->nan += nan != 0;
}

static void collect_magnitudes_f32_avx512(const float *x, int64_t n, uint32_t low, uint32_t width,
                                          fc_magnitude_members *members) {
    const __m512i lows = _mm512_set1_epi32((int)low), widths = _mm512_set1_epi32((int)width), one = _mm512_set1_epi32(1);
    __m512i largest = _mm512_setzero_si512();
    int64_t i = 0;
    while (i + 16 <= n) {
        const int64_t left = (n - i) / 16 * 16, end = i + (left < INT32_MAX ? left : INT32_MAX / 16 * 16);
        __m512i below = _mm512_setzero_si512();
        for (; i < end; i += 16) {
            const __m512i bits = magnitudes(x + i), offset = _mm512_sub_epi32(bits, lows);
            const __mmask16 inside = _mm512_cmplt_epu32_mask(offset, widths);
            largest = _mm512_max_epu32(largest, bits);
            below = _mm512_mask_add_epi32(below, _mm512_cmplt_epu32_mask(bits, lows), below, one);
            const int64_t place = members->inside < members->capacity ? members->inside : members->capacity;
            _mm512_storeu_si512(members->member + place, _mm512_maskz_compress_epi32(inside, bits));
            members->inside += __builtin_popcount(inside);
        }
        members->below += _mm512_reduce_add_epi32(below);
    }
    members->nan += holds_nan(largest);
    collect_magnitudes(x + i, n - i, low, width, members);
}

/* Clear the lowest `count` set bits. */
FC_INLINE uint64_t clear_lowest(uint64_t bits, int64_t count) {
    for (; count > 0; count--) bits &= bits - 1;
    return bits;
}

static int64_t mask_magnitudes_f32_avx512(const float *x, int64_t n, uint32_t threshold, int64_t drop, uint8_t *mask) {
    const __m512i thresholds = _mm512_set1_epi32((int)threshold), one = _mm512_set1_epi8(1);
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
        uint64_t keep = 0, equal = 0;
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            const __m512i bits = magnitudes(x + i + 16 * j);
            keep |= (uint64_t)_mm512_cmpge_epu32_mask(bits, thresholds) << (16 * j);
            equal |= (uint64_t)_mm512_cmpeq_epi32_mask(bits, thresholds) << (16 * j);
        }
        if (equal && drop > 0) {
            const int64_t ties = __builtin_popcountll(equal), dropped = ties < drop ? ties : drop;
            keep &= ~equal | clear_lowest(equal, dropped);
            drop -= dropped;
        }
        _mm512_storeu_si512(mask + i, _mm512_maskz_mov_epi8(keep, one));
    }
    return mask_magnitudes(x + i, n - i, threshold, drop, mask + i);
}

/* The lane of each lane's neighbour `by` places on, within groups of M lanes. */
FC_INLINE __m512i rotation(int by, int M) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), last = _mm512_set1_epi32(M - 1);
    const __m512i turned = _mm512_and_si512(_mm512_add_epi32(lane, _mm512_set1_epi32(by)), last);
    return _mm512_or_si512(_mm512_andnot_si512(last, lane), turned);
}

/* Which of 16 magnitudes are beaten by fewer than `keep` others of their group of M. A neighbour that comes earlier must be
 * larger by 1 at least, one that comes later need only be equal. */
FC_INLINE __mmask16 best_of(__m512i bits, __m512i keep, int M) {
    const __m512i lane = rotation(0, M), one = _mm512_set1_epi32(1);
    __m512i better = _mm512_setzero_si512();
#pragma GCC unroll 16
    for (int by = 1; by < M; by++) {
        const __m512i from = rotation(by, M), other = _mm512_permutexvar_epi32(from, bits);
        const __m512i bar = _mm512_mask_add_epi32(bits, _mm512_cmplt_epi32_mask(from, lane), bits, one);
        better = _mm512_mask_add_epi32(better, _mm512_cmpge_epu32_mask(other, bar), better, one);
    }
    return _mm512_cmplt_epi32_mask(better, keep);
}

FC_INLINE int mask_groups(const float *x, int64_t n, int64_t keep, int M, uint8_t *mask) {
    const __m512i keeps = _mm512_set1_epi32((int)keep), one = _mm512_set1_epi8(1);
    __m512i largest = _mm512_setzero_si512();
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
        uint64_t kept = 0;
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            const __m512i bits = magnitudes(x + i + 16 * j);
            largest = _mm512_max_epu32(largest, bits);
            kept |= (uint64_t)best_of(bits, keeps, M) << (16 * j);
        }
        _mm512_storeu_si512(mask + i, _mm512_maskz_mov_epi8(kept, one));
    }
    return holds_nan(largest) | mask_n_of_m(x + i, n - i, keep, M, mask + i);
}

static int mask_n_of_m_f32_avx512(const float *x, int64_t n, int64_t keep, int64_t of, uint8_t *mask) {
    switch (of) {
    case 2: return mask_groups(x, n, keep, 2, mask);
    case 4: return mask_groups(x, n, keep, 4, mask);
    case 8: return mask_groups(x, n, keep, 8, mask);
    case 16: return mask_groups(x, n, keep, 16, mask);
    default: return mask_n_of_m(x, n, keep, of, mask);
    }
}

static void sum_block_squares_f32_avx512(const float *weight, const float *norms, int64_t columns, int64_t block_rows,
                                         int64_t block_cols, float *out) {
    sum_block_squares(weight, norms, columns, block_rows, block_cols, out);
}

static void scale_magnitudes_f32_avx512(const float *x, const float *norms, int64_t n, float *out) {
    scale_magnitudes(x, norms, n, out);
}

/* Blocks of four columns, four at a time: each byte of the mask becomes four lanes, which the compiler does not find. */
static void apply_mask_f32_avx512(float *x, const uint8_t *mask, int64_t columns, int64_t block_cols) {
    const __m128i four_times = _mm_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    int64_t j = 0;
    for (; block_cols == 4 && j + 4 <= columns; j += 4) {
        int32_t bytes;
        memcpy(&bytes, mask + j, sizeof bytes);
        const __m128i lanes = _mm_shuffle_epi8(_mm_cvtsi32_si128(bytes), four_times);
        _mm512_storeu_ps(x + 4 * j, _mm512_maskz_loadu_ps(_mm_test_epi8_mask(lanes, lanes), x + 4 * j));
    }
    apply_mask(x + j * block_cols, mask + j, columns - j, block_cols);
}

FC_TARGET_END

void fc_prune_install_avx512(fc_table *table) {
    FC_INSTALL(table, count_magnitudes_f32, avx512);
    FC_INSTALL(table, collect_magnitudes_f32, avx512);
    FC_INSTALL(table, mask_magnitudes_f32, avx512);
    FC_INSTALL(table, mask_n_of_m_f32, avx512);
    FC_INSTALL(table, sum_block_squares_f32, avx512);
    FC_INSTALL(table, scale_magnitudes_f32, avx512);
    FC_INSTALL(table, apply_mask_f32, avx512);
}
#else
void fc_prune_install_avx512(fc_table *table) { (void)table; }
#endif
