/* int8: quantised weights and activations, and the dense product of the two.
 *
 * Weights are symmetric, [-127, 127] with a scale per row. An activation code is a byte q that stands for (q - zero) * scale,
 * with a scale and a zero point per row; four consecutive k lie in one dword. The product takes zero * sum(w) off again. Sums are
 * exact modulo 2^32 and the true sum fits an int32 up to the largest k of the layout, so every kernel here gives the same bits on
 * every instruction set and any number of threads.
 *
 * Panels of quantised activations x[m, k], K4 = ceil(k / 4); the pad of the last dword along k is the row's zero point:
 *   "tile"   [ceil(m / 12)][K4][12] dwords, for the dense product. The last group holds only its m % 12 rows: [K4][m % 12].
 *   "lanes"  [K4][Mp] dwords, Mp = m rounded up to a multiple of 16, pad rows 128, for the sparse product.
 *
 * Quantising a row, each operation rounded to float32:
 *   "tile"   low = min(0, min x), high = max(0, max x), half = high / 2 - low / 2 (half, for high - low may overflow);
 *            scale = half / 127.5, inverse = 127.5 / half, zero = round half even(-low * inverse),
 *            q = clip(round half even(x * inverse) + zero, 0, 255). So 0 is exact, and a row of one sign has all 256 codes.
 *   "lanes"  half = max|x|, scale = half / 127, inverse = 127 / half, zero = 128: symmetric, what the sparse kernels take.
 * A row whose half is below FC_INT8_TINY has scale 1, zero 128 and all q = 128. A row with an infinity or a NaN has scale NaN, so
 * that everything computed from it is NaN; its codes are of no meaning (but the same everywhere).
 *
 * Static scales, chosen beforehand: q = clip(round half even(x / scale) + zero, 0, 255), as ONNX QuantizeLinear has it, with one
 * scale and zero point for all rows. Infinities are clipped too; NaN counts as 0. "tile" panels only.
 */
#ifndef FC_QUANT_H
#define FC_QUANT_H

#include <stdint.h>

#include "../isa.h"
#include "../nn/activation.h"
#include "../status.h"
#include "../weight.h"

enum {
    FC_INT8_ROWS = 12,       /* rows of x in a group of the "tile" layout */
    FC_INT8_COLUMNS = 32,    /* rows of the weight in a packed panel */
    FC_INT8_LANES = 16,      /* what the "lanes" layout rounds m up to */
    FC_LANES_MAX_K = 133143, /* floor((2^31 - 1) / 127^2) */
    FC_TILE_MAX_K = 66311,   /* floor((2^31 - 1) / (127 * 255)) */
};
#define FC_INT8_TINY 0x1p-119f /* below it half / 127 is subnormal */

typedef enum fc_panel_layout { FC_PANEL_TILE, FC_PANEL_LANES } fc_panel_layout;

/* Bytes of a panel; m < 2^31, k up to the largest of the layout. */
FC_INLINE int64_t fc_codes_nbytes(int64_t m, int64_t k, fc_panel_layout layout) {
    const int64_t rows = layout == FC_PANEL_LANES ? (m + FC_INT8_LANES - 1) / FC_INT8_LANES * FC_INT8_LANES : m;
    return (k + 3) / 4 * rows * 4;
}

/* One register tile of the dense product: up to 12 rows by up to 32 columns, over the whole of k. */
typedef struct fc_int8_tile {
    const uint8_t *codes; /* [k4][rows][4], a group of the "tile" layout; any alignment */
    const int8_t *weight; /* [k4][32][4], 64-byte aligned; columns beyond `columns` are 0 */
    int64_t k4;
    int rows, columns;
    const float *scales;              /* [rows] */
    const int32_t *zeros;             /* [rows] */
    const int32_t *minus_sum;         /* [32]: minus the sum over k of the weight */
    const float *weight_scale, *bias; /* [32] each, padded by anything; a bias of -0 changes nothing */
    const float *residual;            /* [rows, stride] or NULL; may be `out` */
    float *out;                       /* [rows, stride] */
    int64_t stride;
    fc_activation activation;
} fc_int8_tile;

/* out = activation((float)acc * (scales[row] * weight_scale[column]) + bias[column]) + residual, in this order, every operation
 * rounded to float32, acc = zeros[row] * minus_sum[column] + sum over k of codes * weight, modulo 2^32. Exact: the same bits on
 * every instruction set. */
typedef void fc_linear_u8_s8_f32_fn(const fc_int8_tile *tile);

/* low = the smallest of -0 and x[n], high = the largest of 0 and x[n]; NaN, by its sign, is beyond infinity in one of them. Found
 * on the bits: those of what is positive order as signed numbers, those of what is negative as unsigned ones. Exact. */
typedef void fc_range_f32_fn(const float *x, int64_t n, float *low, float *high);

/* The same down each of `columns` columns of x[k, stride], into low[columns] and high[columns]. Exact. */
typedef void fc_range_lanes_f32_fn(const float *x, int64_t stride, int64_t columns, int64_t k, float *low, float *high);

/* codes = round half even(x / scale) for |x| <= 127 * scale (1 + 2^-23), scale normal. Exact. */
typedef void fc_quantize_f32_s8_fn(const float *x, int64_t n, float scale, int8_t *codes);

/* Quantise x[rows, stride] to dwords: row r at columns 4 i ... goes to dword out[i * out_stride + r], as
 * clip(round half even(x * inverse[r]) + zeros[r], 0, 255). |x * inverse[r]| < 2^31, or NaN, which gives the byte 0;
 * 0 <= zeros[r] <= 255. Writes exactly `rows` dwords for each i < ceil(k / 4). Exact. */
typedef void fc_quantize_rows_f32_u8_fn(const float *x, int64_t stride, int64_t rows, int64_t k, const float *inverse,
                                        const int32_t *zeros, uint8_t *out, int64_t out_stride);

/* The same from x[k, stride], row r of the matrix lying in column r < rows. Exact. */
typedef void fc_quantize_lanes_f32_u8_fn(const float *x, int64_t stride, int64_t rows, int64_t k, const float *inverse,
                                         const int32_t *zeros, uint8_t *out, int64_t out_stride);

/* Quantise x[rows, stride] with one scale (normal, and so is its inverse) and zero point: row r at columns 4 i ... goes to dword
 * out[i * out_stride + r], the pad of the last dword is zero_point. Exact. */
typedef void fc_quantize_static_rows_f32_u8_fn(const float *x, int64_t stride, int64_t rows, int64_t k, float scale,
                                               int zero_point, uint8_t *out, int64_t out_stride);

/* The same from x[k, stride], row r of the matrix lying in column r < rows. Exact. */
typedef void fc_quantize_static_lanes_f32_u8_fn(const float *x, int64_t stride, int64_t rows, int64_t k, float scale,
                                                int zero_point, uint8_t *out, int64_t out_stride);

#define FC_QUANT_SLOTS(SLOT)                                                                                                     \
    SLOT(range_f32)                                                                                                              \
    SLOT(range_lanes_f32)                                                                                                        \
    SLOT(quantize_f32_s8)                                                                                                        \
    SLOT(quantize_rows_f32_u8)                                                                                                   \
    SLOT(quantize_lanes_f32_u8) SLOT(linear_u8_s8_f32) SLOT(quantize_static_rows_f32_u8) SLOT(quantize_static_lanes_f32_u8)
#define FC_QUANT_TUNING

/* ---- drivers: steps ---- */

typedef struct fc_quantize_weight_args {
    const float *values; /* [n, k], or blocks [blocks, block_rows, block_columns] with row_offsets [n / block_rows + 1] */
    const int32_t *row_offsets;
    int64_t n, k, block_rows, block_columns;
    int8_t *codes; /* like values; 0 in a row that is tiny or not finite, whose scale is 1 or NaN */
    float *scale;  /* [n] */
} fc_quantize_weight_args;
void fc_quantize_weight(const void *args, int rank, int size);
void fc_quantize_blocks(const void *args, int rank, int size);
/* Check that row_offsets rise from 0 to `blocks`. */
fc_status fc_row_offsets_validate(const int32_t *row_offsets, int64_t groups, int64_t blocks);

typedef struct fc_quantize_activations_args {
    const float *x; /* [m, k], or [k, m] if x_lanes */
    int x_lanes;
    int64_t m, k;
    fc_panel_layout layout;
    uint8_t *codes; /* fc_codes_nbytes(m, k, layout) */
    float *scales;  /* [m] */
    int32_t *zeros; /* [m], or NULL in layout "lanes", where all are 128 */
    int symmetric;  /* quantise rows as layout "lanes" does, whatever the layout */
    float scale;    /* a static one, or 0 to take each row's own */
    int zero_point; /* of the static scale */
} fc_quantize_activations_args;
void fc_quantize_activations(const void *args, int rank, int size);

/* Memory for a packed weight, 64-byte aligned, to be freed with free(); nbytes is a multiple of 64. NULL if there is none. */
FC_HIDDEN void *fc_allocate_panels(int64_t nbytes);

/* A weight in the order the tiles read it, the same on every instruction set. */
typedef struct fc_packed_int8 {
    int64_t n, k, nbytes;
    int8_t *panels;     /* [ceil(n / 32)][K4][32][4], pads 0 */
    int32_t *minus_sum; /* [ceil(n / 32)][32] */
} fc_packed_int8;
/* What init will allocate. */
int64_t fc_packed_int8_nbytes(int64_t n, int64_t k);
/* Allocate for an [n, k] weight; fc_pack_int8 fills it. */
fc_status fc_packed_int8_init(fc_packed_int8 *packed, int64_t n, int64_t k);
void fc_packed_int8_free(fc_packed_int8 *packed);

typedef struct fc_pack_int8_args {
    fc_weight weight; /* int8 of any form; what it does not store is 0 */
    const fc_packed_int8 *packed;
} fc_pack_int8_args;
void fc_pack_int8(const void *args, int rank, int size);

typedef struct fc_linear_int8_args {
    const uint8_t *codes;                        /* a "tile" panel of [m, weight->k] */
    const float *scales;                         /* [m] */
    const int32_t *zeros;                        /* [m] */
    const fc_packed_int8 *weight;                /* k <= FC_TILE_MAX_K */
    const float *weight_scale, *bias, *residual; /* [n], [n] or NULL, [m, n] or NULL */
    float *out;                                  /* [m, n] */
    int64_t m;
    fc_activation activation;
} fc_linear_int8_args;
void fc_linear_int8(const void *args, int rank, int size);

struct fc_table;
void fc_quant_install_scalar(struct fc_table *table);
void fc_quant_install_avx2(struct fc_table *table);
void fc_quant_install_avx512(struct fc_table *table);
void fc_quant_install_avx512vnni(struct fc_table *table);

#endif
