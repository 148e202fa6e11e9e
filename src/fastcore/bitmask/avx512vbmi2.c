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

enum { AHEAD = 1024 }; /* bytes that a prefetch runs ahead: the streams are long, and past their end it does no harm */

/* One chunk, spread out from *values, which moves on. Nibbles: 1 for the lower, 2 for the upper; 0 for whole bytes. */
FC_INLINE __m512i spread(const uint8_t **values, const uint8_t *at, int nibble) {
    const __m512i upper = _mm512_set1_epi8((char)0xf0);
    uint64_t mask;
    memcpy(&mask, at, sizeof mask);
    __asm__("" : "+r"(mask)); /* loaded once, for both its uses */
    __m512i packed = _mm512_loadu_si512(*values);
    *values += __builtin_popcountll(mask);
    if (nibble == 1) packed = _mm512_and_si512(_mm512_slli_epi16(packed, 4), upper);
    if (nibble == 2) packed = _mm512_and_si512(packed, upper);
    return _mm512_maskz_expand_epi8(mask, packed);
}

/* Multiply R rows of codes, a dword of each, by a chunk. */
FC_INLINE void multiply_chunk(const uint8_t *codes, __m512i weights, int R, __m512i *sums) {
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
        int32_t dword;
        memcpy(&dword, codes + r * 4, sizeof dword);
        sums[r] = _mm512_dpbusd_epi32(sums[r], _mm512_set1_epi32(dword), weights);
    }
}

FC_INLINE void clear(__m512i *sums, int count) {
#pragma GCC unroll 12
    for (int i = 0; i < count; i++) sums[i] = _mm512_setzero_si512();
}

/* Add the sets behind the first to it. */
FC_INLINE void gather(__m512i *sums, int R, int splits) {
#pragma GCC unroll 12
    for (int i = R; i < R * splits; i++) sums[i % R] = _mm512_add_epi32(sums[i % R], sums[i]);
}

FC_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* R rows of x from `first_row` on, `step` bytes of codes to a chunk; `splits` sets of sums take turns. */
FC_INLINE void multiply_s8(const fc_bitmask_tile *t, int first_row, int64_t step, int R, int splits) {
    const uint8_t *values = t->stream, *codes = t->codes + first_row * 4;
    __m512i sums[12];
    clear(sums, R * splits);
    for (int64_t first = 0; first < t->k4; first += t->group) {
        const int64_t chunks = smaller(t->group, t->k4 - first);
        const uint8_t *masks = values;
        values += chunks * 8;
        int64_t c = 0;
        for (; c + 4 <= chunks; c += 4, codes += 4 * step) {
            _mm_prefetch((const char *)values + AHEAD, _MM_HINT_T0);
            _mm_prefetch((const char *)values + AHEAD + 64, _MM_HINT_T0);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++)
                multiply_chunk(codes + i * step, spread(&values, masks + (c + i) * 8, 0), R, sums + i % splits * R);
        }
        for (; c < chunks; c++, codes += step) multiply_chunk(codes, spread(&values, masks + c * 8, 0), R, sums);
    }
    gather(sums, R, splits);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) _mm512_store_si512((int32_t *)t->sums + (first_row + r) * FC_BITMASK_ROWS, sums[r]);
}

/* A segment of `chunks` chunks into a chain for each row; returns where the next begins. Chunks of low and of high nibbles go
 * side by side, each with sums of their own where there is more than one set. */
FC_INLINE const uint8_t *add_segment(const fc_bitmask_tile *t, const uint8_t *at, const uint8_t *codes, int64_t chunks,
                                     int64_t step, int R, int splits, __m512 *chain) {
    const int64_t lower = (chunks + 1) / 2, upper = chunks - lower;
    const uint8_t *masks = at + (t->wide ? 64 : 32), *low = masks + chunks * 8, *high = low;
    const uint8_t *high_masks = masks + lower * 8, *high_codes = codes + lower * step;
    const __m512 scale = t->wide ? _mm512_loadu_ps(at) : _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at));
    __m512i sums[12];
    clear(sums, R * splits);
    int64_t c = 0;
    for (; c + 4 <= upper; c += 4) {
        _mm_prefetch((const char *)low + AHEAD, _MM_HINT_T0);
        _mm_prefetch((const char *)low + AHEAD + 64, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            multiply_chunk(codes + (c + i) * step, spread(&low, masks + (c + i) * 8, 1), R, sums + i * 2 % splits * R);
            multiply_chunk(high_codes + (c + i) * step, spread(&high, high_masks + (c + i) * 8, 2), R,
                           sums + (i * 2 + 1) % splits * R);
        }
    }
    for (; c < upper; c++) {
        multiply_chunk(codes + c * step, spread(&low, masks + c * 8, 1), R, sums);
        multiply_chunk(high_codes + c * step, spread(&high, high_masks + c * 8, 2), R, sums);
    }
    if (lower > upper) multiply_chunk(codes + c * step, spread(&low, masks + c * 8, 1), R, sums);
    gather(sums, R, splits);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) chain[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_srai_epi32(sums[r], 4)), scale, chain[r]);
    return low > high ? low : high;
}

FC_INLINE void multiply_s4(const fc_bitmask_tile *t, int first_row, int64_t step, int R, int splits) {
    const uint8_t *at = t->stream, *codes = t->codes + first_row * 4;
    __m512 chain[12];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) chain[r] = _mm512_setzero_ps();
    int64_t first = 0;
    if (t->group == 8) /* groups of 32 columns are short: their loop is unrolled */
        for (; first + 8 <= t->k4; first += 8, codes += 8 * step) at = add_segment(t, at, codes, 8, step, R, splits, chain);
    for (; first < t->k4; first += t->group, codes += t->group * step)
        at = add_segment(t, at, codes, smaller(t->group, t->k4 - first), step, R, splits, chain);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) _mm512_store_ps((float *)t->sums + (first_row + r) * FC_BITMASK_ROWS, chain[r]);
}

/* Instances for a constant number of rows of x, each a function of its own: side by side in one they would spill registers. */
#define ALONE static __attribute__((noinline)) void

ALONE s8_by_1(const fc_bitmask_tile *t) { multiply_s8(t, 0, 4, 1, 4); }
ALONE s8_by_2(const fc_bitmask_tile *t) { multiply_s8(t, 0, 8, 2, 2); }
ALONE s8_by_3(const fc_bitmask_tile *t) { multiply_s8(t, 0, 12, 3, 2); }
ALONE s8_by_4(const fc_bitmask_tile *t) { multiply_s8(t, 0, 16, 4, 2); }
ALONE s8_by_12(const fc_bitmask_tile *t) { multiply_s8(t, 0, 48, 12, 1); }
ALONE s8_four_of(const fc_bitmask_tile *t, int row) { multiply_s8(t, row, t->rows * 4, 4, 2); }
ALONE s8_one_of(const fc_bitmask_tile *t, int row) { multiply_s8(t, row, t->rows * 4, 1, 4); }

ALONE s4_by_1(const fc_bitmask_tile *t) { multiply_s4(t, 0, 4, 1, 4); }
ALONE s4_by_2(const fc_bitmask_tile *t) { multiply_s4(t, 0, 8, 2, 2); }
ALONE s4_by_3(const fc_bitmask_tile *t) { multiply_s4(t, 0, 12, 3, 2); }
ALONE s4_by_4(const fc_bitmask_tile *t) { multiply_s4(t, 0, 16, 4, 2); }
ALONE s4_by_12(const fc_bitmask_tile *t) { multiply_s4(t, 0, 48, 12, 1); }
ALONE s4_four_of(const fc_bitmask_tile *t, int row) { multiply_s4(t, row, t->rows * 4, 4, 2); }
ALONE s4_one_of(const fc_bitmask_tile *t, int row) { multiply_s4(t, row, t->rows * 4, 1, 4); }

static void multiply_bitmask_u8_s8_avx512vbmi2(const fc_bitmask_tile *t) {
    int r = 0;
    switch (t->rows) {
    case 1: s8_by_1(t); return;
    case 2: s8_by_2(t); return;
    case 3: s8_by_3(t); return;
    case 4: s8_by_4(t); return;
    case 12: s8_by_12(t); return;
    default: break;
    }
    for (; r + 4 <= t->rows; r += 4) s8_four_of(t, r);
    for (; r < t->rows; r++) s8_one_of(t, r);
}

static void multiply_bitmask_u8_s4_avx512vbmi2(const fc_bitmask_tile *t) {
    int r = 0;
    switch (t->rows) {
    case 1: s4_by_1(t); return;
    case 2: s4_by_2(t); return;
    case 3: s4_by_3(t); return;
    case 4: s4_by_4(t); return;
    case 12: s4_by_12(t); return;
    default: break;
    }
    for (; r + 4 <= t->rows; r += 4) s4_four_of(t, r);
    for (; r < t->rows; r++) s4_one_of(t, r);
}

FC_TARGET_END

void fc_bitmask_install_avx512vbmi2(fc_table *table) {
    FC_INSTALL(table, multiply_bitmask_u8_s8, avx512vbmi2);
    FC_INSTALL(table, multiply_bitmask_u8_s4, avx512vbmi2);
}
#else
void fc_bitmask_install_avx512vbmi2(fc_table *table) { (void)table; }
#endif
