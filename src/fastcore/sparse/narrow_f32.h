/* Products with at most four columns, in 128-bit registers: a wider load would take the load ports longer for nothing.
 *
 * Include it inside the target region of a file with FMA.
 */
FC_INLINE void add_narrow_block_f32(const fc_blocks_tile *t, int64_t b, int R, int C, __m128 *sum) {
    const float *x = (const float *)t->panel + (int64_t)(t->index[b] - t->base) * C * t->stride;
    const float *w = (const float *)t->values + b * R * C;
#pragma GCC unroll 4
    for (int c = 0; c < C; c++)
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) sum[r] = _mm_fmadd_ps(_mm_set1_ps(w[r * C + c]), _mm_loadu_ps(x + c * t->stride), sum[r]);
}

/* G row groups from group g on, side by side while all have blocks left. */
FC_INLINE void add_narrow_groups_f32(const fc_blocks_tile *t, int64_t g, int G, int R, int C) {
    __m128 sum[8];
    float *sums = (float *)t->sum + g * R * 4;
    int64_t common = INT64_MAX;
#pragma GCC unroll 8
    for (int i = 0; i < G * R; i++) sum[i] = t->first ? _mm_setzero_ps() : _mm_load_ps(sums + i * 4);
#pragma GCC unroll 8
    for (int i = 0; i < G; i++) common = t->end[g + i] - t->begin[g + i] < common ? t->end[g + i] - t->begin[g + i] : common;
    for (int64_t b = 0; b < common; b++)
#pragma GCC unroll 8
        for (int i = 0; i < G; i++) add_narrow_block_f32(t, t->begin[g + i] + b, R, C, sum + i * R);
#pragma GCC unroll 8
    for (int i = 0; i < G; i++)
        for (int64_t b = t->begin[g + i] + common; b < t->end[g + i]; b++) add_narrow_block_f32(t, b, R, C, sum + i * R);
#pragma GCC unroll 8
    for (int i = 0; i < G * R; i++) _mm_store_ps(sums + i * 4, sum[i]);
}

FC_INLINE void add_narrow_tile_f32(const fc_blocks_tile *t, int R, int C) {
    const int G = 4 / R;
    int64_t g = 0;
    for (; g + G <= t->groups; g += G) add_narrow_groups_f32(t, g, G, R, C);
    for (; g < t->groups; g++) add_narrow_groups_f32(t, g, 1, R, C);
}
