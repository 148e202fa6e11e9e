/* The reference: what each slot means, in the shortest code. */
#include "../fastcore.h"
#include "body.h"

static int32_t product(const fc_int4_tile *t, const uint8_t *weight, int64_t first, int64_t octets, int row, int column) {
    int32_t acc = 0;
    for (int64_t i = 0; i < octets; i++)
        for (int b = 0; b < 4; b++) {
            const uint8_t byte = weight[(i * FC_INT4_COLUMNS + column) * 4 + b];
            const int8_t *codes = t->codes + ((first / 4 + 2 * i) * t->rows + row) * 4 + b;
            acc += (byte & 15) * codes[0] + (byte >> 4) * codes[t->rows * 4];
        }
    return acc;
}

static void linear_u4_s8_f32_scalar(const fc_int4_tile *t) {
    float sum[FC_INT4_ROWS][FC_INT8_COLUMNS] = {{0}};
    const uint8_t *weight = t->weight;
    for (int64_t g = 0, first = 0; first < t->k; g++, first += t->group) {
        const uint8_t *codes = weight + FC_INT4_COLUMNS * (t->wide ? 4 : 2);
        const int64_t octets = fc_int4_octets(group_length(t->k, t->group, first));
        for (int r = 0; r < t->rows; r++)
            for (int j = 0; j < FC_INT4_COLUMNS; j++) {
                const int32_t acc = t->offsets[g * t->rows + r] + product(t, codes, first, octets, r, j);
                const float scale = fc_int4_scale(weight, t->wide, j) * t->scales[g * t->rows + r];
                sum[r][j] = fc_fma((float)acc, scale, sum[r][j]);
            }
        weight = codes + octets * FC_INT4_COLUMNS * 4;
    }
    finish_int4(t, sum);
}

static void quantize_groups_f32_s8_scalar(const float *x, int64_t k, int64_t group, int64_t rows, int8_t *codes, float *scales,
                                          int32_t *offsets) {
    quantize_groups_body(x, k, group, rows, codes, scales, offsets);
}

static void expand_u4_f32_scalar(const fc_int4_weight *w, int64_t row, int add, float *out) {
    const uint32_t *words = w->words + row * fc_int4_octets(w->k);
    const int64_t groups = fc_int4_groups(w->k, w->group);
    for (int64_t j = 0; j < w->k; j++) {
        const float scale = fc_int4_scale(w->scales, w->wide, row * groups + j / w->group);
        const float value = (float)((int32_t)(words[j / 8] >> j % 8 * 4 & 15) - 8) * scale;
        out[j] = add ? out[j] + value : value;
    }
}

void fc_int4_install_scalar(fc_table *table) {
    FC_INSTALL(table, linear_u4_s8_f32, scalar);
    FC_INSTALL(table, quantize_groups_f32_s8, scalar);
    FC_INSTALL(table, expand_u4_f32, scalar);
}
