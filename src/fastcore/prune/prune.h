/* The prune family: scores of weights, and the masks that keep the best of them.
 *
 * Magnitudes are the bits of a float32 with the sign cleared, which order as the numbers do. Of equal ones that of the lowest
 * index goes first, everywhere.
 */
#ifndef FC_PRUNE_H
#define FC_PRUNE_H

#include <stdint.h>

#include "../status.h"

/* ---- magnitudes ---- */

typedef struct fc_magnitude_counts {
    int64_t below, nan;
    int64_t *buckets;
} fc_magnitude_counts;

/* Add to `counts` what x[n] holds: below low, NaN, and in each of `buckets` buckets of 1 << shift magnitudes from low on.
 * x of any alignment; low + (buckets << shift) <= 1 << 31. Exact. */
typedef void fc_count_magnitudes_f32_fn(const float *x, int64_t n, uint32_t low, int shift, int64_t buckets,
                                        fc_magnitude_counts *counts);

typedef struct fc_magnitude_members {
    int64_t below, nan, inside;
    uint32_t *member; /* the first `capacity` of those inside; room for 16 more, which may be overwritten */
    int64_t capacity;
} fc_magnitude_members;

/* Add to `members` what x[n] holds: below low, NaN, and the magnitudes low <= bits < low + width in their order.
 * x of any alignment; low + width <= 1 << 31. Exact. */
typedef void fc_collect_magnitudes_f32_fn(const float *x, int64_t n, uint32_t low, uint32_t width, fc_magnitude_members *members);

/* mask[n] = 1 where the magnitude of x exceeds `threshold`, 0 where it is below; of those equal to it the first `drop` become 0,
 * the rest 1. Any alignment, no overlap. Returns how many of `drop` are left. Exact. */
typedef int64_t fc_mask_magnitudes_f32_fn(const float *x, int64_t n, uint32_t threshold, int64_t drop, uint8_t *mask);

/* mask[n] = 1 for the `keep` largest magnitudes of each `of` neighbours, 0 for the rest; n is a multiple of `of`, 0 <= keep <=
 * of. Any alignment, no overlap. Returns whether x holds a NaN; the mask is then unspecified. Exact. */
typedef int fc_mask_n_of_m_f32_fn(const float *x, int64_t n, int64_t keep, int64_t of, uint8_t *mask);

/* ---- scores ---- */

/* out[columns] = the sum of squares of each block of block_rows x block_cols in weight[block_rows][columns * block_cols], whose
 * columns are multiplied by norms[columns * block_cols] before, unless that is NULL.
 * Blocks of four columns pair them, (0 + 1) + (2 + 3); else columns and rows add up in order. No fused operations: exact. */
typedef void fc_sum_block_squares_f32_fn(const float *weight, const float *norms, int64_t columns, int64_t block_rows,
                                         int64_t block_cols, float *out);

/* out[n] = |x[n] * norms[n]|. No overlap. Exact. */
typedef void fc_scale_magnitudes_f32_fn(const float *x, const float *norms, int64_t n, float *out);

/* ---- masks applied ---- */

/* x[columns * block_cols] = 0 where mask[columns] of its block is 0. Any alignment. Exact. */
typedef void fc_apply_mask_f32_fn(float *x, const uint8_t *mask, int64_t columns, int64_t block_cols);

#define FC_PRUNE_SLOTS(SLOT)                                                                                                     \
    SLOT(count_magnitudes_f32)                                                                                                   \
    SLOT(collect_magnitudes_f32)                                                                                                 \
    SLOT(mask_magnitudes_f32)                                                                                                    \
    SLOT(mask_n_of_m_f32) SLOT(sum_block_squares_f32) SLOT(scale_magnitudes_f32) SLOT(apply_mask_f32)

/* ---- drivers ---- */

/* Vectors that count as one: element i of the whole is in the first of them that has not ended before it. */
typedef struct fc_vectors {
    const float *const *x;
    const int64_t *n;
    int64_t count, total;
} fc_vectors;

/* The k-th smallest magnitude (k from 1): its bits, how many are below it and how many equal it. */
typedef struct fc_selection {
    uint32_t bits;
    int64_t below, equal;
} fc_selection;

/* FC_BAD_ARGUMENT if x holds a NaN. 1 <= k <= total. */
fc_status fc_select_magnitude(const fc_vectors *x, int64_t k, int threads, fc_selection *found);
/* Exactly `drop` zeros in all masks[count][n], 0 <= drop <= total. FC_BAD_ARGUMENT if x holds a NaN. */
fc_status fc_magnitude_mask(const fc_vectors *x, int64_t drop, int threads, uint8_t *const *masks);
/* Exactly `drop` zeros in each row of mask[rows][columns], 0 <= drop <= columns. FC_BAD_ARGUMENT if x holds a NaN. */
fc_status fc_magnitude_mask_rows(const float *x, int64_t rows, int64_t columns, int64_t drop, int threads, uint8_t *mask);
/* FC_BAD_ARGUMENT if x holds a NaN. `of` divides n. */
fc_status fc_n_of_m_mask(const float *x, int64_t n, int64_t keep, int64_t of, int threads, uint8_t *mask);

typedef struct fc_block_grid {
    float *weight; /* [n][k]; read only by the scores */
    int64_t n, k, block_rows, block_cols;
    const float *norms;  /* [k] or NULL */
    const uint8_t *mask; /* [n / block_rows][k / block_cols] */
    float *out;          /* the same */
} fc_block_grid;
void fc_block_magnitudes(const void *grid, int rank, int size);
/* Blocks of one element: out = |weight * norms|. */
void fc_channel_magnitudes(const void *grid, int rank, int size);
void fc_apply_mask(const void *grid, int rank, int size);

struct fc_table;
void fc_prune_install_scalar(struct fc_table *table);
void fc_prune_install_avx2(struct fc_table *table);
void fc_prune_install_avx512(struct fc_table *table);

#endif
