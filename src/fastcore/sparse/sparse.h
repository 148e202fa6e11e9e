/* The sparse family: weights in small blocks, and products with them.
 *
 * A block weight is read in its canonical form (weight.h): values and index are what the kernels want, so packing adds only where
 * the blocks of each row group fall among the K blocks of the loop, and the row sums of an int8 weight.
 */
#ifndef FC_SPARSE_H
#define FC_SPARSE_H

#include <stdint.h>

#include "../nn/activation.h"
#include "../quant/quant.h"
#include "../status.h"
#include "../weight.h"

enum {
    FC_LANES = 64,           /* columns of a tile: four 512-bit accumulators per weight row */
    FC_PANEL_ROWS = 192,     /* panel rows of a K block: 48 KiB, of which enough hits L1 */
    FC_L2_PANEL_ROWS = 1024, /* the same where a panel in L2 does: 256 KiB */
    FC_TILE_ROWS = 512,      /* weight rows whose accumulators (128 KiB) live on the stack at once */
};

/* ---- products, lanes along M ---- */

/* One tile of a product: `groups` row groups against one K block of `width` columns. */
typedef struct fc_blocks_tile {
    const void *panel;          /* [panel rows][stride] dwords: floats, or four codes of consecutive K; any alignment */
    int64_t stride;             /* at least width; 1 if width is */
    int64_t width;              /* 4, 16, 32, 48 or 64; for codes also 1 */
    const void *values;         /* blocks of [block_rows][block_cols] */
    const int32_t *index;       /* by block; its first panel row is (index - base) * block_cols, or index - base for codes */
    const int32_t *begin, *end; /* [groups]: the blocks of a group that fall into the panel */
    const int32_t *sums;        /* int8 only: [groups * block_rows] sums over the whole row */
    const int32_t *negatives;   /* int8 only: the same of the magnitudes of negative weights */
    const int32_t *zeros;       /* int8 only: [width] zero points, 64-byte aligned */
    void *sum;                  /* [groups * block_rows][width] float or int32, 64-byte aligned: the accumulators */
    int64_t groups;
    int32_t base, block_rows, block_cols;
    int32_t first; /* start from zero instead of from what `sum` holds */
} fc_blocks_tile;

/* sum += values x panel, blocks of 1x1, 1x4, 2x4 or 4x4. One fused multiply-add per stored value, in ascending K: exact. */
typedef void fc_multiply_blocks_f32_fn(const fc_blocks_tile *tile);
/* The same over codes (u8) and int8 values in -127..127, in blocks of 1x4, 2x4 or 4x4; sums start from -zeros[column] *
 * sums[row], so that they end as values x (codes - zeros). Exact modulo 2^32. */
typedef void fc_multiply_blocks_u8_s8_fn(const fc_blocks_tile *tile);

/* What becomes of finished accumulators, `count` columns of each of `rows` rows. out and residual hold them row by row, [rows]
 * [stride], or transposed, [count][stride]. out may be residual or, in the order of the sums, the sums. bias and residual may be
 * NULL. */
typedef struct fc_lanes_epilogue {
    const void *sum; /* [rows][width] float or int32 */
    int64_t width, count, rows, stride;
    int transposed;
    const float *scales, *weight_scale; /* int32 only: [count] by column, [rows] by row */
    const float *bias, *residual;       /* [rows], as out */
    float *out;
    fc_activation activation;
} fc_lanes_epilogue;

/* out = activation(sum + bias) + residual. Exact. */
typedef void fc_finish_lanes_f32_fn(const fc_lanes_epilogue *epilogue);
/* out = activation((float)sum * (scales * weight_scale) + bias) + residual. Exact: multiplications and additions in this order.
 */
typedef void fc_finish_lanes_s32_fn(const fc_lanes_epilogue *epilogue);

#define FC_SPARSE_SLOTS(SLOT) SLOT(multiply_blocks_f32) SLOT(multiply_blocks_u8_s8) SLOT(finish_lanes_f32) SLOT(finish_lanes_s32)
#define FC_SPARSE_TUNING

/* ---- drivers ---- */

/* Check row_offsets and index of a block weight before any kernel follows them. */
fc_status fc_blocks_validate(const fc_weight *weight, int64_t blocks);
/* How many entries of mask[count] are not 0. */
int64_t fc_blocks_count(const uint8_t *mask, int64_t count);
/* Gather the blocks of weight[n][k] where mask[n / r][k / c] is not 0. The caller has counted them: at most INT32_MAX. */
void fc_blocks_pack(const float *weight, const uint8_t *mask, int64_t n, int64_t k, int32_t block_rows, int32_t block_cols,
                    float *values, int32_t *row_offsets, int32_t *index);

typedef struct fc_unpack {
    fc_weight weight;
    float *out; /* [n][k] */
} fc_unpack;
void fc_blocks_unpack(const void *unpack, int rank, int size);

/* Column blocks per K block, and how many K blocks there are. */
typedef struct fc_blocks_split {
    int64_t columns, count;
} fc_blocks_split;
fc_blocks_split fc_blocks_split_k(const fc_weight *weight);
/* cuts[count + 1][n / block_rows]: the first block at or after each K block. For an int8 weight sums[2][n]: those of the weights,
 * and of the magnitudes of the negative ones; else NULL. */
void fc_blocks_prepare(const fc_weight *weight, int32_t *cuts, int32_t *sums);

typedef struct fc_sparse_linear {
    fc_weight weight;
    const int32_t *cuts, *sums;
    const void *x; /* float [k][m], or codes in a "lanes" panel (quant.h) */
    int64_t m;
    const float *scales, *weight_scale; /* codes only: [m], [n] */
    const int32_t *zeros;               /* codes only: [m], or NULL where all are 128 */
    const float *bias, *residual;       /* [n], as out; may be NULL */
    float *out;                         /* [n][m], or [m][n] if to_rows; may be residual, must not overlap x */
    int to_rows;
    fc_activation activation;
    /* Unless codes.codes is NULL the result becomes codes, of m rows of n in a "lanes" panel, and out is a tile [n][64] for each
     * of `tiles` ranks (more do nothing): no float32 of the result leaves the cache. No residual then, and not to_rows. With a
     * static scale nothing is written to out. */
    fc_quantize_activations_args codes;
    int64_t tiles;
} fc_sparse_linear;
void fc_sparse_linear_run(const void *linear, int rank, int size);

struct fc_table;
void fc_sparse_install_scalar(struct fc_table *table);
void fc_sparse_install_avx2(struct fc_table *table);
void fc_sparse_install_avx512(struct fc_table *table);
void fc_sparse_install_avx512vnni(struct fc_table *table);

#endif
