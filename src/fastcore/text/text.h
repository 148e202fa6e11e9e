/* What text encoders need beside products and attention: rows of tables by index, and one vector for each sequence.
 *
 * All arrays are float32, contiguous and of any alignment; tables may be int4, of which the rows asked for are expanded. Sums along a row run in 16 lanes on every ISA and fold in one tree,
 * so that every slot is bit-equal across ISAs. Everything here is bound by memory.
 */
#ifndef FC_TEXT_H
#define FC_TEXT_H

#include <stdint.h>

#include "../int4/int4.h"
#include "../nn/nn.h"
#include "../status.h"

/* ---- leaf kernels: single-threaded, no overlap ---- */

/* out[j] += weight * x[j], fused. */
typedef void fc_accumulate_f32_fn(const float *x, float weight, int64_t n, float *out);
/* out[j] = the larger of out[j] and x[j]; NaN if either is. */
typedef void fc_maximum_f32_fn(const float *x, int64_t n, float *out);
/* sums = {x . x, x . y, y . y}. */
typedef void fc_dots_f32_fn(const float *x, const float *y, int64_t n, float sums[3]);
/* out[j] = a * x[j] + b * y[j], the second product fused; out may be x or y. */
typedef void fc_combine_f32_fn(const float *x, float a, const float *y, float b, int64_t n, float *out);

#define FC_TEXT_SLOTS(SLOT)                                                                                                      \
    SLOT(accumulate_f32)                                                                                                         \
    SLOT(maximum_f32)                                                                                                            \
    SLOT(dots_f32)                                                                                                               \
    SLOT(combine_f32)

/* ---- steps (drive.c) ---- */

/* An array of int64 or int32. */
typedef struct fc_indices {
    const void *values;
    int wide;
} fc_indices;

/* Rows of data [outer, places, inner] by `count` indices along the middle axis; negative ones count from its end. The row of an
 * index outside of [-places, places) is NaN, and nothing is added for it. */
typedef struct fc_gather {
    int64_t outer, places, inner, count;
    fc_indices indices;
    const float *data;           /* or dy [outer, count, inner] */
    const fc_int4_weight *table; /* instead of data, or NULL: outer is 1 */
    float *out;        /* [outer, count, inner], or the gradient [outer, places, inner] */
} fc_gather;
void fc_text_gather(const void *args, int rank, int size);
void fc_text_gather_grad(const void *args, int rank, int size); /* added up in the order of the indices */

/* out [count, n] = the sum over tables t [places_t, n] of their rows by count indices each. */
enum { FC_TABLES = 4 };
typedef struct fc_lookups {
    int64_t tables, count, n;
    int64_t places[FC_TABLES];
    fc_indices indices[FC_TABLES];
    const float *data[FC_TABLES];
    const fc_int4_weight *packed[FC_TABLES]; /* instead of data, or NULL */
    float *out;
} fc_lookups;
void fc_text_lookups(const void *args, int rank, int size);

typedef enum fc_pooling { FC_POOL_MEAN, FC_POOL_SQRT, FC_POOL_WEIGHTED, FC_POOL_MAX, FC_POOL_FIRST } fc_pooling;

/* One vector for each of `segments` sequences. With offsets [segments + 1] they lie packed in `rows` rows, what leads out of them
 * being cut off; else they are `length` rows each and the mask says which count. A sequence without tokens gives zeros. */
typedef struct fc_token_pool {
    fc_pooling mode;
    int64_t segments, length, rows, n;
    const float *x, *dy;
    const void *mask; /* [segments, length]: nonzero counts */
    int mask_bytes;   /* of an item: 8 or 1 */
    const int64_t *offsets;
    float *out; /* [segments, n], or the gradient of x */
} fc_token_pool;
void fc_text_pool(const void *args, int rank, int size);
void fc_text_pool_grad(const void *args, int rank, int size);

/* Of m rows of n; x / norm, and its gradient from dy. Rows of zeros give zeros. */
void fc_text_normalize(const void *args, int rank, int size);      /* fc_rows */
void fc_text_normalize_grad(const void *args, int rank, int size); /* fc_rows */

/* The sum over rows of 1 - cosine of x and target, in chunks of FC_LOSS_ROWS, and its gradient; a row of zeros has cosine 0. */
void fc_text_cosine(const void *args, int rank, int size);      /* fc_loss */
void fc_text_cosine_grad(const void *args, int rank, int size); /* fc_loss */

struct fc_table;
void fc_text_install_scalar(struct fc_table *table);
void fc_text_install_avx2(struct fc_table *table);
void fc_text_install_avx512(struct fc_table *table);

#endif
