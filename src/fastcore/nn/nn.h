/* Elementwise functions, normalisation, losses and layout: everything in a network that is not a matrix product.
 *
 * All arrays are float32, contiguous and of any alignment. Reductions along a row run in 16 lanes on every ISA and fold in one
 * tree, so that every slot is bit-equal across ISAs; a relative error of a sum of n terms is below (n/16 + 6) * 2^-24 of the
 * sum of magnitudes. NaN in gives NaN out wherever the result depends on it.
 */
#ifndef FC_NN_H
#define FC_NN_H

#include <stdint.h>

#include "../status.h"
#include "activation.h"

/* ---- leaf kernels: single-threaded. `out` may be an input itself where a comment says so; no other overlap ---- */

/* out[i] = activation(x[i]); out may be x. */
typedef void fc_activate_f32_fn(fc_activation kind, const float *x, int64_t n, float *out);
/* dx[i] = dy[i] * activation'(x[i]); dx may be dy or x. */
typedef void fc_activate_grad_f32_fn(fc_activation kind, const float *dy, const float *x, int64_t n, float *dx);
/* out[i] = a[i] + b[i]; out may be a or b. */
typedef void fc_add_f32_fn(const float *a, const float *b, int64_t n, float *out);
/* out[i] = a[i] * b[i]; out may be a or b. */
typedef void fc_multiply_f32_fn(const float *a, const float *b, int64_t n, float *out);
/* out[i] = factor * x[i]; out may be x. */
typedef void fc_scale_f32_fn(const float *x, float factor, int64_t n, float *out);
/* out[i] = factor * (a[i] - b[i]); out may be a or b. */
typedef void fc_scaled_difference_f32_fn(const float *a, const float *b, float factor, int64_t n, float *out);
/* The sum of (a[i] - b[i])^2. */
typedef float fc_squared_error_f32_fn(const float *a, const float *b, int64_t n);

/* out[j] = sum over rows of x[i * stride + j]: eight rows in a tree, the eights in order. */
typedef void fc_column_sum_f32_fn(const float *x, int64_t rows, int64_t columns, int64_t stride, float *out);

/* out = (x - mean) / sqrt(variance + epsilon) * gamma + beta along each row of n; gamma, beta may be NULL; out may be x. */
typedef void fc_layer_norm_f32_fn(const float *x, int64_t rows, int64_t n, const float *gamma, const float *beta, float epsilon,
                                  float *out);
/* The same bits with the rows side by side: row c is column c of x[n][stride], c < rows; so is out. out may be x. */
typedef void fc_layer_norm_lanes_f32_fn(const float *x, int64_t stride, int64_t rows, int64_t n, const float *gamma,
                                        const float *beta, float epsilon, float *out);
/* The gradient with respect to x; stats[2 i] and [2 i + 1] take the mean and 1 / sqrt(variance + epsilon) of row i, unless NULL.
 * dx may be dy or x where stats is NULL. */
typedef void fc_layer_norm_grad_f32_fn(const float *dy, const float *x, int64_t rows, int64_t n, const float *gamma,
                                       float epsilon, float *dx, float *stats);
/* dgamma[j] = sum over rows of dy * (x - mean) / sqrt(variance + epsilon), from the stats of the gradient above, which are
 * those of all rows; in pairs of rows: four streams, whose lines share a cache set where n is a power of two. */
typedef void fc_layer_norm_gamma_f32_fn(const float *dy, const float *x, const float *stats, int64_t rows, int64_t columns,
                                        int64_t stride, float *dgamma);

/* out = gain * softmax(factor * x) along each row of n, factor > 0; -inf is a probability of 0, a row of -inf alone gives NaN;
 * out may be x. */
typedef void fc_softmax_f32_fn(const float *x, int64_t rows, int64_t n, float factor, float gain, float *out);
/* dx = y * (dy - sum of dy * y) along each row; dx may be dy or y. */
typedef void fc_softmax_grad_f32_fn(const float *dy, const float *y, int64_t rows, int64_t n, float *dx);
/* The sum of exp(x[i] - maximum) of one row; NaN for a row of -inf alone. */
typedef float fc_exp_sum_f32_fn(const float *x, int64_t n, float *maximum);

/* With s = factor * (x - max x), t = factor * (teacher - max teacher), one row:
 * sums = {sum exp(s), sum exp(t), sum exp(t) * (t - s)}; a term of exp(t) = 0 is 0. */
typedef void fc_distillation_f32_fn(const float *x, const float *teacher, int64_t n, float factor, float sums[3]);
/* out = soft * (softmax(factor * x) - softmax(factor * teacher)) + hard * softmax(x), one row; out is neither input. */
typedef void fc_distillation_grad_f32_fn(const float *x, const float *teacher, int64_t n, float factor, float soft, float hard,
                                         float *out);

/* out[j * out_stride + i] = x[i * x_stride + j], i < rows, j < columns; no overlap. */
typedef void fc_transpose_f32_fn(const float *x, int64_t x_stride, int64_t rows, int64_t columns, float *out, int64_t out_stride);

#define FC_NN_SLOTS(SLOT)                                                                                                        \
    SLOT(activate_f32)                                                                                                           \
    SLOT(activate_grad_f32)                                                                                                      \
    SLOT(add_f32)                                                                                                                \
    SLOT(multiply_f32)                                                                                                           \
    SLOT(scale_f32)                                                                                                              \
    SLOT(scaled_difference_f32)                                                                                                  \
    SLOT(squared_error_f32)                                                                                                      \
    SLOT(column_sum_f32)                                                                                                         \
    SLOT(layer_norm_f32)                                                                                                         \
    SLOT(layer_norm_lanes_f32)                                                                                                   \
    SLOT(layer_norm_grad_f32)                                                                                                    \
    SLOT(layer_norm_gamma_f32)                                                                                                   \
    SLOT(softmax_f32)                                                                                                            \
    SLOT(softmax_grad_f32)                                                                                                       \
    SLOT(exp_sum_f32)                                                                                                            \
    SLOT(distillation_f32)                                                                                                       \
    SLOT(distillation_grad_f32)                                                                                                  \
    SLOT(transpose_f32)

/* ---- steps (drive.c) ---- */

/* n elements: out from a (dy for a gradient) and b, which a sum or a product repeats after `period` elements. */
typedef struct fc_elementwise {
    fc_activation kind;
    float factor;
    int64_t n, period;
    const float *a, *b;
    float *out;
} fc_elementwise;
void fc_nn_activate(const void *args, int rank, int size);
void fc_nn_activate_grad(const void *args, int rank, int size);
void fc_nn_add(const void *args, int rank, int size);
void fc_nn_multiply(const void *args, int rank, int size);
void fc_nn_scale(const void *args, int rank, int size);

/* m rows of n. Of softmax_grad, x is the softmax's output. */
typedef struct fc_rows {
    int64_t m, n;
    float epsilon;
    const float *x, *dy, *gamma, *beta;
    float *out, *dgamma, *dbeta; /* the last two may be NULL */
    float *stats;                /* [m, 2] between the two steps of layer_norm_grad, or NULL */
} fc_rows;
void fc_nn_column_sum(const void *args, int rank, int size);
void fc_nn_layer_norm(const void *args, int rank, int size);
void fc_nn_layer_norm_lanes(const void *args, int rank, int size); /* x and out [n, m] */
void fc_nn_layer_norm_grad(const void *args, int rank, int size);
void fc_nn_layer_norm_grad_columns(const void *args, int rank, int size); /* dgamma and dbeta; after the step above */
void fc_nn_softmax(const void *args, int rank, int size);
void fc_nn_softmax_grad(const void *args, int rank, int size);
void fc_nn_transpose(const void *args, int rank, int size);

/* A loss is two steps: partial sums of fixed chunks (FC_LOSS_ROWS rows, or FC_LOSS_ITEMS elements), then their mean. A label
 * outside [0, n) makes the loss and its row of the gradient NaN. A term of weight 0 of the distillation loss (alpha = 0 or 1) is
 * not evaluated. */
enum { FC_LOSS_ROWS = 8, FC_LOSS_ITEMS = 4096 };
typedef struct fc_loss {
    int64_t m, n; /* rows and classes; of the squared error, n elements */
    double temperature, alpha;
    const float *x, *target; /* logits and the teacher's */
    const int64_t *labels;
    const float *dloss;
    int64_t count; /* what the mean is over */
    int64_t chunks;
    double *partials; /* [chunks] */
    float *out;       /* the loss, or the gradient with respect to x */
} fc_loss;
void fc_nn_cross_entropy(const void *args, int rank, int size);
void fc_nn_cross_entropy_grad(const void *args, int rank, int size);
void fc_nn_squared_error(const void *args, int rank, int size);
void fc_nn_squared_error_grad(const void *args, int rank, int size);
void fc_nn_distillation(const void *args, int rank, int size);
void fc_nn_distillation_grad(const void *args, int rank, int size);
void fc_nn_loss_mean(const void *args, int rank, int size);

struct fc_table;
void fc_nn_install_scalar(struct fc_table *table);
void fc_nn_install_avx2(struct fc_table *table);
void fc_nn_install_avx512(struct fc_table *table);

#endif
