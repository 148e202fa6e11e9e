/* The reference: the shortest correct code. Register tiles have no meaning here; the panels only keep the shape of the others. */
#include "../fastcore.h"
#include "body.h"

enum { MR = 4, NR = 8, KC = 512 };

static void gemm_f32_scalar(int64_t rows, int64_t cols, int64_t depth, const float *a, const float *b, int64_t b_step,
                            int64_t b_panel, float *c, int64_t c_stride, int accumulate) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < cols; j++) {
            const float *column = b + j / NR * b_panel + j % NR;
            float sum = accumulate ? c[i * c_stride + j] : 0.0f;
            for (int64_t d = 0; d < depth; d++) sum += a[d * rows + i] * column[d * b_step];
            c[i * c_stride + j] = sum;
        }
}

static void pack_rows_f32_scalar(const float *in, int64_t stride, int64_t rows, int64_t depth, float *out, int64_t width) {
    for (int64_t d = 0; d < depth; d++)
        for (int64_t i = 0; i < width; i++) out[d * width + i] = i < rows ? in[i * stride + d] : 0.0f;
}

static void pack_columns_f32_scalar(const float *in, int64_t stride, int64_t cols, int64_t depth, float *out, int64_t width) {
    for (int64_t d = 0; d < depth; d++)
        for (int64_t j = 0; j < width; j++) out[d * width + j] = j < cols ? in[d * stride + j] : 0.0f;
}

static void expand_s8_f32_scalar(const int8_t *codes, float scale, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i++) out[i] = (float)codes[i] * scale;
}

static float dot_f32_scalar(const float *a, const float *b, int64_t n) {
    float sum = 0.0f;
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

static void epilogue_f32_scalar(float *c, int64_t c_stride, int64_t rows, int64_t cols, const float *bias,
                                fc_activation activation, const float *residual, int64_t residual_stride) {
    epilogue_body(c, c_stride, rows, cols, bias, activation, residual, residual_stride);
}

/* Panels are as wide as the fp32 kernel of the present instruction set has them. */
static void gemm_bf16_scalar(int64_t rows, int64_t cols, int64_t depth, const uint32_t *a, const uint32_t *b, int64_t b_step,
                             int64_t b_panel, float *c, int64_t c_stride, int accumulate) {
    const int64_t width = fc_kernels.gemm_cols;
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < cols; j++) {
            const uint32_t *column = b + j / width * b_panel + j % width;
            float sum = accumulate ? c[i * c_stride + j] : 0.0f;
            for (int64_t d = 0; d < depth; d++) {
                const uint32_t x = a[d * rows + i], y = column[d * b_step];
                sum += bf16_to_float((uint16_t)x) * bf16_to_float((uint16_t)y);
                sum += bf16_to_float((uint16_t)(x >> 16)) * bf16_to_float((uint16_t)(y >> 16));
            }
            c[i * c_stride + j] = sum;
        }
}

static void convert_f32_bf16_scalar(const float *in, int64_t n, uint16_t *out) {
    for (int64_t i = 0; i < n; i++) out[i] = float_to_bf16(in[i]);
}

static void pair_f32_bf16_scalar(const float *first, const float *second, int64_t n, uint32_t *out) {
    for (int64_t j = 0; j < n; j++) out[j] = float_to_bf16(first[j]) | (second ? (uint32_t)float_to_bf16(second[j]) << 16 : 0);
}

void fc_dense_install_scalar(fc_table *table) {
    FC_INSTALL(table, gemm_f32, scalar);
    FC_INSTALL(table, pack_rows_f32, scalar);
    FC_INSTALL(table, pack_columns_f32, scalar);
    FC_INSTALL(table, expand_s8_f32, scalar);
    FC_INSTALL(table, dot_f32, scalar);
    FC_INSTALL(table, epilogue_f32, scalar);
    FC_INSTALL(table, gemm_bf16, scalar);
    FC_INSTALL(table, convert_f32_bf16, scalar);
    FC_INSTALL(table, pair_f32_bf16, scalar);
    table->gemm_rows = MR;
    table->gemm_cols = NR;
    table->gemm_depth = KC;
}
