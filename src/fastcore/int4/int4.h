/* int4 in groups: weights and tables of 4-bit codes with one scale for each group of consecutive k, and the product with them.
 *
 * A code c in [-8, 7] stands for c * scale; a scale may be negative, so that whichever end of a group is larger takes code -8.
 * Scales are IEEE half precision, or float32 where the range of halves is too small ("wide").
 *
 * Canonical form, as files hold it: words [n, ceil(k / 8)], code k of a row plus 8 in bits 4 (k % 8) ... of word k / 8; scales
 * [n, G], G = ceil(k / group). `group` is a multiple of 8; the last group of a row may be short. Pad codes may be anything.
 *
 * Packed form: panels of FC_INT4_COLUMNS rows of the weight, one behind the other, so that a product with one row of activations
 * reads memory once and straight on. Of each group a panel holds the 32 scales (one or two cache lines), then for each 8 k 128
 * bytes [32][4]: byte b has code k = b in its low and k = b + 4 in its high half.
 *
 * Activations are int8, symmetric in [-127, 127] with a scale for each group of each row, in groups of FC_INT4_ROWS rows: codes
 * [2 * ceil(k / 8)][rows][4], pads 0, and for the corrections by 8 `offsets`, minus 8 times the sum of the codes of a group.
 * A group that is tiny (FC_INT8_TINY) has codes 0 and scale 1; one with an infinity or a NaN has codes 0 and scale NaN.
 */
#ifndef FC_INT4_H
#define FC_INT4_H

#include <stdint.h>

#include "../isa.h"
#include "../nn/activation.h"
#include "../status.h"

enum {
    FC_INT4_ROWS = 6,           /* rows of x in a group of codes, and of a register tile */
    FC_INT4_COLUMNS = 32,       /* rows of the weight in a panel */
    FC_INT4_MAX_GROUP = 131072, /* the sum of 127 * 240 over half of it fits an int32: high halves of bytes count 16 times */
};

typedef struct fc_int4_weight {
    const uint32_t *words;
    const void *scales; /* uint16_t halves, or float if wide */
    int64_t n, k, group;
    int wide;
} fc_int4_weight;

FC_INLINE int64_t fc_int4_octets(int64_t k) { return (k + 7) / 8; }
FC_INLINE int64_t fc_int4_groups(int64_t k, int64_t group) { return (k + group - 1) / group; }

/* A half-precision number, exactly. */
FC_INLINE float fc_half(uint16_t half) {
    const uint32_t magnitude = (uint32_t)(half & 0x7fff) << 13, sign = (uint32_t)(half & 0x8000) << 16;
    const uint32_t special = magnitude >= 0x7c00u << 13 ? 0x7f800000u : 0; /* infinity and NaN keep an exponent of ones */
    float value;
    uint32_t bits;
    __builtin_memcpy(&value, &magnitude, 4);
    value *= 0x1p112f; /* re-biases the exponent, subnormals among them */
    __builtin_memcpy(&bits, &value, 4);
    bits |= sign | special;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

FC_INLINE float fc_int4_scale(const void *scales, int wide, int64_t at) {
    return wide ? ((const float *)scales)[at] : fc_half(((const uint16_t *)scales)[at]);
}

/* One register tile: up to 6 rows by up to 32 columns, over the whole of k. */
typedef struct fc_int4_tile {
    const int8_t *codes;    /* [2 * octets][rows][4] */
    const float *scales;    /* [groups][rows] */
    const int32_t *offsets; /* [groups][rows] */
    const uint8_t *weight;  /* a panel, 64-byte aligned; columns beyond `columns` are 0 */
    int64_t k, group;       /* group <= FC_INT4_MAX_GROUP */
    int wide, rows, columns;
    const float *gain, *bias; /* [32] each; a bias of -0 changes nothing */
    const float *residual;    /* [rows, stride] or NULL; may be `out` */
    float *out;               /* [rows, stride] */
    int64_t stride;
    fc_activation activation;
} fc_int4_tile;

/* out = activation(sum * gain[column] + bias[column]) + residual, every operation rounded to float32; sum is one chain of fused
 * multiply-adds over the groups, of (float)(offset + sum over k of codes * (weight + 8)) by scale of the weight * scales.
 * The same bits on every instruction set. */
typedef void fc_linear_u4_s8_f32_fn(const fc_int4_tile *tile);

/* Quantise x[k] in groups as one of `rows` rows: dword i goes to dword codes[i * rows], scale and offset of group g to
 * scales[g * rows] and offsets[g * rows]. Exact. */
typedef void fc_quantize_groups_f32_s8_fn(const float *x, int64_t k, int64_t group, int64_t rows, int8_t *codes, float *scales,
                                          int32_t *offsets);

/* out[k] = row `row` of the weight, added to what is there if `add`. Exact. */
typedef void fc_expand_u4_f32_fn(const fc_int4_weight *weight, int64_t row, int add, float *out);

#define FC_INT4_SLOTS(SLOT)                                                                                                      \
    SLOT(linear_u4_s8_f32)                                                                                                       \
    SLOT(quantize_groups_f32_s8)                                                                                                 \
    SLOT(expand_u4_f32)

/* ---- drivers: steps ---- */

typedef struct fc_packed_int4 {
    int64_t n, k, group, nbytes;
    int wide;
    uint8_t *panels;
} fc_packed_int4;
/* What init will allocate. */
int64_t fc_packed_int4_nbytes(const fc_int4_weight *weight);
/* Allocate for a weight; fc_pack_int4 fills it. */
fc_status fc_packed_int4_init(fc_packed_int4 *packed, const fc_int4_weight *weight);
void fc_packed_int4_free(fc_packed_int4 *packed);

typedef struct fc_pack_int4_args {
    const fc_int4_weight *weight;
    const fc_packed_int4 *packed;
} fc_pack_int4_args;
void fc_pack_int4(const void *args, int rank, int size);

typedef struct fc_quantize_groups_args {
    const float *x; /* [m, k] */
    int64_t m, k, group;
    int8_t *codes;    /* [m * 8 * octets] */
    float *scales;    /* [m * groups] */
    int32_t *offsets; /* [m * groups] */
} fc_quantize_groups_args;
void fc_quantize_groups(const void *args, int rank, int size);

typedef struct fc_linear_int4_args {
    const int8_t *codes;
    const float *scales;
    const int32_t *offsets;
    const fc_packed_int4 *weight;
    const float *gain, *bias, *residual; /* [n] or NULL, [n] or NULL, [m, n] or NULL */
    float *out;                          /* [m, n] */
    int64_t m;
    fc_activation activation;
} fc_linear_int4_args;
void fc_linear_int4(const void *args, int rank, int size);

struct fc_table;
void fc_int4_install_scalar(struct fc_table *table);
void fc_int4_install_avx2(struct fc_table *table);
void fc_int4_install_avx512(struct fc_table *table);
void fc_int4_install_avx512vnni(struct fc_table *table);

#endif
