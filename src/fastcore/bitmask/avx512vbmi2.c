/* Codes under a bitmask with AVX-512 VBMI2 and VNNI.
 *
 * A chunk of 16 weight rows x 4 columns is one register: 64 bytes of packed codes are loaded (a load of their own: vpexpandb from
 * memory is several times slower), vpexpandb spreads them by the chunk's mask, and vpdpbusd multiplies them by a broadcast dword
 * of codes of x. popcnt of the mask says where the next chunk's codes begin; that chain is one addition long. Nibbles stay in the
 * upper half of their bytes, sixteen times their value, which spares extending their sign: low ones are shifted up, high ones
 * masked. For one row four independent sums cover the latency of vpdpbusd; about ten operations for 64 elements bind.
 */
#include <string.h>

#include "../fastcore.h"

#ifdef FC_X86
FC_TARGET_AVX512VBMI2

/* Where a rank of loads stands: packed codes, and the chunk of x. */
typedef struct reader {
    const uint8_t *values, *masks, *codes;
} reader;

/* One chunk, spread out. */
FC_INLINE __m512i next_chunk(reader *from, int nibble) {
    const __m512i upper = _mm512_set1_epi8((char)0xf0);
    uint64_t mask;
    memcpy(&mask, from->masks, sizeof mask);
    __m512i packed = _mm512_loadu_si512(from->values);
    from->values += __builtin_popcountll(mask);
    from->masks += 8;
    if (nibble == 1) packed = _mm512_and_si512(_mm512_slli_epi16(packed, 4), upper);
    if (nibble == 2) packed = _mm512_and_si512(packed, upper);
    return _mm512_maskz_expand_epi8(mask, packed);
}

FC_INLINE void add_chunk(reader *from, int nibble, int64_t step, int R, __m512i *sums) {
    const __m512i weights = next_chunk(from, nibble);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
        int32_t dword;
        memcpy(&dword, from->codes + r * 4, sizeof dword);
        sums[r] = _mm512_dpbusd_epi32(sums[r], _mm512_set1_epi32(dword), weights);
    }
    from->codes += step;
}

/* Sums of R rows of x in each of the first `splits` of four sets: chunk after chunk goes to the next set. */
FC_INLINE void add_chunks(reader *from, int64_t chunks, int nibble, int64_t step, int R, int splits, __m512i *sums) {
    int64_t c = 0;
    for (; c + splits <= chunks; c += splits)
#pragma GCC unroll 4
        for (int s = 0; s < splits; s++) add_chunk(from, nibble, step, R, sums + s * R);
    for (; c < chunks; c++) add_chunk(from, nibble, step, R, sums);
}

FC_INLINE void multiply_s8(const fc_bitmask_tile *t, int first_row, int R, int splits) {
    const int64_t step = t->rows * 4;
    const uint8_t *at = t->stream, *codes = t->codes + first_row * 4;
    __m512i sums[12];
#pragma GCC unroll 12
    for (int i = 0; i < R * splits; i++) sums[i] = _mm512_setzero_si512();
    for (int64_t first = 0; first < t->k4; first += t->group, codes += t->group * step) {
        const int64_t chunks = t->k4 - first < t->group ? t->k4 - first : t->group;
        reader from = {at + chunks * 8, at, codes};
        add_chunks(&from, chunks, 0, step, R, splits, sums);
        at = from.values;
    }
#pragma GCC unroll 12
    for (int i = R; i < R * splits; i++) sums[i % R] = _mm512_add_epi32(sums[i % R], sums[i]);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) _mm512_store_si512((int32_t *)t->sums + (first_row + r) * FC_BITMASK_ROWS, sums[r]);
}

/* The chunks of low and of high nibbles side by side, `lower` and `upper` of them: two readers of the same bytes. `pairs` of
 * them at a time, the high ones `apart` sums from the low ones. */
FC_INLINE void add_nibbles(reader *low, reader *high, int64_t lower, int64_t upper, int64_t step, int R, int pairs, int apart,
                           __m512i *sums) {
    int64_t c = 0;
    for (; c + pairs <= upper; c += pairs)
#pragma GCC unroll 2
        for (int p = 0; p < pairs; p++) {
            add_chunk(low, 1, step, R, sums + p * R);
            add_chunk(high, 2, step, R, sums + p * R + apart);
        }
    for (; c < upper; c++) {
        add_chunk(low, 1, step, R, sums);
        add_chunk(high, 2, step, R, sums);
    }
    if (lower > upper) add_chunk(low, 1, step, R, sums);
}

FC_INLINE void multiply_s4(const fc_bitmask_tile *t, int first_row, int R, int splits) {
    const int64_t step = t->rows * 4;
    const uint8_t *at = t->stream, *codes = t->codes + first_row * 4;
    __m512 chain[12];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) chain[r] = _mm512_setzero_ps();
    for (int64_t first = 0; first < t->k4; first += t->group, codes += t->group * step) {
        const int64_t chunks = t->k4 - first < t->group ? t->k4 - first : t->group, lower = (chunks + 1) / 2;
        const uint8_t *masks = at + (t->wide ? 64 : 32), *values = masks + chunks * 8;
        reader low = {values, masks, codes}, high = {values, masks + lower * 8, codes + lower * step};
        __m512i sums[12];
#pragma GCC unroll 12
        for (int i = 0; i < R * splits; i++) sums[i] = _mm512_setzero_si512();
        add_nibbles(&low, &high, lower, chunks - lower, step, R, splits == 4 ? 2 : 1, splits / 2 * R, sums);
#pragma GCC unroll 12
        for (int i = R; i < R * splits; i++) sums[i % R] = _mm512_add_epi32(sums[i % R], sums[i]);
        const __m512 scale = t->wide ? _mm512_loadu_ps(at) : _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at));
#pragma GCC unroll 12
        for (int r = 0; r < R; r++)
            chain[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_srai_epi32(sums[r], 4)), scale, chain[r]);
        at = low.values > high.values ? low.values : high.values;
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) _mm512_store_ps((float *)t->sums + (first_row + r) * FC_BITMASK_ROWS, chain[r]);
}

/* Rows that remain are multiplied by the largest instance that they fill: each pass spreads the weights anew. */
static void multiply_bitmask_u8_s8_avx512vbmi2(const fc_bitmask_tile *t) {
    for (int r = 0; r < t->rows;) {
        const int left = t->rows - r;
        if (left >= 12)
            multiply_s8(t, r, 12, 1), r += 12;
        else if (left >= 6)
            multiply_s8(t, r, 6, 1), r += 6;
        else if (left >= 4)
            multiply_s8(t, r, 4, 1), r += 4;
        else if (left == 3)
            multiply_s8(t, r, 3, 2), r += 3;
        else if (left == 2)
            multiply_s8(t, r, 2, 2), r += 2;
        else
            multiply_s8(t, r, 1, 4), r += 1;
    }
}

static void multiply_bitmask_u8_s4_avx512vbmi2(const fc_bitmask_tile *t) {
    for (int r = 0; r < t->rows;) {
        const int left = t->rows - r;
        if (left >= 12)
            multiply_s4(t, r, 12, 1), r += 12;
        else if (left >= 6)
            multiply_s4(t, r, 6, 1), r += 6;
        else if (left >= 4)
            multiply_s4(t, r, 4, 1), r += 4;
        else if (left == 3)
            multiply_s4(t, r, 3, 2), r += 3;
        else if (left == 2)
            multiply_s4(t, r, 2, 2), r += 2;
        else
            multiply_s4(t, r, 1, 4), r += 1;
    }
}

FC_TARGET_END

void fc_bitmask_install_avx512vbmi2(fc_table *table) {
    FC_INSTALL(table, multiply_bitmask_u8_s8, avx512vbmi2);
    FC_INSTALL(table, multiply_bitmask_u8_s4, avx512vbmi2);
}
#else
void fc_bitmask_install_avx512vbmi2(fc_table *table) { (void)table; }
#endif
