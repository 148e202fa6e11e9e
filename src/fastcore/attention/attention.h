/* Fused multi-head attention: softmax(scale q k^T) v and its gradients, one head at a time, without a score matrix in memory.
 *
 * Heads stay where the linear layers left them: row i of head h is x + i * heads * width + h * width. The driver turns the keys
 * of a head into panels, then walks blocks of query rows whose scores stay in L1: a product with the keys, exp, a product with
 * the values, whose rows are read in place. Every output is one chain of fused multiply-adds in ascending depth and every sum
 * along a row runs in 16 lanes, so that results depend neither on the thread count nor on how rows fall into blocks.
 * Dao et al., "FlashAttention", 2022 (the idea of fusing); a row of scores is whole here, for text is short.
 */
#ifndef FC_ATTENTION_H
#define FC_ATTENTION_H

#include <stdint.h>

#include "../status.h"

enum { FC_ATTENTION_PANEL = 32 /* columns of a panel of keys */, FC_ATTENTION_ROWS = 12 /* rows of a register tile, at most */ };

/* ---- slots: leaf kernels, one thread, arrays of any alignment, no overlap of inputs and outputs unless said ---- */

/* c[i * c_stride + j] = gain[i] * sum over d of a[i * a_row + d * a_step] * b[j / 32 * b_panel + d * b_step + j % 32], to which
 * c is added before if `accumulate`; gain may be NULL, for 1. The sum is one chain in ascending d, which starts from c: cutting
 * the depth in two calls gives the same bits. Reads nothing but existing columns of b. */
typedef struct fc_attention_product {
    int64_t rows, cols, depth;
    const float *a;
    int64_t a_row, a_step;
    const float *b;
    int64_t b_step, b_panel;
    float *c;
    int64_t c_stride;
    const float *gain;
    int accumulate;
} fc_attention_product;
typedef void fc_attention_product_f32_fn(const fc_attention_product *product);

/* panels[j / 32][d][j % 32] = keys[j * stride + d], j < count; the rest of the last panel is left to chance. Exact. */
typedef void fc_attention_panels_f32_fn(const float *keys, int64_t stride, int64_t count, int64_t width, float *panels);

/* x = exp2(factor * x - max(factor * x)) along each of `rows` rows of n >= 1, factor >= 0, in place; inverse[i] = 1 / the row's
 * sum. Results below the smallest normal number are 0; NaN makes its row NaN. Nothing past x[i * stride + n - 1] is written.
 * The error of a result is below 3 + 2 |log2 of it| units of 2^-24, that of the sum (n / 16 + 6) more; a factor common to the
 * row, which the inverse takes away again, may be off by 2^-24 * factor * max |x|. */
typedef void fc_attention_softmax_f32_fn(float *x, int64_t stride, int64_t rows, int64_t n, float factor, float *inverse);

/* p = inverse[i] * p, then dp = factor * p * (dp - sum of p * dp) along each row of n, both in place. */
typedef void fc_attention_softmax_grad_f32_fn(float *p, float *dp, int64_t stride, int64_t rows, int64_t n, const float *inverse,
                                              float factor);

/* The same in bf16 with float32 sums and softmax. A pair is two bf16 in 32 bits, the first in the low half; a lone last one has
 * a 0 beside it. Numbers are rounded to nearest even, subnormal ones to 0. */

/* c[i * c_stride + j] = gain[i] * sum over pairs d of a[i * a_row + d] * b[j / 32 * b_panel + d * 32 + j % 32], both of a pair;
 * gain may be NULL, for 1. The order of the additions is one for all i, j. Reads nothing but existing columns of b. */
typedef struct fc_attention_product16 {
    int64_t rows, cols, depth; /* the depth in pairs */
    const uint32_t *a;
    int64_t a_row;
    const uint32_t *b;
    int64_t b_panel;
    float *c;
    int64_t c_stride;
    const float *gain;
} fc_attention_product16;
typedef void fc_attention_product_bf16_fn(const fc_attention_product16 *product);

/* out[i * pairs + d] = the pair x[i * stride + 2 d], x[i * stride + 2 d + 1]; pairs = (width + 1) / 2. */
typedef void fc_attention_round_bf16_fn(const float *x, int64_t stride, int64_t rows, int64_t width, uint32_t *out);

/* panels[j / 32][d][j % 32] = the pair of columns 2 d, 2 d + 1 of row j of the keys, j < count. */
typedef void fc_attention_panels_bf16_fn(const float *keys, int64_t stride, int64_t count, int64_t width, uint32_t *panels);

/* panels[j / 32][d][j % 32] = the pair of rows 2 d, 2 d + 1 of column j of the values, j < width. */
typedef void fc_attention_columns_bf16_fn(const float *values, int64_t stride, int64_t count, int64_t width, uint32_t *panels);

/* As attention_softmax_f32, to a relative error of 2^-16, but the first (n + 1) / 2 words of each row become pairs. The sums are
 * of what has not been rounded. */
typedef void fc_attention_softmax_bf16_fn(float *x, int64_t stride, int64_t rows, int64_t n, float factor, float *inverse);

#define FC_ATTENTION_SLOTS(SLOT)                                                                                                 \
    SLOT(attention_product_f32)                                                                                                  \
    SLOT(attention_panels_f32)                                                                                                   \
    SLOT(attention_softmax_f32)                                                                                                  \
    SLOT(attention_softmax_grad_f32)                                                                                             \
    SLOT(attention_product_bf16)                                                                                                 \
    SLOT(attention_round_bf16)                                                                                                   \
    SLOT(attention_panels_bf16)                                                                                                  \
    SLOT(attention_columns_bf16)                                                                                                 \
    SLOT(attention_softmax_bf16)

/* ---- steps (drive.c) ---- */

/* q [rows, heads * width], k and v [keys in all, heads * width]. Either `batch` sequences of `queries` rows and `keys` keys, of
 * which those whose mask is not 0 are attended to, all with equal weight where none is; or, if offsets is not NULL, `batch`
 * segments of one array of `queries` rows, segment s from offsets[s] to offsets[s + 1], each attending to itself. Offsets are
 * read anew at every run and cannot be trusted: each is taken as no less than the one before, and as within [0, queries].
 * Outputs outside all segments are 0. */
typedef struct fc_attention_args {
    int64_t batch, queries, keys, heads, width;
    float scale;
    int is_bf16; /* fc_attention only: round q, k, v and the probabilities to bf16 */
    const float *q, *k, *v;
    const int64_t *mask;      /* [batch, keys], or NULL; */
    const uint8_t *mask_bool; /* the same as bytes; at most one of the two */
    const int64_t *offsets;   /* [batch + 1], or NULL */
    float *out;               /* as q */
    const float *dout;        /* as q; fc_attention_grad only, as the next three */
    float *dq, *dk, *dv;      /* as q, k, v */
    void *scratch;
    int64_t scratch_bytes;
} fc_attention_args;
void fc_attention(const void *args, int rank, int size);
void fc_attention_grad(const void *args, int rank, int size);
/* Bytes of scratch of either step for at most `keys` keys in a sequence on `threads` threads; with less, they use fewer. */
int64_t fc_attention_scratch(int64_t keys, int64_t width, int threads); /* of either precision */
int64_t fc_attention_grad_scratch(int64_t keys, int64_t width, int threads);

struct fc_table;
void fc_attention_install_scalar(struct fc_table *table);
void fc_attention_install_avx2(struct fc_table *table);
void fc_attention_install_avx512(struct fc_table *table);
void fc_attention_install_avx512bf16(struct fc_table *table);

#endif
