/* Products of codes with at most four columns, in 128-bit registers: a wider load would take the load ports longer for nothing.
 *
 * Include it inside the target region of a file that has defined dot(sum, codes, weights): sum plus, in each of four lanes, four
 * codes times four weights. One column alone has its blocks side by side in the lanes, so that the loads of index and codes bind:
 * two and a quarter for each 1x4 block, three for a 4x4 block.
 */
FC_INLINE int32_t dword_at(const void *bytes) {
    int32_t dword;
    memcpy(&dword, bytes, sizeof dword);
    return dword;
}

FC_INLINE const int8_t *weights_of(const fc_blocks_tile *t, int64_t b, int R) { return (const int8_t *)t->values + b * R * 4; }

FC_INLINE int32_t narrow_start(const fc_blocks_tile *t, int64_t row, int64_t column) {
    return (int32_t)(-(uint32_t)t->sums[row] * (uint32_t)t->zeros[column]);
}

/* ---- one column ---- */

FC_INLINE __m128i column_codes(const fc_blocks_tile *t, int64_t b) {
    return _mm_set1_epi32(dword_at((const uint8_t *)t->panel + (int64_t)(t->index[b] - t->base) * 4));
}

/* The codes of 4 / R blocks from b on, R lanes for each. */
FC_INLINE __m128i spread_codes(const fc_blocks_tile *t, int64_t b, int R) {
    if (R == 4) return column_codes(t, b);
    if (R == 2) return _mm_blend_epi32(column_codes(t, b), column_codes(t, b + 1), 12);
    const __m128i low = _mm_blend_epi32(column_codes(t, b), column_codes(t, b + 1), 2);
    return _mm_blend_epi32(low, _mm_blend_epi32(column_codes(t, b + 2), column_codes(t, b + 3), 8), 12);
}

FC_INLINE __m128i add_spread(const fc_blocks_tile *t, int64_t b, int R, __m128i sum) {
    return dot(sum, spread_codes(t, b, R), _mm_loadu_si128((const __m128i *)weights_of(t, b, R)));
}

/* The last blocks of a row group, fewer than 4 / R: the lanes beyond have no weight. */
FC_INLINE __m128i add_rest(const fc_blocks_tile *t, int64_t b, int64_t end, int R, __m128i sum) {
    const __m128i inside = _mm_cmpgt_epi32(_mm_set1_epi32((int32_t)(end - b) * R), _mm_setr_epi32(0, 1, 2, 3));
    const __m128i weights = _mm_maskload_epi32((const int *)weights_of(t, b, R), inside);
    __m128i codes = column_codes(t, b);
    if (R == 1) {
        codes = _mm_blend_epi32(codes, column_codes(t, b + 1 < end ? b + 1 : b), 2);
        codes = _mm_blend_epi32(codes, column_codes(t, end - 1), 12);
    }
    return dot(sum, codes, weights);
}

FC_INLINE void add_column(const fc_blocks_tile *t, int R) {
    const int P = 4 / R;
    for (int64_t g = 0; g < t->groups; g++) {
        __m128i sum[4] = {_mm_setzero_si128(), _mm_setzero_si128(), _mm_setzero_si128(), _mm_setzero_si128()};
        int32_t *sums = (int32_t *)t->sum + g * R, lanes[4];
        int64_t b = t->begin[g];
        const int64_t end = t->end[g];
        for (; b + 4 * P <= end; b += 4 * P)
#pragma GCC unroll 4
            for (int u = 0; u < 4; u++) sum[u] = add_spread(t, b + u * P, R, sum[u]);
        for (; b + P <= end; b += P) sum[0] = add_spread(t, b, R, sum[0]);
        if (R < 4 && b < end) sum[1] = add_rest(t, b, end, R, sum[1]);
        __m128i all = _mm_add_epi32(_mm_add_epi32(sum[0], sum[1]), _mm_add_epi32(sum[2], sum[3]));
        if (R <= 2) all = _mm_add_epi32(all, _mm_unpackhi_epi64(all, all));
        if (R == 1) all = _mm_add_epi32(all, _mm_shuffle_epi32(all, 1));
        _mm_storeu_si128((__m128i *)lanes, all);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const int32_t before = t->first ? narrow_start(t, g * R + r, 0) : sums[r];
            sums[r] = (int32_t)((uint32_t)lanes[r] + (uint32_t)before);
        }
    }
}

/* ---- up to four columns ---- */

FC_INLINE void add_narrow_block(const fc_blocks_tile *t, int64_t b, int R, __m128i *sum) {
    const uint8_t *x = (const uint8_t *)t->panel + (int64_t)(t->index[b] - t->base) * t->stride * 4;
    const __m128i codes = _mm_loadu_si128((const __m128i *)x);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) sum[r] = dot(sum[r], codes, _mm_set1_epi32(dword_at(weights_of(t, b, R) + r * 4)));
}

FC_INLINE void add_narrow_tile(const fc_blocks_tile *t, int R) {
    const int U = 4 / R;
    const __m128i zeros = _mm_loadu_si128((const __m128i *)t->zeros);
    for (int64_t g = 0; g < t->groups; g++) {
        __m128i sum[4], *sums = (__m128i *)t->sum + g * R;
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
            sum[r] = t->first ? _mm_mullo_epi32(_mm_set1_epi32((int32_t)-(uint32_t)t->sums[g * R + r]), zeros)
                              : _mm_load_si128(sums + r);
#pragma GCC unroll 4
        for (int i = R; i < U * R; i++) sum[i] = _mm_setzero_si128();
        int64_t b = t->begin[g];
        for (; b + U <= t->end[g]; b += U)
#pragma GCC unroll 4
            for (int u = 0; u < U; u++) add_narrow_block(t, b + u, R, sum + u * R);
        for (; b < t->end[g]; b++) add_narrow_block(t, b, R, sum);
#pragma GCC unroll 4
        for (int i = R; i < U * R; i++) sum[i % R] = _mm_add_epi32(sum[i % R], sum[i]);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) _mm_store_si128(sums + r, sum[r]);
    }
}

FC_INLINE void add_narrow(const fc_blocks_tile *t, int R) {
    if (t->width == 1)
        add_column(t, R);
    else
        add_narrow_tile(t, R);
}
