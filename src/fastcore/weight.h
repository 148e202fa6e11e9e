/* A weight as a driver reads it: an [n, k] matrix, dense, in blocks or under a bitmask; fp32, bf16, or codes with scales.
 *
 * The form is the canonical one that files hold and training updates in place; kernels that want another layout pack it,
 * once at plan time if the weight is constant, tile by tile inside the program if it is trainable.
 */
#ifndef FC_WEIGHT_H
#define FC_WEIGHT_H

#include <stdint.h>

typedef enum fc_weight_kind {
    FC_DENSE_F32,   /* values: float [n, k] */
    FC_DENSE_BF16,  /* values: the upper halves of float [n, k] */
    FC_DENSE_S8,    /* values: int8 [n, k], scale [n] */
    FC_BLOCKS_F32,  /* values: float [blocks, block_rows, block_cols] */
    FC_BLOCKS_S8,   /* the same in int8, scale [n] */
    FC_BITMASK_F32, /* values: float [row_starts[n]], the elements that `bitmask` marks, row after row */
    FC_BITMASK_S8,  /* the same in int8, scale [n] */
    FC_BITMASK_S4,  /* the same in nibbles, the lower first, with scales in groups; scale [n]: a gain on them, or NULL */
} fc_weight_kind;

/* Block b of row group g (rows g * block_rows ...) covers columns index[b] * block_cols ...; the blocks of group g are
 * row_offsets[g] <= b < row_offsets[g + 1], ascending in index. n and k are multiples of block_rows and block_cols. */
typedef struct fc_weight {
    fc_weight_kind kind;
    int64_t n, k;
    const void *values;
    const float *scale;
    const int32_t *row_offsets;
    const int32_t *index;
    int32_t block_rows, block_cols;
    /* Under a bitmask: bit i % 8 of byte i / 8 of a row marks column i; row_starts [n + 1] count the bits before each row. */
    const uint8_t *bitmask; /* [n, ceil(k / 8)] */
    const int64_t *row_starts;
    int64_t group;            /* int4: columns that share a scale */
    const void *group_scales; /* [n, ceil(k / group)] halves, or float if wide */
    int wide;
} fc_weight;

#endif
