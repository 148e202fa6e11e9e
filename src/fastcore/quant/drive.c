/* Drivers of the int8 family: scales, packing, and the walk over tiles.
 *
 * The product goes through blocks of row groups that stay in L2, and within them panel by panel of the weight, which stays in L1
 * or L2 while all groups of the block pass by. No blocking along k: both operands are packed, so even from L2 they
 * arrive at a fraction of the rate at which the tile consumes them.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "../fastcore.h"
#include "../parallel.h"

enum {
    GROUP_BLOCK_BYTES = 384 * 1024, /* codes of a block of row groups: leaves room in a 1 MiB L2 for the panel and the output */
    STRIP = 128,                    /* rows quantised at a time in the "lanes" layout: both passes find the strip in L2 */
};

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---- quantising ---- */

/* The scale of a row of which `half` shall come to `most` codes; *inverse is 0 if the row has no codes to speak of. */
static float row_scale(float half, float most, float *inverse) {
    *inverse = 0.0f;
    if (!isfinite(half)) return NAN;
    if (half < FC_INT8_TINY) return 1.0f;
    *inverse = most / half;
    return half / most;
}

/* NaN if anything between the two is not finite. */
static float largest(float low, float high) { return isfinite(low) && isfinite(high) ? fmaxf(-low, high) : NAN; }

static float max_abs(const float *x, int64_t n) {
    float low, high;
    fc_kernels.range_f32(x, n, &low, &high);
    return largest(low, high);
}

static void quantize_piece(const float *values, int64_t count, float scale, float inverse, int8_t *codes) {
    if (inverse == 0.0f)
        memset(codes, 0, (size_t)count);
    else
        fc_kernels.quantize_f32_s8(values, count, scale, codes);
}

void fc_quantize_weight(const void *args, int rank, int size) {
    const fc_quantize_weight_args *a = args;
    int64_t begin, end;
    fc_partition(a->n, 1, rank, size, &begin, &end);
    for (int64_t row = begin; row < end; row++) {
        const float *values = a->values + row * a->k;
        float inverse;
        a->scale[row] = row_scale(max_abs(values, a->k), 127.0f, &inverse);
        quantize_piece(values, a->k, a->scale[row], inverse, a->codes + row * a->k);
    }
}

fc_status fc_row_offsets_validate(const int32_t *row_offsets, int64_t groups, int64_t blocks) {
    if (row_offsets[0] != 0 || row_offsets[groups] != blocks) return FC_BAD_ARGUMENT;
    for (int64_t g = 0; g < groups; g++)
        if (row_offsets[g] > row_offsets[g + 1]) return FC_BAD_ARGUMENT;
    return FC_OK;
}

void fc_quantize_blocks(const void *args, int rank, int size) {
    const fc_quantize_weight_args *a = args;
    int64_t begin, end;
    fc_partition(a->n, 1, rank, size, &begin, &end);
    for (int64_t row = begin; row < end; row++) {
        const int32_t *range = a->row_offsets + row / a->block_rows;
        const int64_t offset = row % a->block_rows * a->block_columns, block = a->block_rows * a->block_columns;
        float max = 0.0f, inverse;
        for (int64_t b = range[0]; b < range[1]; b++) {
            const float found = max_abs(a->values + b * block + offset, a->block_columns);
            max = max != max || found <= max ? max : found; /* NaN wins, and stays */
        }
        a->scale[row] = row_scale(max, 127.0f, &inverse);
        for (int64_t b = range[0]; b < range[1]; b++) {
            const int64_t at = b * block + offset;
            quantize_piece(a->values + at, a->block_columns, a->scale[row], inverse, a->codes + at);
        }
    }
}

/* Scale, inverse and zero point of a row from low <= 0 to high >= 0, as quant.h says. */
static float choose_scale(float low, float high, int symmetric, float *inverse, int32_t *zero) {
    *zero = 128;
    if (symmetric) return row_scale(largest(low, high), 127.0f, inverse);
    const float scale = row_scale(0.5f * high - 0.5f * low, 127.5f, inverse);
    if (*inverse != 0.0f) *zero = (int32_t)__builtin_rintf(-low * *inverse);
    return scale;
}

/* Rows first ... first + count of the matrix; count <= STRIP. */
static void quantize_strip(const fc_quantize_activations_args *a, int64_t first, int64_t count, uint8_t *out,
                           int64_t out_stride) {
    float low[STRIP], high[STRIP], inverse[STRIP];
    int32_t zeros[STRIP];
    const float *x = a->x + (a->x_lanes ? first : first * a->k);
    if (a->scale != 0.0f) {
        for (int64_t r = 0; r < count; r++) {
            a->scales[first + r] = a->scale;
            a->zeros[first + r] = a->zero_point;
        }
        if (a->x_lanes)
            fc_kernels.quantize_static_lanes_f32_u8(x, a->m, count, a->k, a->scale, a->zero_point, out, out_stride);
        else
            fc_kernels.quantize_static_rows_f32_u8(x, a->k, count, a->k, a->scale, a->zero_point, out, out_stride);
        return;
    }
    if (a->x_lanes) {
        fc_kernels.range_lanes_f32(x, a->m, count, a->k, low, high);
    } else {
        for (int64_t r = 0; r < count; r++) fc_kernels.range_f32(x + r * a->k, a->k, &low[r], &high[r]);
    }
    const int symmetric = a->symmetric || a->layout == FC_PANEL_LANES;
    for (int64_t r = 0; r < count; r++) a->scales[first + r] = choose_scale(low[r], high[r], symmetric, &inverse[r], &zeros[r]);
    if (a->zeros) memcpy(a->zeros + first, zeros, (size_t)count * sizeof *zeros);
    if (a->x_lanes)
        fc_kernels.quantize_lanes_f32_u8(x, a->m, count, a->k, inverse, zeros, out, out_stride);
    else
        fc_kernels.quantize_rows_f32_u8(x, a->k, count, a->k, inverse, zeros, out, out_stride);
}

void fc_quantize_activations(const void *args, int rank, int size) {
    const fc_quantize_activations_args *a = args;
    const int lanes = a->layout == FC_PANEL_LANES;
    const int64_t k4 = (a->k + 3) / 4, strip = lanes ? STRIP : FC_INT8_ROWS;
    const int64_t padded = (a->m + FC_INT8_LANES - 1) / FC_INT8_LANES * FC_INT8_LANES;
    int64_t begin, end;
    fc_partition(a->m, lanes ? FC_INT8_LANES : FC_INT8_ROWS, rank, size, &begin, &end);
    for (int64_t first = begin; first < end; first += strip) {
        const int64_t count = smaller(strip, end - first);
        if (lanes)
            quantize_strip(a, first, count, a->codes + first * 4, padded);
        else
            quantize_strip(a, first, count, a->codes + first * k4 * 4, count);
    }
    if (!lanes || begin == end || end < a->m) return;
    for (int64_t i = 0; i < k4; i++) memset(a->codes + (i * padded + a->m) * 4, 128, (size_t)(padded - a->m) * 4);
}

/* ---- the packed weight ---- */

static int64_t panels_of(int64_t n) { return (n + FC_INT8_COLUMNS - 1) / FC_INT8_COLUMNS; }

/* Weights stream from memory once per product: on huge pages the hardware prefetcher runs ahead undisturbed, on small ones it
 * stops every 4 KiB (half the bandwidth at m = 1). The last, partial huge page stays small. */
void *fc_allocate_panels(int64_t nbytes) {
#ifdef MADV_HUGEPAGE
    const int64_t huge = 2 << 20;
    void *memory;
    if (nbytes >= huge) {
        if (posix_memalign(&memory, (size_t)huge, (size_t)nbytes) != 0) return NULL;
        (void)madvise(memory, (size_t)(nbytes / huge * huge), MADV_HUGEPAGE); /* a hint: small pages serve as well */
        return memory;
    }
#endif
    return aligned_alloc(64, (size_t)(nbytes ? nbytes : 64)); /* a multiple of 64 */
}

static int64_t packed_codes_nbytes(int64_t n, int64_t k) { return panels_of(n) * FC_INT8_COLUMNS * ((k + 3) / 4) * 4; }

int64_t fc_packed_int8_nbytes(int64_t n, int64_t k) {
    return packed_codes_nbytes(n, k) + panels_of(n) * FC_INT8_COLUMNS * (int64_t)sizeof(int32_t);
}

fc_status fc_packed_int8_init(fc_packed_int8 *packed, int64_t n, int64_t k) {
    const int64_t codes = packed_codes_nbytes(n, k), nbytes = fc_packed_int8_nbytes(n, k);
    void *memory = fc_allocate_panels(nbytes);
    if (!memory) return FC_NO_MEMORY;
    *packed = (fc_packed_int8){n, k, nbytes, memory, (int32_t *)((char *)memory + codes)};
    return FC_OK;
}

void fc_packed_int8_free(fc_packed_int8 *packed) {
    free(packed->panels);
    *packed = (fc_packed_int8){0};
}

static int32_t minus_sum_of(const int8_t *codes, int64_t count) {
    uint32_t sum = 0;
    for (int64_t i = 0; i < count; i++) sum += (uint32_t)codes[i];
    return (int32_t)-sum;
}

static int32_t pack_row(const int8_t *row, int64_t k, int8_t *out) {
    for (int64_t i = 0; i < (k + 3) / 4; i++) memcpy(out + i * FC_INT8_COLUMNS * 4, row + i * 4, (size_t)smaller(4, k - i * 4));
    return minus_sum_of(row, k);
}

static int32_t pack_row_of_blocks(const fc_weight *w, int64_t row, int8_t *out) {
    const int64_t rows = w->block_rows, columns = w->block_cols;
    int32_t sum = 0;
    for (int64_t b = w->row_offsets[row / rows]; b < w->row_offsets[row / rows + 1]; b++) {
        const int8_t *codes = (const int8_t *)w->values + (b * rows + row % rows) * columns;
        for (int64_t j = 0, at = w->index[b] * columns; j < columns; j++, at++)
            out[at / 4 * FC_INT8_COLUMNS * 4 + at % 4] = codes[j];
        sum += minus_sum_of(codes, columns);
    }
    return sum;
}

static int32_t pack_row_of_bitmask(const fc_weight *w, int64_t row, int8_t *out) {
    const uint8_t *bits = w->bitmask + row * ((w->k + 7) / 8);
    const int8_t *codes = (const int8_t *)w->values + w->row_starts[row], *next = codes;
    for (int64_t i = 0; i < w->k; i++)
        if (bits[i / 8] >> i % 8 & 1) out[i / 4 * FC_INT8_COLUMNS * 4 + i % 4] = *next++;
    return minus_sum_of(codes, next - codes);
}

void fc_pack_int8(const void *args, int rank, int size) {
    const fc_pack_int8_args *a = args;
    const fc_packed_int8 *p = a->packed;
    const int64_t k4 = (p->k + 3) / 4;
    int64_t begin, end;
    fc_partition(panels_of(p->n) * FC_INT8_COLUMNS, FC_INT8_COLUMNS, rank, size, &begin, &end);
    for (int64_t column = begin; column < end; column++) {
        int8_t *out = p->panels + (column / FC_INT8_COLUMNS * k4 * FC_INT8_COLUMNS + column % FC_INT8_COLUMNS) * 4;
        for (int64_t i = 0; i < k4; i++) memset(out + i * FC_INT8_COLUMNS * 4, 0, 4);
        if (column >= p->n)
            p->minus_sum[column] = 0;
        else if (a->weight.kind == FC_BLOCKS_S8)
            p->minus_sum[column] = pack_row_of_blocks(&a->weight, column, out);
        else if (a->weight.kind == FC_BITMASK_S8)
            p->minus_sum[column] = pack_row_of_bitmask(&a->weight, column, out);
        else
            p->minus_sum[column] = pack_row((const int8_t *)a->weight.values + column * p->k, p->k, out);
    }
}

/* ---- the product ---- */

/* The columns of one panel, padded to whole vectors. */
typedef struct panel_columns {
    float weight_scale[FC_INT8_COLUMNS], bias[FC_INT8_COLUMNS];
} panel_columns;

static void load_columns(const fc_linear_int8_args *a, int64_t first, int64_t count, panel_columns *columns) {
    for (int j = 0; j < FC_INT8_COLUMNS; j++) {
        columns->weight_scale[j] = j < count ? a->weight_scale[first + j] : 0.0f;
        columns->bias[j] = j < count && a->bias ? a->bias[first + j] : -0.0f; /* x + -0 is x, for every x */
    }
}

static void run_panel(const fc_linear_int8_args *a, int64_t panel, int64_t first_group, int64_t last_group) {
    const fc_packed_int8 *w = a->weight;
    const int64_t k4 = (w->k + 3) / 4, column = panel * FC_INT8_COLUMNS, columns = smaller(FC_INT8_COLUMNS, w->n - column);
    panel_columns padded;
    load_columns(a, column, columns, &padded);
    for (int64_t row = first_group * FC_INT8_ROWS; row < smaller(last_group * FC_INT8_ROWS, a->m); row += FC_INT8_ROWS) {
        const int64_t at = row * w->n + column;
        fc_kernels.linear_u8_s8_f32(&(fc_int8_tile){
            .codes = a->codes + row * k4 * 4,
            .weight = w->panels + column * k4 * 4,
            .k4 = k4,
            .rows = (int)smaller(FC_INT8_ROWS, a->m - row),
            .columns = (int)columns,
            .scales = a->scales + row,
            .zeros = a->zeros + row,
            .minus_sum = w->minus_sum + column,
            .weight_scale = padded.weight_scale,
            .bias = padded.bias,
            .residual = a->residual ? a->residual + at : NULL,
            .out = a->out + at,
            .stride = w->n,
            .activation = a->activation,
        });
    }
}

/* The share of the slowest rank, in items of `across`, if `items` are dealt to `size` ranks. */
static int64_t slowest(int64_t items, int64_t across, int size) { return (items + size - 1) / size * across; }

void fc_linear_int8(const void *args, int rank, int size) {
    const fc_linear_int8_args *a = args;
    const int64_t groups = (a->m + FC_INT8_ROWS - 1) / FC_INT8_ROWS, panels = panels_of(a->weight->n);
    int64_t first_group = 0, last_group = groups, first_panel = 0, last_panel = panels;
    /* Each rank reads its own part of the weight unless that leaves some rank more to do. */
    if (slowest(panels, groups, size) <= slowest(groups, panels, size))
        fc_partition(panels, 1, rank, size, &first_panel, &last_panel);
    else
        fc_partition(groups, 1, rank, size, &first_group, &last_group);
    const int64_t group_bytes = (a->weight->k + 3) / 4 * 4 * FC_INT8_ROWS;
    const int64_t block = group_bytes < GROUP_BLOCK_BYTES && group_bytes > 0 ? GROUP_BLOCK_BYTES / group_bytes : 1;
    for (int64_t group = first_group; group < last_group; group += block)
        for (int64_t panel = first_panel; panel < last_panel; panel++)
            run_panel(a, panel, group, smaller(group + block, last_group));
}
