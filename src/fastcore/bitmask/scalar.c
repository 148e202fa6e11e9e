/* The reference: bit by bit. */
#include <string.h>

#include "../fastcore.h"

static void load_scales(const uint8_t *at, int wide, float *scale) {
    uint16_t halves[FC_BITMASK_ROWS];
    memcpy(halves, at, sizeof halves);
    for (int i = 0; i < FC_BITMASK_ROWS; i++) scale[i] = fc_half(halves[i]);
    if (wide) memcpy(scale, at, FC_BITMASK_ROWS * sizeof *scale);
}

static uint64_t load_mask(const uint8_t *at) {
    uint64_t mask;
    memcpy(&mask, at, sizeof mask);
    return mask;
}

/* Add what one chunk comes to, its codes `bits` wide from bit `shift` of each byte on; returns the next chunk's values. */
static const uint8_t *add_chunk(const fc_bitmask_tile *t, int64_t chunk, uint64_t mask, const uint8_t *values, int bits,
                                int shift, int32_t sums[][FC_BITMASK_ROWS]) {
    for (; mask; mask &= mask - 1) {
        const int bit = __builtin_ctzll(mask), low = *values++ >> shift;
        const int weight = bits == 4 ? ((low & 15) ^ 8) - 8 : (int8_t)low;
        for (int r = 0; r < t->rows; r++) sums[r][bit / 4] += weight * t->codes[(chunk * t->rows + r) * 4 + bit % 4];
    }
    return values;
}

static void multiply_bitmask_u8_s8_scalar(const fc_bitmask_tile *t) {
    int32_t (*sums)[FC_BITMASK_ROWS] = t->sums;
    const uint8_t *at = t->stream;
    memset(sums, 0, (size_t)t->rows * sizeof *sums);
    for (int64_t first = 0; first < t->k4; first += t->group) {
        const int64_t chunks = t->k4 - first < t->group ? t->k4 - first : t->group;
        const uint8_t *masks = at;
        at += chunks * 8;
        for (int64_t c = 0; c < chunks; c++) at = add_chunk(t, first + c, load_mask(masks + c * 8), at, 8, 0, sums);
    }
}

static void multiply_bitmask_u8_s4_scalar(const fc_bitmask_tile *t) {
    float (*out)[FC_BITMASK_ROWS] = t->sums;
    const uint8_t *at = t->stream;
    memset(out, 0, (size_t)t->rows * sizeof *out);
    for (int64_t first = 0; first < t->k4; first += t->group) {
        const int64_t chunks = t->k4 - first < t->group ? t->k4 - first : t->group, lower = (chunks + 1) / 2;
        const uint8_t *masks = at + FC_BITMASK_ROWS * (t->wide ? 4 : 2), *low = masks + chunks * 8, *high = low;
        int32_t sums[12][FC_BITMASK_ROWS] = {{0}};
        float scale[FC_BITMASK_ROWS];
        load_scales(at, t->wide, scale);
        for (int64_t c = 0; c < chunks; c++) {
            const uint64_t mask = load_mask(masks + c * 8);
            if (c < lower)
                low = add_chunk(t, first + c, mask, low, 4, 0, sums);
            else
                high = add_chunk(t, first + c, mask, high, 4, 4, sums);
        }
        for (int r = 0; r < t->rows; r++)
            for (int j = 0; j < FC_BITMASK_ROWS; j++) out[r][j] = fc_fma((float)sums[r][j], scale[j], out[r][j]);
        at = low > high ? low : high;
    }
}

static void multiply_bitmask_f32_scalar(const fc_bitmask_rows *t) {
    for (int64_t row = 0; row < t->weight_rows; row++) {
        const uint8_t *bits = t->bitmask + row * ((t->k + 7) / 8);
        for (int r = 0; r < t->rows; r++) {
            const float *values = t->values + t->row_offsets[row];
            float sum = 0.0f;
            for (int64_t i = 0; i < t->k; i++)
                if (bits[i / 8] >> i % 8 & 1) sum = fc_fma(*values++, t->x[r * t->k + i], sum);
            t->sums[r * t->stride + row] = sum;
        }
    }
}

void fc_bitmask_install_scalar(fc_table *table) {
    FC_INSTALL(table, multiply_bitmask_f32, scalar);
    FC_INSTALL(table, multiply_bitmask_u8_s8, scalar);
    FC_INSTALL(table, multiply_bitmask_u8_s4, scalar);
}
