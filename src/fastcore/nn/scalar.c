/* The reference: the shared bodies for the baseline, where the compiler may use what every CPU has. */
#include "../fastcore.h"

FC_INLINE void load_part(const float *x, int count, float fill, float *lanes) {
    for (int l = 0; l < 16; l++) lanes[l] = l < count ? x[l] : fill;
}

FC_INLINE void store_part(float *x, int count, const float *lanes) {
    for (int l = 0; l < count; l++) x[l] = lanes[l];
}

#include "body.h"

static void activate_f32_scalar(fc_activation kind, const float *x, int64_t n, float *out) { activate_body(kind, x, n, out); }
static void activate_grad_f32_scalar(fc_activation kind, const float *dy, const float *x, int64_t n, float *dx) {
    activate_grad_body(kind, dy, x, n, dx);
}
static void add_f32_scalar(const float *a, const float *b, int64_t n, float *out) { add_body(a, b, n, out); }
static void multiply_f32_scalar(const float *a, const float *b, int64_t n, float *out) { multiply_body(a, b, n, out); }
static void scale_f32_scalar(const float *x, float factor, int64_t n, float *out) { scale_body(x, factor, n, out); }
static void scaled_difference_f32_scalar(const float *a, const float *b, float factor, int64_t n, float *out) {
    scaled_difference_body(a, b, factor, n, out);
}
static float squared_error_f32_scalar(const float *a, const float *b, int64_t n) { return squared_error_body(a, b, n); }
static void column_sum_f32_scalar(const float *x, int64_t rows, int64_t columns, int64_t stride, float *out) {
    column_sum_body(x, rows, columns, stride, out);
}
static void layer_norm_f32_scalar(const float *x, int64_t rows, int64_t n, const float *gamma, const float *beta, float epsilon,
                                  float *out) {
    layer_norm_body(x, rows, n, gamma, beta, epsilon, out);
}
static void layer_norm_lanes_f32_scalar(const float *x, int64_t stride, int64_t rows, int64_t n, const float *gamma,
                                        const float *beta, float epsilon, float *out) {
    layer_norm_lanes_body(x, stride, rows, n, gamma, beta, epsilon, out);
}
static void layer_norm_grad_f32_scalar(const float *dy, const float *x, int64_t rows, int64_t n, const float *gamma,
                                       float epsilon, float *dx, float *stats) {
    layer_norm_grad_body(dy, x, rows, n, gamma, epsilon, dx, stats);
}
static void layer_norm_gamma_f32_scalar(const float *dy, const float *x, const float *stats, int64_t rows, int64_t columns,
                                        int64_t stride, float *dgamma) {
    layer_norm_gamma_body(dy, x, stats, rows, columns, stride, dgamma);
}
static void softmax_f32_scalar(const float *x, int64_t rows, int64_t n, float factor, float gain, float *out) {
    softmax_body(x, rows, n, factor, gain, out);
}
static void softmax_grad_f32_scalar(const float *dy, const float *y, int64_t rows, int64_t n, float *dx) {
    softmax_grad_body(dy, y, rows, n, dx);
}
static float exp_sum_f32_scalar(const float *x, int64_t n, float *maximum) { return exp_sum_body(x, n, maximum); }
static void distillation_f32_scalar(const float *x, const float *teacher, int64_t n, float factor, float sums[3]) {
    distillation_body(x, teacher, n, factor, sums);
}
static void distillation_grad_f32_scalar(const float *x, const float *teacher, int64_t n, float factor, float soft, float hard,
                                         float *out) {
    distillation_grad_body(x, teacher, n, factor, soft, hard, out);
}

static void transpose_f32_scalar(const float *x, int64_t x_stride, int64_t rows, int64_t columns, float *out,
                                 int64_t out_stride) {
    for (int64_t j = 0; j < columns; j++)
        for (int64_t i = 0; i < rows; i++) out[j * out_stride + i] = x[i * x_stride + j];
}

void fc_nn_install_scalar(fc_table *table) {
    FC_INSTALL(table, activate_f32, scalar);
    FC_INSTALL(table, activate_grad_f32, scalar);
    FC_INSTALL(table, add_f32, scalar);
    FC_INSTALL(table, multiply_f32, scalar);
    FC_INSTALL(table, scale_f32, scalar);
    FC_INSTALL(table, scaled_difference_f32, scalar);
    FC_INSTALL(table, squared_error_f32, scalar);
    FC_INSTALL(table, column_sum_f32, scalar);
    FC_INSTALL(table, layer_norm_f32, scalar);
    FC_INSTALL(table, layer_norm_lanes_f32, scalar);
    FC_INSTALL(table, layer_norm_grad_f32, scalar);
    FC_INSTALL(table, layer_norm_gamma_f32, scalar);
    FC_INSTALL(table, softmax_f32, scalar);
    FC_INSTALL(table, softmax_grad_f32, scalar);
    FC_INSTALL(table, exp_sum_f32, scalar);
    FC_INSTALL(table, distillation_f32, scalar);
    FC_INSTALL(table, distillation_grad_f32, scalar);
    FC_INSTALL(table, transpose_f32, scalar);
}
