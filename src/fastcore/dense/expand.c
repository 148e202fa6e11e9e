/* Compressed weights as dense tiles: the only reader of blocks, bitmasks and codes in this family. */
#include <string.h>

#include "../fastcore.h"

static int is_bitmask(const fc_weight *w) {
    return w->kind == FC_BITMASK_F32 || w->kind == FC_BITMASK_S8 || w->kind == FC_BITMASK_S4;
}

static int64_t bits_before(const uint8_t *bits, int64_t col) {
    int64_t count = 0;
    for (int64_t i = 0; i < col / 8; i++) count += __builtin_popcount(bits[i]);
    return col % 8 ? count + __builtin_popcount(bits[col / 8] & ((1 << col % 8) - 1)) : count;
}

void fc_weight_seek(const fc_weight *weight, int64_t row, int64_t rows, int64_t col, int32_t *cursor) {
    if (is_bitmask(weight))
        for (int64_t r = 0; r < rows; r++)
            cursor[r] = (int32_t)bits_before(weight->bitmask + (row + r) * ((weight->k + 7) / 8), col);
    if (weight->kind != FC_BLOCKS_F32 && weight->kind != FC_BLOCKS_S8) return;
    const int64_t first = row / weight->block_rows, last = rows ? (row + rows - 1) / weight->block_rows : first - 1;
    for (int64_t g = first; g <= last; g++) {
        int32_t low = weight->row_offsets[g], high = weight->row_offsets[g + 1];
        while (low < high) {
            const int32_t middle = low + (high - low) / 2;
            if (((int64_t)weight->index[middle] + 1) * weight->block_cols <= col)
                low = middle + 1;
            else
                high = middle;
        }
        cursor[g - first] = low;
    }
}

/* Write columns [from, to) of one row of block b, whose column 0 is out[0]. */
static void expand_block_row(const fc_weight *weight, int64_t b, int64_t row_in_block, int64_t from, int64_t to, float scale,
                             float *out) {
    const int64_t at = (b * weight->block_rows + row_in_block) * weight->block_cols;
    if (weight->kind == FC_BLOCKS_F32) {
        const float *values = (const float *)weight->values + at;
        if (to - from == 4)
            memcpy(out + from, values + from, 4 * sizeof(float));
        else
            for (int64_t j = from; j < to; j++) out[j] = values[j];
    } else {
        const int8_t *codes = (const int8_t *)weight->values + at;
        for (int64_t j = from; j < to; j++) out[j] = (float)codes[j] * scale;
    }
}

/* One row of columns [col, col + cols) from block `b` on; returns the block at which the row of the next columns begins. */
static int32_t expand_row(const fc_weight *weight, int64_t row, int64_t col, int64_t cols, float scale, float *out, int32_t b) {
    const int64_t group = row / weight->block_rows, row_in_block = row % weight->block_rows, width = weight->block_cols;
    const int32_t end = weight->row_offsets[group + 1];
    memset(out, 0, (size_t)cols * sizeof *out);
    for (; b < end; b++) {
        const int64_t first = weight->index[b] * width - col;
        if (first >= cols) break;
        const int64_t from = first < 0 ? -first : 0, to = first + width > cols ? cols - first : width;
        if (first < 0)
            expand_block_row(weight, b, row_in_block, from, to, scale, out - from);
        else
            expand_block_row(weight, b, row_in_block, 0, to, scale, out + first);
        if (first + width > cols) break;
    }
    return b;
}

static void widen_bf16(const uint16_t *halves, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = (uint32_t)halves[i] << 16;
        memcpy(&out[i], &bits, 4);
    }
}

/* The number that stored element `at` of a row stands for in column `col`, but for the row's own scale or gain. */
static float bitmask_value(const fc_weight *w, int64_t row, int64_t col, int64_t at) {
    if (w->kind == FC_BITMASK_F32) return ((const float *)w->values)[at];
    if (w->kind == FC_BITMASK_S8) return ((const int8_t *)w->values)[at];
    const int nibble = ((const uint8_t *)w->values)[at / 2] >> at % 2 * 4 & 15;
    return (float)((nibble ^ 8) - 8) *
           fc_int4_scale(w->group_scales, w->wide, row * fc_int4_groups(w->k, w->group) + col / w->group);
}

/* One row of columns [col, col + cols) from the row's stored element `next` on; returns the one after them. */
static int32_t expand_bitmask_row(const fc_weight *w, int64_t row, int64_t col, int64_t cols, float scale, float *out,
                                  int32_t next) {
    const uint8_t *bits = w->bitmask + row * ((w->k + 7) / 8);
    for (int64_t i = 0; i < cols; i++)
        out[i] =
            bits[(col + i) / 8] >> (col + i) % 8 & 1 ? bitmask_value(w, row, col + i, w->row_starts[row] + next++) * scale : 0.0f;
    return next;
}

static float bitmask_scale(const fc_weight *w, int64_t row) {
    return w->kind != FC_BITMASK_F32 && w->scale ? w->scale[row] : 1.0f;
}

void fc_weight_expand(const fc_weight *weight, int64_t row, int64_t rows, int64_t col, int64_t cols, int scaled, float *out,
                      int64_t stride, int32_t *cursor) {
    const int is_s8 = weight->kind == FC_DENSE_S8 || weight->kind == FC_BLOCKS_S8;
    int32_t next = 0;
    for (int64_t r = 0; r < rows; r++, out += stride) {
        const float scale = is_s8 && scaled ? weight->scale[row + r] : 1.0f;
        if (weight->kind == FC_DENSE_S8) {
            fc_kernels.expand_s8_f32((const int8_t *)weight->values + (row + r) * weight->k + col, scale, cols, out);
            continue;
        }
        if (is_bitmask(weight)) {
            cursor[r] =
                expand_bitmask_row(weight, row + r, col, cols, scaled ? bitmask_scale(weight, row + r) : 1.0f, out, cursor[r]);
            continue;
        }
        if (weight->kind == FC_DENSE_BF16) {
            widen_bf16((const uint16_t *)weight->values + (row + r) * weight->k + col, cols, out);
            continue;
        }
        /* The rows of a group start from the same block; the cursor moves on when the last of them is done. */
        int32_t *at = cursor + ((row + r) / weight->block_rows - row / weight->block_rows);
        next = expand_row(weight, row + r, col, cols, scale, out, *at);
        if (r + 1 == rows || (row + r + 1) % weight->block_rows == 0) *at = next;
    }
}
