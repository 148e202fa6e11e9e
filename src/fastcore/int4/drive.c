/* Steps of the int4 family: packing, quantising in groups, and who multiplies which tiles. */
#include <stdlib.h>
#include <string.h>

#include "../fastcore.h"
#include "../parallel.h"

enum { BLOCK_BYTES = 1 << 18 }; /* codes of activations that stay in L2 while all panels pass */

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t panels_of(int64_t n) { return (n + FC_INT4_COLUMNS - 1) / FC_INT4_COLUMNS; }

/* ---- the packed weight ---- */

static int64_t scale_bytes(int wide) { return wide ? 4 : 2; }

static int64_t panel_bytes(int64_t k, int64_t group, int wide) {
    return FC_INT4_COLUMNS * (fc_int4_groups(k, group) * scale_bytes(wide) + fc_int4_octets(k) * 4);
}

int64_t fc_packed_int4_nbytes(const fc_int4_weight *w) { return panels_of(w->n) * panel_bytes(w->k, w->group, w->wide); }

fc_status fc_packed_int4_init(fc_packed_int4 *packed, const fc_int4_weight *w) {
    const int64_t nbytes = fc_packed_int4_nbytes(w);
    uint8_t *panels = fc_allocate_panels(nbytes);
    if (!panels) return FC_NO_MEMORY;
    *packed = (fc_packed_int4){w->n, w->k, w->group, nbytes, w->wide, panels};
    return FC_OK;
}

void fc_packed_int4_free(fc_packed_int4 *packed) {
    free(packed->panels);
    *packed = (fc_packed_int4){0};
}

/* Nibbles 0 to 3 of a word to the low halves of four bytes, nibbles 4 to 7 to the high ones. */
static uint32_t interleave(uint32_t word) {
    uint32_t low = word & 0xffff, high = word >> 16;
    low = (low | low << 8) & 0x00ff00ff;
    low = (low | low << 4) & 0x0f0f0f0f;
    high = (high | high << 8) & 0x00ff00ff;
    high = (high | high << 4) & 0x0f0f0f0f;
    return low | high << 4;
}

static void pack_column(const fc_int4_weight *w, int64_t row, uint8_t *panel, int64_t column) {
    const uint32_t *words = w->words + row * fc_int4_octets(w->k);
    const int64_t groups = fc_int4_groups(w->k, w->group), width = scale_bytes(w->wide);
    const char *scales = (const char *)w->scales + row * groups * width;
    for (int64_t g = 0, octet = 0; g < groups; g++) {
        const int64_t end = smaller(octet + w->group / 8, fc_int4_octets(w->k));
        memcpy(panel + column * width, scales + g * width, (size_t)width);
        panel += FC_INT4_COLUMNS * width;
        for (; octet < end; octet++, panel += FC_INT4_COLUMNS * 4) {
            const uint32_t dword = interleave(words[octet]);
            memcpy(panel + column * 4, &dword, 4);
        }
    }
}

void fc_pack_int4(const void *args, int rank, int size) {
    const fc_pack_int4_args *a = args;
    const fc_int4_weight *w = a->weight;
    const int64_t nbytes = panel_bytes(w->k, w->group, w->wide);
    int64_t begin, end;
    fc_partition(panels_of(w->n), 1, rank, size, &begin, &end);
    for (int64_t p = begin; p < end; p++) {
        uint8_t *panel = a->packed->panels + p * nbytes;
        const int64_t columns = smaller(FC_INT4_COLUMNS, w->n - p * FC_INT4_COLUMNS);
        if (columns < FC_INT4_COLUMNS) memset(panel, 0, (size_t)nbytes);
        for (int64_t j = 0; j < columns; j++) pack_column(w, p * FC_INT4_COLUMNS + j, panel, j);
    }
}

/* ---- activations ---- */

void fc_quantize_groups(const void *args, int rank, int size) {
    const fc_quantize_groups_args *a = args;
    const int64_t width = fc_int4_octets(a->k) * 8, groups = fc_int4_groups(a->k, a->group);
    int64_t begin, end;
    fc_partition(a->m, FC_INT4_ROWS, rank, size, &begin, &end);
    for (int64_t i = begin; i < end; i++) {
        const int64_t first = i / FC_INT4_ROWS * FC_INT4_ROWS, rows = smaller(FC_INT4_ROWS, a->m - first);
        const int64_t at = first * groups + i - first;
        fc_kernels.quantize_groups_f32_s8(a->x + i * a->k, a->k, a->group, rows, a->codes + first * width + (i - first) * 4,
                                          a->scales + at, a->offsets + at);
    }
}

/* ---- the product ---- */

static void run_panel(const fc_linear_int4_args *a, int64_t panel, int64_t first_row, int64_t last_row) {
    const fc_packed_int4 *w = a->weight;
    const int64_t column = panel * FC_INT4_COLUMNS, columns = smaller(FC_INT4_COLUMNS, w->n - column);
    const int64_t groups = fc_int4_groups(w->k, w->group), width = fc_int4_octets(w->k) * 8;
    float gain[FC_INT4_COLUMNS], bias[FC_INT4_COLUMNS];
    for (int64_t j = 0; j < FC_INT4_COLUMNS; j++) {
        gain[j] = j < columns && a->gain ? a->gain[column + j] : 1.0f;
        bias[j] = j < columns && a->bias ? a->bias[column + j] : -0.0f; /* x + -0 is x, for every x */
    }
    for (int64_t row = first_row; row < last_row; row += FC_INT4_ROWS) {
        const int64_t at = row * w->n + column;
        fc_kernels.linear_u4_s8_f32(&(fc_int4_tile){
            .codes = a->codes + row * width,
            .scales = a->scales + row * groups,
            .offsets = a->offsets + row * groups,
            .weight = w->panels + panel * panel_bytes(w->k, w->group, w->wide),
            .k = w->k,
            .group = w->group,
            .wide = w->wide,
            .rows = (int)smaller(FC_INT4_ROWS, a->m - row),
            .columns = (int)columns,
            .gain = gain,
            .bias = bias,
            .residual = a->residual ? a->residual + at : NULL,
            .out = a->out + at,
            .stride = w->n,
            .activation = a->activation,
        });
    }
}

/* The share of the slowest rank, in items of `across`, if `items` are dealt to `size` ranks. */
static int64_t slowest(int64_t items, int64_t across, int size) { return (items + size - 1) / size * across; }

void fc_linear_int4(const void *args, int rank, int size) {
    const fc_linear_int4_args *a = args;
    const int64_t tiles = (a->m + FC_INT4_ROWS - 1) / FC_INT4_ROWS, panels = panels_of(a->weight->n);
    int64_t first_row = 0, last_row = a->m, first_panel = 0, last_panel = panels;
    /* Each rank reads its own part of the weight unless that leaves some rank more to do. */
    if (slowest(panels, tiles, size) <= slowest(tiles, panels, size))
        fc_partition(panels, 1, rank, size, &first_panel, &last_panel);
    else
        fc_partition(a->m, FC_INT4_ROWS, rank, size, &first_row, &last_row);
    const int64_t tile_bytes = fc_int4_octets(a->weight->k) * 8 * FC_INT4_ROWS;
    const int64_t block = FC_INT4_ROWS * (tile_bytes > 0 && tile_bytes < BLOCK_BYTES ? BLOCK_BYTES / tile_bytes : 1);
    for (int64_t row = first_row; row < last_row; row += block)
        for (int64_t panel = first_panel; panel < last_panel; panel++) run_panel(a, panel, row, smaller(row + block, last_row));
}
