/* Aggregation of gradients and the optimiser steps: flat float32 vectors, bound by memory.
 *
 * A vector is cut into blocks of FC_AGGREGATE_BLOCK elements, whatever the number of threads. Every element is computed by a
 * stated order of single roundings (no fused multiply-add), and the squares of a block are added in 16 double lanes, so that
 * results are bit-equal for any thread count and any instruction set.
 */
#ifndef FC_AGGREGATE_H
#define FC_AGGREGATE_H

#include <stdint.h>

#include "../status.h"

enum {
    FC_AGGREGATE_BLOCK = 16384, /* elements for one partial sum of squares: 64 KiB per stream, some 5 us or more of DRAM time */
    FC_AGGREGATE_FAN = 8,       /* inputs that one pass combines in registers; a power of two, so that groups are subtrees */
    FC_AGGREGATE_LANES = 16,    /* element i of a block adds its square to lane i % 16 */
};

/* out[i] = weights[0] * inputs[0][i] + ..., `count` from 1 to FC_AGGREGATE_FAN: each product rounded, then added in the
 * left-complete binary tree over the input index (n inputs split at the largest power of two below n). squares[i % 16] gains
 * out[i]^2, in the order of i. `out` may be one of the inputs but overlap none partly. Any alignment (of 4); `stream` asks for
 * stores that bypass the caches, fenced before the return. Bit-equal across ISAs. */
typedef void fc_weighted_sum_f32_fn(const float *const *inputs, const float *weights, int count, int64_t length, float *out,
                                    int stream, double *squares);

/* squares[i % 16] gains x[i]^2, in the order of i. Bit-equal across ISAs. */
typedef void fc_sum_of_squares_f32_fn(const float *x, int64_t length, double *squares);

/* The optimisers' steps: arrays disjoint, any alignment (of 4), elementwise, bit-equal across ISAs. In all of them
 * g = clip * grads + weight_decay * params. */
typedef struct fc_sgd {
    float learning_rate, weight_decay, clip;
} fc_sgd;
/* params -= learning_rate * g */
typedef void fc_step_sgd_f32_fn(float *params, const float *grads, int64_t length, const fc_sgd *sgd);

typedef struct fc_momentum {
    float learning_rate, weight_decay, clip;
    float momentum, gain; /* gain = 1 - dampening */
    int nesterov;
} fc_momentum;
/* velocity = momentum * velocity + gain * g; params -= learning_rate * (nesterov ? g + momentum * velocity : velocity) */
typedef void fc_step_momentum_f32_fn(float *params, const float *grads, float *velocity, int64_t length,
                                     const fc_momentum *momentum);

typedef struct fc_adam {
    float weight_decay, clip;
    float decay;       /* 1, or 1 - learning_rate * weight_decay (and then weight_decay = 0) where it is decoupled */
    float first_rate;  /* 1 - beta1 */
    float beta2;       /* as it is */
    float second_rate; /* 1 - beta2 */
    float root_scale;  /* 1 / sqrt(1 - beta2^step) */
    float epsilon;     /* added to the corrected root */
    float step_size;   /* learning_rate / (1 - beta1^step) */
} fc_adam;
/* first += first_rate * (g - first); second = beta2 * second + second_rate * g^2;
 * params = decay * params - step_size * (first / (root_scale * sqrt(second) + epsilon)) */
typedef void fc_step_adam_f32_fn(float *params, const float *grads, float *first, float *second, int64_t length,
                                 const fc_adam *adam);

#define FC_AGGREGATE_SLOTS(SLOT)                                                                                                 \
    SLOT(weighted_sum_f32) SLOT(sum_of_squares_f32) SLOT(step_sgd_f32) SLOT(step_momentum_f32) SLOT(step_adam_f32)

/* ---- drivers: steps over whole vectors ---- */

typedef struct fc_weighted_sum_args {
    const float *const *inputs; /* count pointers */
    const float *weights;
    int64_t count, length; /* any count from 1 */
    float *out;
    double *partials; /* fc_aggregate_blocks(length): the sum of squares of each block of out */
    float *scratch;   /* fc_weighted_sum_scratch(count) floats for each rank */
} fc_weighted_sum_args;
void fc_weighted_sum(const void *args, int rank, int size);

typedef struct fc_sum_of_squares_args {
    const float *x;
    int64_t length;
    double *partials;
} fc_sum_of_squares_args;
void fc_sum_of_squares(const void *args, int rank, int size);

typedef struct fc_sgd_args {
    float *params;
    const float *grads;
    int64_t length;
    fc_sgd sgd;
} fc_sgd_args;
void fc_sgd_step(const void *args, int rank, int size);

typedef struct fc_momentum_args {
    float *params;
    const float *grads;
    float *velocity;
    int64_t length;
    fc_momentum momentum;
} fc_momentum_args;
void fc_momentum_step(const void *args, int rank, int size);

typedef struct fc_adam_args {
    float *params;
    const float *grads;
    float *first, *second;
    int64_t length;
    fc_adam adam;
} fc_adam_args;
void fc_adam_step(const void *args, int rank, int size);

int64_t fc_aggregate_blocks(int64_t length);
/* The team that a vector of this length can keep busy: at least 1, at most `threads`. */
int fc_aggregate_threads(int64_t length, int threads);
int64_t fc_weighted_sum_scratch(int64_t count);
/* Add partial sums in the order of their index. */
double fc_sum_partials(const double *partials, int64_t blocks);
/* Adam's constants for the step-th step (from 1), computed in double and rounded once. */
fc_adam fc_adam_constants(double learning_rate, double beta1, double beta2, double epsilon, double weight_decay, int decoupled,
                          int64_t step, double clip);

struct fc_table;
void fc_aggregate_install_scalar(struct fc_table *table);
void fc_aggregate_install_avx2(struct fc_table *table);
void fc_aggregate_install_avx512(struct fc_table *table);

#endif
