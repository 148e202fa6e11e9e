/* float32 values under a bitmask with AVX-512: sixteen values are loaded, vexpandps spreads them by sixteen bits of the mask, and
 * one fused multiply-add for each row of x follows. A row of the weight is summed in lanes, in two sets whatever the rows of x.
 * Reading the values binds long before the arithmetic does.
 */
#include <string.h>

#include "../fastcore.h"

#ifdef FC_X86
FC_TARGET_AVX512

enum { LANES = 16 };

/* Sixteen columns from `column` on. `careful`: read not a value more than the mask has bits. */
FC_INLINE void add_columns(const fc_bitmask_rows *t, const float **values, uint32_t mask, int64_t column, __mmask16 live, int R,
                           int careful, __m512 *sums) {
    const int count = __builtin_popcount(mask);
    const __m512 packed = careful ? _mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), *values) : _mm512_loadu_ps(*values);
    const __m512 spread = _mm512_maskz_expand_ps((__mmask16)mask, packed);
    *values += count;
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
        const float *x = t->x + r * t->k + column;
        sums[r] = _mm512_fmadd_ps(spread, live == 0xffff ? _mm512_loadu_ps(x) : _mm512_maskz_loadu_ps(live, x), sums[r]);
    }
}

/* The bits of the columns from `column` on, fewer than 64. */
FC_INLINE uint64_t last_bits(const uint8_t *bits, int64_t column, int64_t k) {
    uint64_t mask = 0;
    for (int64_t i = column / 8; i < (k + 7) / 8; i++) mask |= (uint64_t)bits[i] << (i * 8 - column);
    return mask;
}

FC_INLINE void multiply_row(const fc_bitmask_rows *t, int64_t row, int R, int careful) {
    const uint8_t *bits = t->bitmask + row * ((t->k + 7) / 8);
    const float *values = t->values + t->row_offsets[row];
    __m512 sums[8];
#pragma GCC unroll 8
    for (int i = 0; i < R * 2; i++) sums[i] = _mm512_setzero_ps();
    int64_t column = 0;
    for (; column + 64 <= t->k; column += 64) {
        uint64_t mask;
        memcpy(&mask, bits + column / 8, sizeof mask);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            add_columns(t, &values, mask >> (i * LANES) & 0xffff, column + i * LANES, 0xffff, R, careful, sums + i % 2 * R);
    }
    for (uint64_t mask = last_bits(bits, column, t->k); column < t->k; column += LANES, mask >>= LANES) {
        const int64_t left = t->k - column;
        const __mmask16 live = left >= LANES ? 0xffff : (__mmask16)((1u << left) - 1);
        add_columns(t, &values, mask & 0xffff, column, live, R, careful, sums);
    }
#pragma GCC unroll 8
    for (int i = R; i < R * 2; i++) sums[i % R] = _mm512_add_ps(sums[i % R], sums[i]);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) t->sums[r * t->stride + row] = _mm512_reduce_add_ps(sums[r]);
}

FC_INLINE void multiply_rows(const fc_bitmask_rows *t, int R) {
    for (int64_t row = 0; row < t->weight_rows; row++) {
        if (t->row_offsets[row + 1] + LANES <= t->count)
            multiply_row(t, row, R, 0);
        else
            multiply_row(t, row, R, 1);
    }
}

static void multiply_bitmask_f32_avx512(const fc_bitmask_rows *t) {
    switch (t->rows) {
    case 1: multiply_rows(t, 1); break;
    case 2: multiply_rows(t, 2); break;
    case 3: multiply_rows(t, 3); break;
    default: multiply_rows(t, 4); break;
    }
}

FC_TARGET_END

void fc_bitmask_install_avx512(fc_table *table) { FC_INSTALL(table, multiply_bitmask_f32, avx512); }
#else
void fc_bitmask_install_avx512(fc_table *table) { (void)table; }
#endif
