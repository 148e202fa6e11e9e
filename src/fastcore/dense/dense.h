/* Dense matrix products in fp32 and bf16: forward, gradient of the input, gradient of the weight.
 *
 * All three are one blocked product of packed panels (drive.c); weights are constant and packed once, or read in place at every
 * run, from any form of weight.h. Every output element is one chain of fused multiply-adds in ascending depth, whatever the
 * blocking, the thread count or the number of rows: batching never changes a bit.
 *
 * bf16: both operands are rounded (half to even) while they are packed, two consecutive depths to a 32-bit word, the first in the
 * low half; sums, inputs and outputs are fp32. A word takes the place of a float everywhere in the blocking.
 */
#ifndef FC_DENSE_H
#define FC_DENSE_H

#include <stddef.h>
#include <stdint.h>

#include "../nn/activation.h"
#include "../status.h"
#include "../weight.h"

/* ---- slots: leaf kernels, one thread, no allocation; arrays need only the alignment of float, unless said otherwise ---- */

/* c[i * c_stride + j] = (accumulate ? c : 0) + sum over d of a[d * rows + i] * b[(j / NR) * b_panel + d * b_step + j % NR],
 * 0 <= i < rows <= MR, 0 <= j < cols, NR = gemm_cols, MR = gemm_rows. Reads whole NR-wide rows of b, writes only c[.., 0..cols).
 * The sum is one chain in ascending d that starts from c: cutting the depth in two calls gives the same bits as one. */
typedef void fc_gemm_f32_fn(int64_t rows, int64_t cols, int64_t depth, const float *a, const float *b, int64_t b_step,
                            int64_t b_panel, float *c, int64_t c_stride, int accumulate);

/* out[d * width + i] = i < rows ? in[i * stride + d] : 0, 0 <= d < depth, 0 <= i < width, rows <= width <= NR or MR. Exact. */
typedef void fc_pack_rows_f32_fn(const float *in, int64_t stride, int64_t rows, int64_t depth, float *out, int64_t width);

/* out[d * width + j] = j < cols ? in[d * stride + j] : 0, 0 <= d < depth, 0 <= j < width, cols <= width. Exact. */
typedef void fc_pack_columns_f32_fn(const float *in, int64_t stride, int64_t cols, int64_t depth, float *out, int64_t width);

/* out[i] = codes[i] * scale. Exact: one rounding. */
typedef void fc_expand_s8_f32_fn(const int8_t *codes, float scale, int64_t n, float *out);

/* Return the sum of a[i] * b[i], in an order that depends on n alone; bounded by n * eps * sum |a b|. */
typedef float fc_dot_f32_fn(const float *a, const float *b, int64_t n);

/* As gemm_f32, of words of two bf16 each: a[d * rows + i] and b[...] hold depths 2 d and 2 d + 1, `depth` counts words. Bounded
 * by (2 depth) * eps * sum |a b| in fp32; subnormal factors and sums may count as 0. */
typedef void fc_gemm_bf16_fn(int64_t rows, int64_t cols, int64_t depth, const uint32_t *a, const uint32_t *b, int64_t b_step,
                             int64_t b_panel, float *c, int64_t c_stride, int accumulate);

/* out[i] = in[i] rounded half to even to bf16; subnormals become 0 of their sign, NaN stays NaN. Exact, but for NaN payloads. */
typedef void fc_convert_f32_bf16_fn(const float *in, int64_t n, uint16_t *out);

/* out[j] = the word of first[j] and second[j], converted so; second = NULL stands for zeros. Exact. */
typedef void fc_pair_f32_bf16_fn(const float *first, const float *second, int64_t n, uint32_t *out);

/* c = activation(c + bias[j]) + residual, over rows x cols; bias and residual may be NULL; c and residual do not overlap. */
typedef void fc_epilogue_f32_fn(float *c, int64_t c_stride, int64_t rows, int64_t cols, const float *bias,
                                fc_activation activation, const float *residual, int64_t residual_stride);

#define FC_DENSE_SLOTS(SLOT)                                                                                                     \
    SLOT(gemm_f32)                                                                                                               \
    SLOT(pack_rows_f32)                                                                                                          \
    SLOT(pack_columns_f32)                                                                                                       \
    SLOT(expand_s8_f32) SLOT(dot_f32) SLOT(epilogue_f32) SLOT(gemm_bf16) SLOT(convert_f32_bf16) SLOT(pair_f32_bf16)
/* The register tile (rows x columns) and the depth at which one panel of columns stays in L1. */
#define FC_DENSE_TUNING int64_t gemm_rows, gemm_cols, gemm_depth;

struct fc_table;
void fc_dense_install_scalar(struct fc_table *table);
void fc_dense_install_avx2(struct fc_table *table);
void fc_dense_install_avx512(struct fc_table *table);
void fc_dense_install_avx512bf16(struct fc_table *table);

/* 1 if the bf16 product is faster than the fp32 one here: the CPU has the instruction, and no cap forbids it. */
int fc_has_bf16(void);

/* ---- reading a weight ---- */

/* Expand rows [row, row + rows) x columns [col, col + cols) of a weight into out (row stride `stride`); positions that are not
 * stored are 0. `scaled` = 0 leaves out what trains: the scale of a row of int8 codes, the gain of one of int4 codes. `cursor`
 * holds one entry per row group touched; it is set by fc_weight_seek and lets a walk over ascending columns find its blocks or
 * values without a search. */
FC_HIDDEN void fc_weight_seek(const fc_weight *weight, int64_t row, int64_t rows, int64_t col, int32_t *cursor);
FC_HIDDEN void fc_weight_expand(const fc_weight *weight, int64_t row, int64_t rows, int64_t col, int64_t cols, int scaled,
                                float *out, int64_t stride, int32_t *cursor);

/* ---- steps ---- */

/* Floats of a packed constant weight: ceil(n / NR) panels of [k][NR], the last one zero-padded. */
int64_t fc_dense_packed_size(int64_t n, int64_t k);
/* Words of one packed to bf16: panels of [ceil(k / 2)][NR]. */
int64_t fc_bf16_packed_size(int64_t n, int64_t k);
/* Bytes of scratch for any of the three products of these sizes on `threads` threads; the products use no more threads than
 * their scratch has room for. */
int64_t fc_linear_scratch(int64_t m, int64_t n, int64_t k, int threads);

typedef struct fc_pack_dense_args {
    fc_weight weight;
    float *out; /* fc_dense_packed_size floats, or fc_bf16_packed_size words */
} fc_pack_dense_args;
void fc_pack_dense(const void *args, int rank, int size);
void fc_pack_bf16(const void *args, int rank, int size);

/* Pack a matrix [depth, cols], float32 in C order, as the second operand of a product over `depth`: `out` takes what
 * fc_dense_packed_size(cols, depth) or fc_bf16_packed_size(cols, depth) says. */
typedef struct fc_pack_operand_args {
    int64_t depth, cols;
    int bf16;
    const float *values;
    float *out;
} fc_pack_operand_args;
void fc_pack_operand(const void *args, int rank, int size);

/* out[m, n] = activation(x[m, k] w[n, k]^T + bias[n]) + residual[m, n]. `packed` is NULL where the weight is read in place. In
 * bf16 a weight in place must be FC_DENSE_F32, in the gradients too. */
typedef struct fc_linear_args {
    int64_t m, n, k;
    int bf16;
    const float *x, *packed;
    fc_weight weight;
    float *out;
    const float *bias, *residual; /* or NULL */
    fc_activation activation;
    void *scratch;
    int64_t scratch_bytes;
} fc_linear_args;
void fc_linear(const void *args, int rank, int size);

/* to = dx[m, k] = dy[m, n] w[n, k], or to = dw = dy[m, n]^T x[m, k] in the form that the weight trains in (see _core.pyi). */
typedef struct fc_linear_grad_args {
    int64_t m;
    int bf16;
    const float *dy, *x; /* x: fc_linear_grad_weight only */
    const float *packed; /* the weight, or x, by fc_pack_operand; NULL where it is read in place */
    fc_weight weight;
    float *to;
    void *scratch;
    int64_t scratch_bytes;
} fc_linear_grad_args;
void fc_linear_grad_input(const void *args, int rank, int size);
void fc_linear_grad_weight(const void *args, int rank, int size);

#endif
