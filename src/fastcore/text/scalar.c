/* The reference: the shared bodies for the baseline, where the compiler may use what every CPU has. */
#include "../fastcore.h"

FC_INLINE void load_part(const float *x, int count, float *lanes) {
    for (int l = 0; l < 16; l++) lanes[l] = l < count ? x[l] : 0.0f;
}

#include "body.h"

static void accumulate_f32_scalar(const float *x, float weight, int64_t n, float *out) { accumulate_body(x, weight, n, out); }
static void maximum_f32_scalar(const float *x, int64_t n, float *out) { maximum_body(x, n, out); }
static void dots_f32_scalar(const float *x, const float *y, int64_t n, float sums[3]) { dots_body(x, y, n, sums); }
static void combine_f32_scalar(const float *x, float a, const float *y, float b, int64_t n, float *out) {
    combine_body(x, a, y, b, n, out);
}

void fc_text_install_scalar(fc_table *table) {
    FC_INSTALL(table, accumulate_f32, scalar);
    FC_INSTALL(table, maximum_f32, scalar);
    FC_INSTALL(table, dots_f32, scalar);
    FC_INSTALL(table, combine_f32, scalar);
}
