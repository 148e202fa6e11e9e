/* Bitmask weights: checked, packed, expanded, and multiplied.
 *
 * Ranks share the rows of the weight, cut where an equal part of its bytes lies on either side, so that each reads its own part
 * of memory once; all rows of x pass over a panel while it is in cache. A sum is never shared, so that no partition changes a
 * bit.
 */
#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "../fastcore.h"
#include "../parallel.h"

enum {
    TILE_ROWS = 64,    /* weight rows of a float32 tile */
    CODE_ROWS = 12,    /* rows of x in a group of the "tile" layout (FC_INT8_ROWS) */
    EPILOGUE_WORK = 8, /* stored values that a row's epilogue counts like */
};

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t pieces(int64_t total, int64_t most) { return (total + most - 1) / most; }

/* ---- bits ---- */

static int64_t count_bits(const uint8_t *bits, int64_t bytes) {
    int64_t count = 0, i = 0;
    for (; i + 8 <= bytes; i += 8) {
        uint64_t word;
        memcpy(&word, bits + i, sizeof word);
        count += __builtin_popcountll(word);
    }
    for (; i < bytes; i++) count += __builtin_popcount(bits[i]);
    return count;
}

fc_status fc_bitmask_validate(const fc_weight *w) {
    const int64_t bytes = pieces(w->k, 8);
    const int beyond = w->k % 8 ? 0xff << w->k % 8 & 0xff : 0;
    int64_t count = 0;
    for (int64_t row = 0; row < w->n; row++) {
        const uint8_t *bits = w->bitmask + row * bytes;
        if (w->row_starts[row] != count || (bytes && bits[bytes - 1] & beyond)) return FC_BAD_ARGUMENT;
        count += count_bits(bits, bytes);
    }
    return w->row_starts[w->n] == count ? FC_OK : FC_BAD_ARGUMENT;
}

/* The code of stored element `at`. */
static int code_at(const fc_weight *w, int64_t at) {
    if (w->kind == FC_BITMASK_S8) return ((const int8_t *)w->values)[at];
    return ((((const uint8_t *)w->values)[at / 2] >> at % 2 * 4 & 15) ^ 8) - 8;
}

static float scale_at(const fc_weight *w, int64_t row, int64_t group) {
    return fc_int4_scale(w->group_scales, w->wide, row * pieces(w->k, w->group) + group);
}

static float value_at(const fc_weight *w, int64_t row, int64_t column, int64_t at) {
    if (w->kind == FC_BITMASK_F32) return ((const float *)w->values)[at];
    return (float)code_at(w, at) * (w->kind == FC_BITMASK_S8 ? w->scale[row] : scale_at(w, row, column / w->group));
}

void fc_bitmask_expand(const void *args, int rank, int size) {
    const fc_bitmask_unpack *unpack = args;
    const fc_weight *w = &unpack->weight;
    int64_t begin, end;
    fc_partition(w->n, 1, rank, size, &begin, &end);
    for (int64_t row = begin; row < end; row++) {
        const uint8_t *bits = w->bitmask + row * pieces(w->k, 8);
        int64_t at = w->row_starts[row];
        for (int64_t i = 0; i < w->k; i++) {
            float value = 0.0f;
            if (bits[i / 8] >> i % 8 & 1) value = value_at(w, row, i, at++);
            unpack->out[row * w->k + i] = value;
        }
    }
}

void fc_bitmask_index(const fc_weight *w, int32_t *row_offsets, int32_t *index) {
    for (int64_t row = 0; row < w->n; row++) {
        const uint8_t *bits = w->bitmask + row * pieces(w->k, 8);
        row_offsets[row] = (int32_t)w->row_starts[row];
        for (int64_t i = 0; i < pieces(w->k, 8); i++)
            for (unsigned byte = bits[i]; byte; byte &= byte - 1) *index++ = (int32_t)(i * 8 + __builtin_ctz(byte));
    }
    row_offsets[w->n] = (int32_t)w->row_starts[w->n];
}

/* ---- packing ---- */

static int64_t chunks_of(int64_t k) { return pieces(k, 4); }
static int64_t panels_of(int64_t n) { return pieces(n, FC_BITMASK_ROWS); }
static int64_t group_chunks(const fc_weight *w) { return w->kind == FC_BITMASK_S8 ? FC_BITMASK_CHUNKS : w->group / 4; }
/* Of the scales of one segment. */
static int64_t scales_nbytes(const fc_weight *w) { return w->kind == FC_BITMASK_S8 ? 0 : FC_BITMASK_ROWS * (w->wide ? 4 : 2); }

/* Four bits for each row of a panel. */
static uint64_t chunk_mask(const fc_weight *w, int64_t panel, int64_t chunk) {
    const int64_t bytes = pieces(w->k, 8), first = panel * FC_BITMASK_ROWS, rows = smaller(FC_BITMASK_ROWS, w->n - first);
    const uint8_t *at = w->bitmask + first * bytes + chunk / 2;
    uint64_t mask = 0;
    for (int64_t r = 0; r < rows; r++) mask |= (uint64_t)(at[r * bytes] >> chunk % 2 * 4 & 15) << (4 * r);
    return mask;
}

/* The bytes of the codes of chunks [first, first + chunks) of a panel. */
static int64_t codes_nbytes(const fc_weight *w, int64_t panel, int64_t first, int64_t chunks) {
    const int64_t lower = w->kind == FC_BITMASK_S8 ? chunks : (chunks + 1) / 2;
    int64_t low = 0, high = 0;
    for (int64_t c = 0; c < chunks; c++) *(c < lower ? &low : &high) += __builtin_popcountll(chunk_mask(w, panel, first + c));
    return low > high ? low : high;
}

static int64_t stream_nbytes(const fc_weight *w, int64_t panel) {
    const int64_t k4 = chunks_of(w->k), group = group_chunks(w);
    int64_t bytes = 0;
    for (int64_t first = 0; first < k4; first += group) {
        const int64_t chunks = smaller(group, k4 - first);
        bytes += scales_nbytes(w) + chunks * 8 + codes_nbytes(w, panel, first, chunks);
    }
    return bytes;
}

static int64_t line(int64_t bytes) { return pieces(bytes, 64) * 64; }

/* Bytes of the parts that follow each other in one allocation: corrections, offsets, streams. */
static int64_t corrections_nbytes(int64_t n) { return panels_of(n) * FC_BITMASK_ROWS * 4; }
static int64_t offsets_nbytes(int64_t n) { return line((panels_of(n) + 1) * (int64_t)sizeof(int64_t)); }

int64_t fc_packed_bitmask_nbytes(const fc_weight *weight) {
    int64_t bytes = corrections_nbytes(weight->n) + offsets_nbytes(weight->n) + FC_BITMASK_SLACK;
    for (int64_t panel = 0; panel < panels_of(weight->n); panel++) bytes += stream_nbytes(weight, panel);
    return line(bytes);
}

/* Streams are read from memory once per product: huge pages let the prefetcher run ahead, as for dense int8 panels. */
static void *allocate(int64_t nbytes) {
#ifdef MADV_HUGEPAGE
    const int64_t huge = 2 << 20;
    void *memory;
    if (nbytes >= huge) {
        if (posix_memalign(&memory, (size_t)huge, (size_t)nbytes) != 0) return NULL;
        (void)madvise(memory, (size_t)(nbytes / huge * huge), MADV_HUGEPAGE);
        return memory;
    }
#endif
    return aligned_alloc(64, (size_t)nbytes);
}

fc_status fc_packed_bitmask_init(fc_packed_bitmask *packed, const fc_weight *weight) {
    const int64_t nbytes = fc_packed_bitmask_nbytes(weight), panels = panels_of(weight->n);
    char *memory = allocate(nbytes);
    if (!memory) return FC_NO_MEMORY;
    *packed = (fc_packed_bitmask){
        .kind = weight->kind,
        .n = weight->n,
        .k = weight->k,
        .group = group_chunks(weight),
        .wide = weight->wide,
        .nbytes = nbytes,
        .corrections = memory,
        .offsets = (int64_t *)(memory + corrections_nbytes(weight->n)),
        .streams = (uint8_t *)memory + corrections_nbytes(weight->n) + offsets_nbytes(weight->n),
    };
    packed->offsets[0] = 0;
    for (int64_t p = 0; p < panels; p++) packed->offsets[p + 1] = packed->offsets[p] + stream_nbytes(weight, p);
    memset(packed->streams + packed->offsets[panels], 0, FC_BITMASK_SLACK);
    return FC_OK;
}

void fc_packed_bitmask_free(fc_packed_bitmask *packed) {
    free(packed->corrections);
    *packed = (fc_packed_bitmask){0};
}

/* What a panel's rows have come to: where each reads its next code, and its sum in the present segment. */
typedef struct panel_rows {
    int64_t at[FC_BITMASK_ROWS];
    int32_t sums[FC_BITMASK_ROWS];
} panel_rows;

/* Append the codes of a chunk, in the byte's lower (shift 0) or upper half; returns where the next go. */
static uint8_t *pack_chunk(const fc_weight *w, uint64_t mask, panel_rows *rows, int shift, uint8_t *to) {
    for (; mask; mask &= mask - 1) {
        const int row = __builtin_ctzll(mask) / 4, code = code_at(w, rows->at[row]++);
        rows->sums[row] += code;
        if (w->kind == FC_BITMASK_S8)
            *to++ = (uint8_t)code;
        else
            *to++ |= (uint8_t)((code & 15) << shift);
    }
    return to;
}

/* The scales of one group, as they are stored; those of rows that are not there are 0. */
static void pack_scales(const fc_weight *w, int64_t panel, int64_t group, uint8_t *to) {
    const int64_t groups = pieces(w->k, w->group), item = w->wide ? 4 : 2;
    memset(to, 0, (size_t)scales_nbytes(w));
    for (int64_t row = panel * FC_BITMASK_ROWS; row < smaller((panel + 1) * FC_BITMASK_ROWS, w->n); row++, to += item)
        memcpy(to, (const char *)w->group_scales + (row * groups + group) * item, (size_t)item);
}

/* One segment; returns where the next begins. */
static uint8_t *pack_segment(const fc_weight *w, int64_t panel, int64_t first, int64_t chunks, panel_rows *rows, uint8_t *to) {
    const int64_t lower = w->kind == FC_BITMASK_S4 ? (chunks + 1) / 2 : chunks, bytes = codes_nbytes(w, panel, first, chunks);
    if (w->kind == FC_BITMASK_S4) pack_scales(w, panel, first * 4 / w->group, to);
    to += scales_nbytes(w);
    uint8_t *const values = to + chunks * 8, *low = values, *high = values;
    memset(values, 0, (size_t)bytes);
    for (int64_t c = 0; c < chunks; c++) {
        const uint64_t mask = chunk_mask(w, panel, first + c);
        memcpy(to + c * 8, &mask, sizeof mask);
        if (c < lower)
            low = pack_chunk(w, mask, rows, 0, low);
        else
            high = pack_chunk(w, mask, rows, 4, high);
    }
    return values + bytes;
}

static void pack_panel(const fc_weight *w, const fc_packed_bitmask *p, int64_t panel) {
    const int64_t k4 = chunks_of(w->k), row = panel * FC_BITMASK_ROWS, live = smaller(FC_BITMASK_ROWS, w->n - row);
    panel_rows rows = {0};
    double corrections[FC_BITMASK_ROWS] = {0};
    uint8_t *to = p->streams + p->offsets[panel];
    for (int64_t r = 0; r < live; r++) rows.at[r] = w->row_starts[row + r];
    for (int64_t first = 0; first < k4; first += p->group) {
        memset(rows.sums, 0, sizeof rows.sums);
        to = pack_segment(w, panel, first, smaller(p->group, k4 - first), &rows, to);
        for (int64_t r = 0; r < live; r++)
            corrections[r] += rows.sums[r] * (w->kind == FC_BITMASK_S4 ? (double)scale_at(w, row + r, first / p->group) : 1.0);
    }
    for (int r = 0; r < FC_BITMASK_ROWS; r++) {
        if (w->kind == FC_BITMASK_S4)
            ((float *)p->corrections)[row + r] = (float)corrections[r];
        else
            ((int32_t *)p->corrections)[row + r] = -(int32_t)corrections[r];
    }
}

void fc_pack_bitmask(const void *args, int rank, int size) {
    const fc_pack_bitmask_args *a = args;
    int64_t begin, end;
    fc_partition(panels_of(a->weight.n), 1, rank, size, &begin, &end);
    for (int64_t panel = begin; panel < end; panel++) pack_panel(&a->weight, a->packed, panel);
}

/* ---- products ---- */

/* The first of `count` items at which `starts` and a fixed cost an item come to this rank's share. */
static int64_t balanced_cut(const int64_t *starts, int64_t count, int64_t each, int rank, int size) {
    const double wanted = (double)(starts[count] - starts[0] + count * each) * rank / size;
    int64_t low = 0, high = count;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if ((double)(starts[middle] - starts[0] + middle * each) < wanted)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* out = activation(tile + bias) + residual over rows x columns from weight row `column` on; the tile is overwritten. */
static void finish(float *tile, int64_t tile_stride, int64_t rows, int64_t columns, const float *bias, const float *residual,
                   float *out, int64_t stride, fc_activation activation) {
    fc_kernels.epilogue_f32(tile, tile_stride, rows, columns, bias, activation, residual, stride);
    for (int64_t r = 0; r < rows; r++) memcpy(out + r * stride, tile + r * tile_stride, (size_t)columns * sizeof *out);
}

/* Rows [row, row + rows) of x by one panel. */
static void multiply_panel(const fc_bitmask_linear_args *a, int64_t panel, int64_t row, int64_t rows) {
    const fc_packed_bitmask *w = a->weight;
    const int64_t k4 = chunks_of(w->k), column = panel * FC_BITMASK_ROWS, columns = smaller(FC_BITMASK_ROWS, w->n - column);
    _Alignas(64) int32_t sums[CODE_ROWS][FC_BITMASK_ROWS];
    _Alignas(64) float chains[CODE_ROWS][FC_BITMASK_ROWS];
    const int nibbles = w->kind == FC_BITMASK_S4;
    const fc_bitmask_tile tile = {.stream = w->streams + w->offsets[panel],
                                  .codes = a->codes + row * k4 * 4,
                                  .k4 = k4,
                                  .group = w->group,
                                  .rows = (int)rows,
                                  .wide = w->wide,
                                  .sums = nibbles ? (void *)chains : (void *)sums};
    if (nibbles)
        fc_kernels.multiply_bitmask_u8_s4(&tile);
    else
        fc_kernels.multiply_bitmask_u8_s8(&tile);
    for (int64_t r = 0; r < rows; r++) {
        const int32_t zero = a->zeros[row + r];
        const float *scaled_sums = (const float *)w->corrections + column;
        const int32_t *minus_sums = (const int32_t *)w->corrections + column;
        for (int64_t j = 0; j < columns; j++) {
            /* unsigned, so that sums wrap */
            const uint32_t whole = nibbles ? 0 : (uint32_t)sums[r][j] + (uint32_t)zero * (uint32_t)minus_sums[j];
            const float v = nibbles ? fc_fma(-(float)zero, scaled_sums[j], chains[r][j]) : (float)(int32_t)whole;
            chains[r][j] = v * (a->weight_scale ? a->scales[row + r] * a->weight_scale[column + j] : a->scales[row + r]);
        }
    }
    const int64_t at = row * w->n + column;
    finish(chains[0], FC_BITMASK_ROWS, rows, columns, a->bias ? a->bias + column : NULL, a->residual ? a->residual + at : NULL,
           a->out + at, w->n, a->activation);
}

void fc_bitmask_linear_int(const void *args, int rank, int size) {
    const fc_bitmask_linear_args *a = args;
    const int64_t panels = panels_of(a->weight->n);
    const int64_t first = balanced_cut(a->weight->offsets, panels, FC_BITMASK_ROWS * EPILOGUE_WORK, rank, size);
    const int64_t last = balanced_cut(a->weight->offsets, panels, FC_BITMASK_ROWS * EPILOGUE_WORK, rank + 1, size);
    for (int64_t panel = first; panel < last; panel++)
        for (int64_t row = 0; row < a->m; row += CODE_ROWS) multiply_panel(a, panel, row, smaller(CODE_ROWS, a->m - row));
}

void fc_bitmask_linear_f32(const void *args, int rank, int size) {
    const fc_bitmask_linear_f32_args *a = args;
    const fc_weight *w = &a->weight;
    float tile[FC_BITMASK_X_ROWS][TILE_ROWS];
    const int64_t last = balanced_cut(w->row_starts, w->n, EPILOGUE_WORK, rank + 1, size);
    for (int64_t column = balanced_cut(w->row_starts, w->n, EPILOGUE_WORK, rank, size); column < last; column += TILE_ROWS) {
        const int64_t columns = smaller(TILE_ROWS, last - column);
        for (int64_t row = 0; row < a->m; row += FC_BITMASK_X_ROWS) {
            const int64_t rows = smaller(FC_BITMASK_X_ROWS, a->m - row), at = row * w->n + column;
            fc_kernels.multiply_bitmask_f32(&(fc_bitmask_rows){.values = w->values,
                                                               .count = w->row_starts[w->n],
                                                               .bitmask = w->bitmask + column * pieces(w->k, 8),
                                                               .row_offsets = w->row_starts + column,
                                                               .weight_rows = columns,
                                                               .k = w->k,
                                                               .x = a->x + row * w->k,
                                                               .rows = (int)rows,
                                                               .sums = tile[0],
                                                               .stride = TILE_ROWS});
            finish(tile[0], TILE_ROWS, rows, columns, a->bias ? a->bias + column : NULL, a->residual ? a->residual + at : NULL,
                   a->out + at, w->n, a->activation);
        }
    }
}
