/* The bitmask family: products of one or a few rows with weights of which single elements are stored, where reading the weight is
 * what takes the time. A bit for each element and the packed values are read once and expanded in registers.
 *
 * float32 values are multiplied where they lie (weight.h), so that they may train. Codes are packed, in the same way for every
 * instruction set: panels of 16 weight rows, each one stream of segments of up to `group` chunks, which hold
 *   - int4 only: each row's scale for this group, [16] halves, or float if the weight's are ("wide");
 *   - uint64 [chunks]: bit 4 r + j of a chunk stands for weight row r at column 4 c + j;
 *   - int8: the chunks' codes in the order of their bits;
 *   - int4: bytes with codes of the first ceil(chunks / 2) chunks in their low nibbles, of the others in their high ones.
 */
#ifndef FC_BITMASK_H
#define FC_BITMASK_H

#include <stdint.h>

#include "../isa.h"
#include "../nn/activation.h"
#include "../status.h"
#include "../weight.h"

enum {
    FC_BITMASK_ROWS = 16,     /* weight rows of a panel: the lanes of a register, four columns each */
    FC_BITMASK_CHUNKS = 32,   /* of a segment of an int8 stream */
    FC_BITMASK_GROUP = 65536, /* most columns of an int4 group: its sums, sixteenfold, fit an int32 */
    FC_BITMASK_X_ROWS = 4,    /* rows of x in a float32 tile */
    FC_BITMASK_SLACK = 64,    /* bytes beyond a stream that kernels may read */
};

/* ---- slots: leaf kernels, one thread, no allocation ---- */

/* One panel of weight rows by up to 12 rows of codes, over the whole of k. */
typedef struct fc_bitmask_tile {
    const uint8_t *stream; /* any alignment */
    const uint8_t *codes;  /* [k4][rows][4], a group of the "tile" layout of quant.h; any alignment */
    int64_t k4, group;     /* chunks of a row, and of a segment */
    int rows, wide;
    void *sums; /* [rows][16] int32 or float, 64-byte aligned */
} fc_bitmask_tile;

/* sums[r][row] = sum over the stored elements of the row of codes * weight, int32. Exact. */
typedef void fc_multiply_bitmask_u8_s8_fn(const fc_bitmask_tile *tile);
/* sums[r][row] = a chain over ascending groups of fma((float)sum, scale, chain) from 0, sum = that of codes * weight in the
 * group. Exact. */
typedef void fc_multiply_bitmask_u8_s4_fn(const fc_bitmask_tile *tile);

/* Some weight rows by up to FC_BITMASK_X_ROWS rows of x. */
typedef struct fc_bitmask_rows {
    const float *values;        /* of the whole weight; any alignment */
    int64_t count;              /* of all of them: nothing beyond is read */
    const uint8_t *bitmask;     /* [weight_rows][ceil(k / 8)] */
    const int64_t *row_offsets; /* [weight_rows + 1], into values */
    int64_t weight_rows, k;
    const float *x; /* [rows][k] */
    int rows;
    float *sums; /* [rows][stride] */
    int64_t stride;
} fc_bitmask_rows;

/* sums[r][row] = sum over the stored elements of the row of x * value. Bounded by k * eps * sum |x * value|. The order of
 * additions depends on k alone. */
typedef void fc_multiply_bitmask_f32_fn(const fc_bitmask_rows *tile);

#define FC_BITMASK_SLOTS(SLOT) SLOT(multiply_bitmask_f32) SLOT(multiply_bitmask_u8_s8) SLOT(multiply_bitmask_u8_s4)

/* ---- drivers ---- */

/* Check a bitmask weight before any kernel follows it: FC_BAD_ARGUMENT if bits beyond the last column are set, or if row_offsets
 * are not the running number of bits. */
fc_status fc_bitmask_validate(const fc_weight *weight);

typedef struct fc_bitmask_unpack {
    fc_weight weight;
    float *out; /* [n][k], scales applied */
} fc_bitmask_unpack;
void fc_bitmask_expand(const void *unpack, int rank, int size);

/* Where the elements are, as blocks of 1 x 1 say it: row_offsets [n + 1], index [row_starts[n]], which fits an int32. */
void fc_bitmask_index(const fc_weight *weight, int32_t *row_offsets, int32_t *index);

/* What a weight with codes is packed to. */
typedef struct fc_packed_bitmask {
    fc_weight_kind kind;
    int64_t n, k, group, nbytes;
    int wide;
    int64_t *offsets;  /* [panels + 1]: where each panel's stream begins */
    uint8_t *streams;  /* offsets[panels] bytes and FC_BITMASK_SLACK */
    void *corrections; /* [panels][16]: minus each row's sum of codes, int32; of int4 that of codes times scales, float */
} fc_packed_bitmask;
/* What init will allocate; reads the bits. */
int64_t fc_packed_bitmask_nbytes(const fc_weight *weight);
/* Allocate and lay out; fc_pack_bitmask fills it. */
fc_status fc_packed_bitmask_init(fc_packed_bitmask *packed, const fc_weight *weight);
void fc_packed_bitmask_free(fc_packed_bitmask *packed);

typedef struct fc_pack_bitmask_args {
    fc_weight weight;
    const fc_packed_bitmask *packed;
} fc_pack_bitmask_args;
void fc_pack_bitmask(const void *args, int rank, int size);

/* out = activation(v + bias) + residual, v[m, n] =
 *   int8: (float)(sums - zeros[m] * sum of the row's codes) * (scales[m] * weight_scale[n]), as quant.h has it;
 *   int4: fma(-zeros[m], sum of the row's scales * codes, sums) * (scales[m] * weight_scale[n]). */
typedef struct fc_bitmask_linear_args {
    const uint8_t *codes;            /* a "tile" panel of [m, k] */
    const float *scales;             /* [m] */
    const int32_t *zeros;            /* [m] */
    const fc_packed_bitmask *weight; /* k <= FC_INT8_MAX_K */
    const float *weight_scale;       /* [n]; of int4 a gain on each row, or NULL for 1 */
    const float *bias, *residual;    /* [n], [m, n], or NULL */
    float *out;                      /* [m, n]; may be residual */
    int64_t m;
    fc_activation activation;
} fc_bitmask_linear_args;
void fc_bitmask_linear_int(const void *args, int rank, int size);

/* The same in float32, from values in place; out must not overlap x, and may be residual. */
typedef struct fc_bitmask_linear_f32_args {
    fc_weight weight;
    const float *x;               /* [m, k] */
    const float *bias, *residual; /* [n], [m, n], or NULL */
    float *out;                   /* [m, n] */
    int64_t m;
    fc_activation activation;
} fc_bitmask_linear_f32_args;
void fc_bitmask_linear_f32(const void *args, int rank, int size);

struct fc_table;
void fc_bitmask_install_scalar(struct fc_table *table);
void fc_bitmask_install_avx2(struct fc_table *table);
void fc_bitmask_install_avx512(struct fc_table *table);
void fc_bitmask_install_avx512vbmi2(struct fc_table *table);

#endif
