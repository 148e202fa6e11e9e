/* The reference: the shortest correct code. */
#include "../fastcore.h"
#include "body.h"

static void pack_window_f32_scalar(const float *in, int64_t plane, int64_t channels, int64_t stride, const fc_run *runs,
                                   int64_t count, float *out, int64_t width) {
    pack_window_body(in, plane, channels, stride, runs, count, out, width);
}

static void tap_sum_f32_scalar(const float *const *taps, const float *factors, int64_t count, float bias, float *out,
                               fc_rows_walk w) {
    for (int64_t r = 0; r < w.rows; r++)
        for (int64_t j = 0; j < w.n; j++) out[r * w.out + j] = tap_sum_at(taps, factors, count, bias, r * w.in + j);
}

static void tap_max_f32_scalar(const float *const *taps, int64_t count, float *out, fc_rows_walk w) {
    for (int64_t r = 0; r < w.rows; r++)
        for (int64_t j = 0; j < w.n; j++) out[r * w.out + j] = tap_max_at(taps, count, r * w.in + j);
}

static float sum_f32_scalar(const float *x, int64_t n) {
    float sum = 0.0f;
    for (int64_t i = 0; i < n; i++) sum += x[i];
    return sum;
}

static void bias_clip_f32_scalar(float *c, int64_t stride, int64_t rows, int64_t cols, const float *bias, const float *addend,
                                 float low, float high) {
    bias_clip_body(c, stride, rows, cols, bias, addend, low, high);
}

void fc_vision_install_scalar(fc_table *table) {
    FC_INSTALL(table, pack_window_f32, scalar);
    FC_INSTALL(table, tap_sum_f32, scalar);
    FC_INSTALL(table, tap_max_f32, scalar);
    FC_INSTALL(table, sum_f32, scalar);
    FC_INSTALL(table, bias_clip_f32, scalar);
}
