/* AVX2: magnitudes compared 8 at a time. They are below 1 << 31, so signed comparisons order them.
 *
 * Members of a window are few where it matters and are taken bit by bit. N of M: every element meets the others of its group by
 * rotations, and counts those that beat it.
 */
#include "body.h"

#ifdef FC_X86
FC_TARGET_AVX2

FC_INLINE __m256i magnitudes(const float *x) {
    return _mm256_and_si256(_mm256_loadu_si256((const __m256i *)x), _mm256_set1_epi32(0x7fffffff));
}

FC_INLINE uint32_t lanes_of(__m256i comparison) { return (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(comparison)); }

FC_INLINE int holds_nan(__m256i largest) { return lanes_of(_mm256_cmpgt_epi32(largest, _mm256_set1_epi32(FC_INFINITY))) != 0; }

static void count_magnitudes_f32_avx2(const float *x, int64_t n, uint32_t low, int shift, int64_t buckets,
                                      fc_magnitude_counts *counts) {
    /* low and the window's end fit into 31 bits as well. */
    const __m256i lows = _mm256_set1_epi32((int)low);
    const uint32_t last = (uint32_t)(low + ((uint64_t)buckets << shift) - 1);
    const __m256i lasts = _mm256_set1_epi32((int)last);
    __m256i largest = _mm256_setzero_si256();
    int64_t i = 0, below = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256i bits = magnitudes(x + i), under = _mm256_cmpgt_epi32(lows, bits), over = _mm256_cmpgt_epi32(bits, lasts);
        largest = _mm256_max_epi32(largest, bits);
        below += __builtin_popcount(lanes_of(under));
        for (uint32_t inside = ~lanes_of(_mm256_or_si256(under, over)) & 0xff; inside; inside &= inside - 1)
            counts->buckets[(magnitude(x[i + __builtin_ctz(inside)]) - low) >> shift]++;
    }
    counts->below += below;
    counts->nan += holds_nan(largest);
    for (; i < n; i++) {
        const uint32_t bits = magnitude(x[i]);
        counts->nan += bits > FC_INFINITY;
        counts->below += bits < low;
        if (bits >= low && bits <= last) counts->buckets[(bits - low) >> shift]++;
    }
}

static void collect_magnitudes_f32_avx2(const float *x, int64_t n, uint32_t low, uint32_t width, fc_magnitude_members *members) {
    const __m256i lows = _mm256_set1_epi32((int)low), lasts = _mm256_set1_epi32((int)(low + width - 1));
    __m256i largest = _mm256_setzero_si256();
    int64_t i = 0, below = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256i bits = magnitudes(x + i), under = _mm256_cmpgt_epi32(lows, bits), over = _mm256_cmpgt_epi32(bits, lasts);
        largest = _mm256_max_epi32(largest, bits);
        below += __builtin_popcount(lanes_of(under));
        for (uint32_t inside = ~lanes_of(_mm256_or_si256(under, over)) & 0xff; inside; inside &= inside - 1) {
            const int64_t place = members->inside < members->capacity ? members->inside : members->capacity;
            members->member[place] = magnitude(x[i + __builtin_ctz(inside)]);
            members->inside++;
        }
    }
    members->below += below;
    members->nan += holds_nan(largest);
    collect_magnitudes(x + i, n - i, low, width, members);
}

/* Bytes 1 where 32-bit comparisons hold, 0 elsewhere, and the other way round. */
FC_INLINE __m256i bytes_of(const __m256i comparison[4], int inverted) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7); /* undoes the packs, which work within halves */
    const __m256i words = _mm256_packs_epi32(comparison[0], comparison[1]);
    const __m256i more = _mm256_packs_epi32(comparison[2], comparison[3]), one = _mm256_set1_epi8(1);
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(words, more), order);
    return inverted ? _mm256_andnot_si256(bytes, one) : _mm256_and_si256(bytes, one);
}

static int64_t mask_magnitudes_f32_avx2(const float *x, int64_t n, uint32_t threshold, int64_t drop, uint8_t *mask) {
    const __m256i thresholds = _mm256_set1_epi32((int)threshold);
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        __m256i under[4], equal = _mm256_setzero_si256();
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            const __m256i bits = magnitudes(x + i + 8 * j);
            under[j] = _mm256_cmpgt_epi32(thresholds, bits);
            equal = _mm256_or_si256(equal, _mm256_cmpeq_epi32(thresholds, bits));
        }
        _mm256_storeu_si256((__m256i *)(mask + i), bytes_of(under, 1));
        if (drop > 0 && lanes_of(equal))
            for (int64_t j = i; j < i + 32 && drop > 0; j++)
                if (magnitude(x[j]) == threshold) mask[j] = 0, drop--;
    }
    return mask_magnitudes(x + i, n - i, threshold, drop, mask + i);
}

/* The lane of each lane's neighbour `by` places on, within groups of M lanes. */
FC_INLINE __m256i rotation(int by, int M) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), last = _mm256_set1_epi32(M - 1);
    const __m256i turned = _mm256_and_si256(_mm256_add_epi32(lane, _mm256_set1_epi32(by)), last);
    return _mm256_or_si256(_mm256_andnot_si256(last, lane), turned);
}

/* Which of 8 magnitudes are beaten by fewer than `keep` others of their group of M. A neighbour that comes later need only be
 * equal, one that comes earlier must be larger. */
FC_INLINE __m256i best_of(__m256i bits, __m256i keep, int M) {
    const __m256i lane = rotation(0, M);
    __m256i left = keep;
#pragma GCC unroll 8
    for (int by = 1; by < M; by++) {
        const __m256i from = rotation(by, M), other = _mm256_permutevar8x32_epi32(bits, from);
        const __m256i bar = _mm256_add_epi32(bits, _mm256_cmpgt_epi32(from, lane)); /* a later one: its own magnitude less 1 */
        left = _mm256_add_epi32(left, _mm256_cmpgt_epi32(other, bar));
    }
    return _mm256_cmpgt_epi32(left, _mm256_setzero_si256());
}

FC_INLINE int mask_groups(const float *x, int64_t n, int64_t keep, int M, uint8_t *mask) {
    const __m256i keeps = _mm256_set1_epi32((int)keep);
    __m256i largest = _mm256_setzero_si256();
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        __m256i kept[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            const __m256i bits = magnitudes(x + i + 8 * j);
            largest = _mm256_max_epi32(largest, bits);
            kept[j] = best_of(bits, keeps, M);
        }
        _mm256_storeu_si256((__m256i *)(mask + i), bytes_of(kept, 0));
    }
    return holds_nan(largest) | mask_n_of_m(x + i, n - i, keep, M, mask + i);
}

static int mask_n_of_m_f32_avx2(const float *x, int64_t n, int64_t keep, int64_t of, uint8_t *mask) {
    switch (of) {
    case 2: return mask_groups(x, n, keep, 2, mask);
    case 4: return mask_groups(x, n, keep, 4, mask);
    case 8: return mask_groups(x, n, keep, 8, mask);
    default: return mask_n_of_m(x, n, keep, of, mask);
    }
}

static void sum_block_squares_f32_avx2(const float *weight, const float *norms, int64_t columns, int64_t block_rows,
                                       int64_t block_cols, float *out) {
    sum_block_squares(weight, norms, columns, block_rows, block_cols, out);
}

static void scale_magnitudes_f32_avx2(const float *x, const float *norms, int64_t n, float *out) {
    scale_magnitudes(x, norms, n, out);
}

/* Blocks of four columns, two at a time: each byte of the mask becomes four lanes, which the compiler does not find. */
static void apply_mask_f32_avx2(float *x, const uint8_t *mask, int64_t columns, int64_t block_cols) {
    int64_t j = 0;
    for (; block_cols == 4 && j + 2 <= columns; j += 2) {
        const __m256i bytes = _mm256_setr_m128i(_mm_set1_epi32(mask[j]), _mm_set1_epi32(mask[j + 1]));
        const __m256i dropped = _mm256_cmpeq_epi32(bytes, _mm256_setzero_si256());
        _mm256_storeu_ps(x + 4 * j, _mm256_andnot_ps(_mm256_castsi256_ps(dropped), _mm256_loadu_ps(x + 4 * j)));
    }
    apply_mask(x + j * block_cols, mask + j, columns - j, block_cols);
}

FC_TARGET_END

void fc_prune_install_avx2(fc_table *table) {
    FC_INSTALL(table, count_magnitudes_f32, avx2);
    FC_INSTALL(table, collect_magnitudes_f32, avx2);
    FC_INSTALL(table, mask_magnitudes_f32, avx2);
    FC_INSTALL(table, mask_n_of_m_f32, avx2);
    FC_INSTALL(table, sum_block_squares_f32, avx2);
    FC_INSTALL(table, scale_magnitudes_f32, avx2);
    FC_INSTALL(table, apply_mask_f32, avx2);
}
#else
void fc_prune_install_avx2(fc_table *table) { (void)table; }
#endif
