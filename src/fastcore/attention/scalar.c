/* The reference: the shortest correct code, for the baseline. Sums along a row run in the 16 lanes of the vector forms. */
#include "../fastcore.h"
#include "body.h"

enum { LANES = 16 };

static void attention_product_f32_scalar(const fc_attention_product *p) {
    for (int64_t i = 0; i < p->rows; i++)
        for (int64_t j = 0; j < p->cols; j++) {
            const float *a = p->a + i * p->a_row, *b = p->b + j / FC_ATTENTION_PANEL * p->b_panel + j % FC_ATTENTION_PANEL;
            float *c = p->c + i * p->c_stride + j, sum = p->accumulate ? *c : 0.0f;
            for (int64_t d = 0; d < p->depth; d++) sum = fc_fma(a[d * p->a_step], b[d * p->b_step], sum);
            *c = p->gain ? p->gain[i] * sum : sum;
        }
}

static void attention_panels_f32_scalar(const float *keys, int64_t stride, int64_t count, int64_t width, float *panels) {
    for (int64_t j = 0; j < count; j += FC_ATTENTION_PANEL)
        for (int64_t d = 0; d < width; d++)
            for (int64_t i = j; i < j + FC_ATTENTION_PANEL; i++) *panels++ = i < count ? keys[i * stride + d] : 0.0f;
}

static float fold(const float *lanes) {
    float sum[LANES];
    for (int l = 0; l < LANES; l++) sum[l] = lanes[l];
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int l = 0; l < half; l++) sum[l] += sum[l + half];
    return sum[0];
}

static void attention_softmax_f32_scalar(float *x, int64_t stride, int64_t rows, int64_t n, float factor, float *inverse) {
    for (int64_t i = 0; i < rows; i++, x += stride) {
        float top = x[0], lanes[LANES] = {0};
        for (int64_t j = 1; j < n; j++) top = x[j] > top ? x[j] : top;
        const float shift = top * factor;
        for (int64_t j = 0; j < n; j++) {
            x[j] = fc_exp2(fc_fma(x[j], factor, -shift));
            lanes[j % LANES] += x[j];
        }
        inverse[i] = 1.0f / fold(lanes);
    }
}

static void attention_softmax_grad_f32_scalar(float *p, float *dp, int64_t stride, int64_t rows, int64_t n, const float *inverse,
                                              float factor) {
    for (int64_t i = 0; i < rows; i++, p += stride, dp += stride) {
        float lanes[LANES] = {0};
        for (int64_t j = 0; j < n; j++) {
            p[j] *= inverse[i];
            lanes[j % LANES] = fc_fma(p[j], dp[j], lanes[j % LANES]);
        }
        const float mean = fold(lanes);
        for (int64_t j = 0; j < n; j++) dp[j] = factor * p[j] * (dp[j] - mean);
    }
}

static void attention_product_bf16_scalar(const fc_attention_product16 *p) {
    for (int64_t i = 0; i < p->rows; i++)
        for (int64_t j = 0; j < p->cols; j++) {
            const uint32_t *a = p->a + i * p->a_row, *b = p->b + j / FC_ATTENTION_PANEL * p->b_panel + j % FC_ATTENTION_PANEL;
            float sum = 0.0f;
            for (int64_t d = 0; d < p->depth; d++, b += FC_ATTENTION_PANEL)
                for (int second = 0; second < 2; second++)
                    sum = fc_fma(fc_bf16_half(a[d], second), fc_bf16_half(*b, second), sum);
            p->c[i * p->c_stride + j] = p->gain ? p->gain[i] * sum : sum;
        }
}

static void attention_round_bf16_scalar(const float *x, int64_t stride, int64_t rows, int64_t width, uint32_t *out) {
    for (int64_t i = 0; i < rows; i++, x += stride)
        for (int64_t d = 0; d < width; d += 2) *out++ = fc_bf16_pair(x[d], d + 1 < width ? x[d + 1] : 0.0f);
}

static void attention_panels_bf16_scalar(const float *keys, int64_t stride, int64_t count, int64_t width, uint32_t *panels) {
    for (int64_t j = 0; j < count; j += FC_ATTENTION_PANEL)
        for (int64_t d = 0; d < width; d += 2)
            for (int64_t i = j; i < j + FC_ATTENTION_PANEL; i++, panels++)
                if (i < count) *panels = fc_bf16_pair(keys[i * stride + d], d + 1 < width ? keys[i * stride + d + 1] : 0.0f);
}

static void attention_columns_bf16_scalar(const float *values, int64_t stride, int64_t count, int64_t width, uint32_t *panels) {
    for (int64_t j = 0; j < width; j += FC_ATTENTION_PANEL)
        for (int64_t d = 0; d < count; d += 2)
            for (int64_t i = j; i < j + FC_ATTENTION_PANEL; i++, panels++)
                if (i < width)
                    *panels = fc_bf16_pair(values[d * stride + i], d + 1 < count ? values[(d + 1) * stride + i] : 0.0f);
}

static void attention_softmax_bf16_scalar(float *x, int64_t stride, int64_t rows, int64_t n, float factor, float *inverse) {
    attention_softmax_f32_scalar(x, stride, rows, n, factor, inverse);
    for (int64_t i = 0; i < rows; i++, x += stride)
        for (int64_t j = 0; j < n; j += 2) {
            const uint32_t pair = fc_bf16_pair(x[j], j + 1 < n ? x[j + 1] : 0.0f);
            memcpy(x + j / 2, &pair, sizeof pair);
        }
}

void fc_attention_install_scalar(fc_table *table) {
    FC_INSTALL(table, attention_product_f32, scalar);
    FC_INSTALL(table, attention_panels_f32, scalar);
    FC_INSTALL(table, attention_softmax_f32, scalar);
    FC_INSTALL(table, attention_softmax_grad_f32, scalar);
    FC_INSTALL(table, attention_product_bf16, scalar);
    FC_INSTALL(table, attention_round_bf16, scalar);
    FC_INSTALL(table, attention_panels_bf16, scalar);
    FC_INSTALL(table, attention_columns_bf16, scalar);
    FC_INSTALL(table, attention_softmax_bf16, scalar);
}
