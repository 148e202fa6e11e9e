/* The reference: one element at a time, in the order that the contract states. */
#include "../fastcore.h"
#include "body.h"

static void weighted_sum_f32_scalar(const float *const *inputs, const float *weights, int count, int64_t length, float *out,
                                    int stream, double *squares) {
    (void)stream;
    sum_elements(inputs, weights, count, 0, length, out, squares);
}

static void sum_of_squares_f32_scalar(const float *x, int64_t length, double *squares) {
    for (int64_t i = 0; i < length; i++) squares[i % FC_AGGREGATE_LANES] += (double)x[i] * x[i];
}

static void step_sgd_f32_scalar(float *params, const float *grads, int64_t length, const fc_sgd *sgd) {
    step_sgd_body(params, grads, length, sgd);
}

static void step_momentum_f32_scalar(float *params, const float *grads, float *velocity, int64_t length,
                                     const fc_momentum *momentum) {
    step_momentum_body(params, grads, velocity, length, momentum);
}

static void step_adam_f32_scalar(float *params, const float *grads, float *first, float *second, int64_t length,
                                 const fc_adam *adam) {
    step_adam_body(params, grads, first, second, length, adam);
}

void fc_aggregate_install_scalar(fc_table *table) {
    FC_INSTALL(table, weighted_sum_f32, scalar);
    FC_INSTALL(table, sum_of_squares_f32, scalar);
    FC_INSTALL(table, step_sgd_f32, scalar);
    FC_INSTALL(table, step_momentum_f32, scalar);
    FC_INSTALL(table, step_adam_f32, scalar);
}
