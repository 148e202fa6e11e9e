/* Vision: fp32 convolution, pooling and scaling of channels over images [N, C, H, W]; one spatial axis is a height of 1.
 *
 * A convolution is the dense family's register tile over panels of output pixels. A panel (some pixels x a slab of kernel taps
 * and channels) is packed when it is needed and stays in L1: no copy of the image's columns is ever made. Depthwise
 * convolution and pooling walk a band of staged rows with one pointer per tap. Every output element is one chain in a fixed
 * order, whatever the blocking and the thread count.
 */
#ifndef FC_VISION_H
#define FC_VISION_H

#include <stddef.h>
#include <stdint.h>

#include "../nn/activation.h"
#include "../status.h"

/* ---- slots: leaf kernels, one thread, no allocation; arrays need only the alignment of float ---- */

/* Some neighbouring lanes of a panel and where their elements are: lane at + i is in[from + i * stride], 0 <= i < count. */
typedef struct fc_run {
    int64_t from, at, count;
} fc_run;

/* out[c * width + lane] = the lane's element of in + c * plane, or 0 where no run has the lane; 0 <= c < channels, 0 <= lane <
 * width. Runs ascend in `at` and do not overlap; width is gemm_cols of the same table. Reads only what runs name. Exact. */
typedef void fc_pack_window_f32_fn(const float *in, int64_t plane, int64_t channels, int64_t stride, const fc_run *runs,
                                   int64_t count, float *out, int64_t width);

/* Rows that a walk over taps reads and writes: `in` and `out` floats lie between the beginnings of two rows of n. */
typedef struct fc_rows_walk {
    int64_t rows, in, out, n;
} fc_rows_walk;

/* out[r * w.out + j] = bias + sum over t of factors[t] * taps[t][r * w.in + j], 0 <= r < w.rows, 0 <= j < w.n: one chain of
 * fused multiply-adds in ascending t. Exact. out does not overlap what is read, unless count is 1 and it is taps[0]. */
typedef void fc_tap_sum_f32_fn(const float *const *taps, const float *factors, int64_t count, float bias, float *out,
                               fc_rows_walk w);

/* out[r * w.out + j] = the largest of taps[t][r * w.in + j], the first among equals; NaN if one is NaN. count >= 1. Exact. */
typedef void fc_tap_max_f32_fn(const float *const *taps, int64_t count, float *out, fc_rows_walk w);

/* Return the sum of x[i], in an order that depends on n alone; bounded by n * eps * sum |x|. */
typedef float fc_sum_f32_fn(const float *x, int64_t n);

/* c[i][j] = clip(c[i][j] + bias[i] + addend[i][j], low, high), added in that order; bias and addend may be NULL; NaN passes.
 * Both c and addend have row stride `stride`. Exact. */
typedef void fc_bias_clip_f32_fn(float *c, int64_t stride, int64_t rows, int64_t cols, const float *bias, const float *addend,
                                 float low, float high);

#define FC_VISION_SLOTS(SLOT) SLOT(pack_window_f32) SLOT(tap_sum_f32) SLOT(tap_max_f32) SLOT(sum_f32) SLOT(bias_clip_f32)

struct fc_table;
void fc_vision_install_scalar(struct fc_table *table);
void fc_vision_install_avx2(struct fc_table *table);
void fc_vision_install_avx512(struct fc_table *table);

/* ---- steps ---- */

/* A window's way over an image. Elements above, below and beside the image are padding. */
typedef struct fc_window {
    int64_t height, width, out_height, out_width;
    int64_t kernel_height, kernel_width, stride_y, stride_x, dilation_y, dilation_x;
    int64_t top, left; /* padding before the image */
} fc_window;

/* What follows a convolution: activation(clip(y + bias + addend)). */
typedef struct fc_convolution_args {
    fc_window window;
    int64_t images, channels, filters, group; /* group divides channels and filters */
    const float *x, *weight;                  /* weight: packed, or [filters, 1, kh, kw] of a depthwise convolution */
    const float *bias, *addend;               /* [filters], and of the output's shape; or NULL */
    float low, high;
    fc_activation activation;
    float *out;
    void *scratch;
    int64_t scratch_bytes;
} fc_convolution_args;
void fc_convolution(const void *args, int rank, int size);
/* group == channels: every filter reads one channel. */
void fc_depthwise(const void *args, int rank, int size);

/* Weights [filters, depth / taps, taps] of one group as the convolution reads them: tiles of at most gemm_rows filters of one
 * group, [tap][channel][filter]. As many floats as the weight has. */
typedef struct fc_pack_convolution_args {
    int64_t filters, group, depth, taps; /* depth = channels / group * taps */
    const float *weight;
    float *out;
} fc_pack_convolution_args;
void fc_pack_convolution(const void *args, int rank, int size);

/* Bytes of scratch per thread; a step uses no more threads than its scratch has room for. */
int64_t fc_convolution_scratch(const fc_window *window, int64_t channels, int64_t group);
int64_t fc_staging_scratch(const fc_window *window);

typedef struct fc_window_pool_args {
    fc_window window;
    int64_t planes; /* images * channels */
    int average;    /* else the maximum */
    int include_pad;
    int64_t bottom, right; /* padding behind the image, which averages may count */
    const float *x;
    float *out;
    void *scratch;
    int64_t scratch_bytes;
} fc_window_pool_args;
void fc_window_pool(const void *args, int rank, int size);

/* out[p] = the mean of x[p][0 .. n). */
typedef struct fc_planes_args {
    int64_t planes, channels, n;
    const float *x, *factor, *offset; /* factor, offset [channels]: fc_scale_channels only */
    float *out;
} fc_planes_args;
void fc_plane_means(const void *args, int rank, int size);
/* out[i][c][j] = factor[c] * x[i][c][j] + offset[c], fused; out may be x. */
void fc_scale_channels(const void *args, int rank, int size);

#endif
