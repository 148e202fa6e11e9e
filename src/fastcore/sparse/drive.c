/* Block weights: checked, packed, expanded, and multiplied with activations whose rows lie side by side in vector lanes.
 *
 * A product walks tiles of 64 columns of M. The activations of one K block of a tile form a contiguous panel that stays in L1:
 * codes lie so, floats are copied (rows of x that are a power of two apart would share a few cache sets). Then every weight row
 * of a chunk adds what it has in that K block to sums on the stack. Each sum is one chain in ascending K, so no partition, tile
 * width or K block changes a bit.
 */
#include "../fastcore.h"
#include "../parallel.h"

enum {
    WEIGHT_BYTES = 512 * 1024, /* weights that stay in L2 beside a panel */
    NEAR_ROWS = 32,            /* weight rows whose sums stay in L1: 8 KiB */
};

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

fc_status fc_blocks_validate(const fc_weight *weight, int64_t blocks) {
    const int64_t groups = weight->n / weight->block_rows, columns = weight->k / weight->block_cols;
    if (weight->row_offsets[0] != 0 || weight->row_offsets[groups] != blocks) return FC_BAD_ARGUMENT;
    for (int64_t g = 0; g < groups; g++) {
        const int64_t first = weight->row_offsets[g], last = weight->row_offsets[g + 1];
        if (first > last || last > blocks) return FC_BAD_ARGUMENT;
        for (int64_t b = first; b < last; b++)
            if (weight->index[b] < 0 || weight->index[b] >= columns || (b > first && weight->index[b] <= weight->index[b - 1]))
                return FC_BAD_ARGUMENT;
    }
    return FC_OK;
}

/* ---- packing and expanding ---- */

int64_t fc_blocks_count(const uint8_t *mask, int64_t count) {
    int64_t blocks = 0;
    for (int64_t i = 0; i < count; i++) blocks += mask[i] != 0;
    return blocks;
}

void fc_blocks_pack(const float *weight, const uint8_t *mask, int64_t n, int64_t k, int32_t block_rows, int32_t block_cols,
                    float *values, int32_t *row_offsets, int32_t *index) {
    const int64_t columns = k / block_cols;
    int32_t blocks = 0;
    row_offsets[0] = 0;
    for (int64_t g = 0; g < n / block_rows; g++) {
        for (int64_t j = 0; j < columns; j++) {
            if (!mask[g * columns + j]) continue;
            index[blocks++] = (int32_t)j;
            for (int64_t r = 0; r < block_rows; r++, values += block_cols)
                memcpy(values, weight + (g * block_rows + r) * k + j * block_cols, (size_t)block_cols * sizeof *values);
        }
        row_offsets[g + 1] = blocks;
    }
}

static void expand_block(const fc_weight *w, int64_t row, int64_t b, float *out) {
    const int64_t r = w->block_rows, c = w->block_cols, first = (b * r + row % r) * c;
    for (int64_t j = 0; j < c; j++)
        out[j] = w->kind == FC_BLOCKS_S8 ? (float)((const int8_t *)w->values)[first + j] * w->scale[row]
                                         : ((const float *)w->values)[first + j];
}

void fc_blocks_unpack(const void *args, int rank, int size) {
    const fc_unpack *unpack = args;
    const fc_weight *w = &unpack->weight;
    int64_t begin, end;
    fc_partition(w->n, w->block_rows, rank, size, &begin, &end);
    for (int64_t row = begin; row < end; row++) {
        float *out = unpack->out + row * w->k;
        memset(out, 0, (size_t)w->k * sizeof *out);
        for (int64_t b = w->row_offsets[row / w->block_rows]; b < w->row_offsets[row / w->block_rows + 1]; b++)
            expand_block(w, row, b, out + (int64_t)w->index[b] * w->block_cols);
    }
}

/* ---- products ---- */

/* Panel rows of one column block: codes keep four consecutive K in one dword. */
static int64_t panel_rows(const fc_weight *w) { return w->kind == FC_BLOCKS_S8 ? 1 : w->block_cols; }

/* 4x4 blocks use what they load four times, so their panel may as well come from L2: no sums go out and in again. */
static int64_t rows_at_once(const fc_weight *w) {
    return w->kind == FC_BLOCKS_S8 && w->block_rows == 4 ? FC_L2_PANEL_ROWS : FC_PANEL_ROWS;
}

fc_blocks_split fc_blocks_split_k(const fc_weight *weight) {
    const int64_t columns = weight->k / weight->block_cols, most = rows_at_once(weight) / panel_rows(weight);
    if (columns <= most) return (fc_blocks_split){most, 1};
    const int64_t blocks = (columns + most - 1) / most, even = (columns + blocks - 1) / blocks;
    return (fc_blocks_split){even, (columns + even - 1) / even};
}

static void sum_rows(const fc_weight *w, int64_t group, int32_t *sums) {
    const int64_t r = w->block_rows, c = w->block_cols;
    for (int64_t i = 0; i < r; i++) {
        int32_t sum = 0, negative = 0;
        for (int64_t b = w->row_offsets[group]; b < w->row_offsets[group + 1]; b++)
            for (int64_t j = 0; j < c; j++) {
                const int8_t value = ((const int8_t *)w->values)[(b * r + i) * c + j];
                sum += value;
                negative -= value < 0 ? value : 0;
            }
        sums[group * r + i] = sum;
        sums[w->n + group * r + i] = negative;
    }
}

void fc_blocks_prepare(const fc_weight *weight, int32_t *cuts, int32_t *sums) {
    const int64_t groups = weight->n / weight->block_rows;
    const fc_blocks_split split = fc_blocks_split_k(weight);
    for (int64_t g = 0; g < groups; g++) {
        int32_t b = weight->row_offsets[g];
        for (int64_t q = 0; q <= split.count; q++) {
            while (b < weight->row_offsets[g + 1] && weight->index[b] < q * split.columns) b++;
            cuts[q * groups + g] = b;
        }
        if (sums) sum_rows(weight, g, sums);
    }
}

/* Cut the row groups where an equal share of the work lies on both sides; a row's epilogue counts like some stored values. */
static int64_t balanced_cut(const fc_weight *w, int64_t groups, int rank, int size) {
    enum { EPILOGUE = 8 };
    const int64_t per_block = panel_rows(w);
    const double wanted = (double)(w->row_offsets[groups] * per_block + groups * EPILOGUE) * rank / size;
    int64_t low = 0, high = groups;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if ((double)(w->row_offsets[middle] * per_block + middle * EPILOGUE) < wanted)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* What one rank computes: these row groups of these columns. */
typedef struct share {
    int64_t first_group, last_group, first_column, last_column;
} share;

/* Tiles of M divide evenly and read the weights of every row; few of them leave ranks idle, then the rows are divided. */
static share divide(const fc_sparse_linear *a, int rank, int size) {
    const int64_t groups = a->weight.n / a->weight.block_rows, tiles = (a->m + FC_LANES - 1) / FC_LANES;
    share s = {0, groups, 0, a->m};
    if (tiles % size == 0 || tiles >= 8 * size) {
        fc_partition(a->m, FC_LANES, rank, size, &s.first_column, &s.last_column);
    } else {
        s.first_group = balanced_cut(&a->weight, groups, rank, size);
        s.last_group = balanced_cut(&a->weight, groups, rank + 1, size);
    }
    return s;
}

_Static_assert(FC_L2_PANEL_ROWS * 4 <= FC_PANEL_ROWS * FC_LANES, "the panel of a narrow tile holds a K block of any weight");
_Static_assert((int)FC_LANES == (int)FC_INT8_TILE, "a tile of the product is a tile of the panel");

typedef float dword;

/* Copy `columns` dwords of each row and fill up to `width` with zeros. */
static void copy_panel(dword *restrict panel, const dword *restrict x, int64_t stride, int64_t rows, int64_t columns,
                       int64_t width) {
    if (width <= 4) { /* a call of memcpy for each row would take longer than the product; codes may lie at any address */
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < width; j++) {
                panel[i * width + j] = 0.0f;
                if (j < columns) memcpy(panel + i * width + j, (const char *)x + (i * stride + j) * 4, sizeof *panel);
            }
        return;
    }
    for (int64_t i = 0; i < rows; i++, panel += width, x += stride) {
        memcpy(panel, x, (size_t)columns * sizeof *panel);
        for (int64_t j = columns; j < width; j++) panel[j] = 0.0f;
    }
}

/* Columns of a tile with `count` of them to compute; one alone has a kernel of its own for codes. */
static int64_t tile_width(const fc_weight *w, int64_t count) {
    if (count == 1 && w->kind == FC_BLOCKS_S8) return 1;
    return count <= 4 ? 4 : (count + 15) / 16 * 16;
}

/* Dwords between the rows of the tile of codes that begins with column m. */
static int64_t codes_stride(const fc_sparse_linear *a, int64_t m) {
    const int64_t padded = (a->m + FC_INT8_LANES - 1) / FC_INT8_LANES * FC_INT8_LANES;
    return smaller(padded - m, FC_LANES);
}

/* Point the tile at the panel rows of column blocks begin ... end: codes of a wide tile lie ready, all else is copied. */
static void load_panel(const fc_sparse_linear *a, fc_blocks_tile *tile, dword *panel, int64_t begin, int64_t end, int64_t m,
                       int64_t count) {
    const int64_t per_block = panel_rows(&a->weight), rows = (end - begin) * per_block;
    if (a->weight.kind != FC_BLOCKS_S8) {
        copy_panel(panel, (const dword *)a->x + begin * per_block * a->m + m, a->m, rows, count, tile->width);
        return;
    }
    const int64_t stride = codes_stride(a, m);
    const dword *codes = (const dword *)a->x + m * (a->weight.k / 4) + begin * stride;
    if (tile->width < 16)
        copy_panel(panel, codes, stride, rows, tile->width, tile->width);
    else
        tile->panel = codes;
}

/* Sum up tile->groups row groups from g on, over all K blocks, for the columns m ... (count of them, padded to tile->width). */
static void multiply(const fc_sparse_linear *a, fc_blocks_tile *tile, dword *panel, int64_t g, int64_t m, int64_t count) {
    const int coded = a->weight.kind == FC_BLOCKS_S8;
    const fc_blocks_split split = fc_blocks_split_k(&a->weight);
    const int64_t groups = a->weight.n / a->weight.block_rows, columns = a->weight.k / a->weight.block_cols;
    /* A narrow tile takes several K blocks at once: as many as fill the panel, which holds at least one. */
    const int64_t block_dwords = split.columns * panel_rows(&a->weight) * tile->width;
    const int copied = !coded || tile->width < 16;
    const int64_t step = copied ? FC_PANEL_ROWS * FC_LANES / block_dwords : FC_LANES / tile->width;
    for (int64_t q = 0; q < split.count; q += step) {
        const int64_t next = smaller(q + step, split.count);
        const int64_t begin = q * split.columns, end = smaller(next * split.columns, columns);
        load_panel(a, tile, panel, begin, end, m, count);
        tile->base = (int32_t)begin;
        tile->begin = a->cuts + q * groups + g;
        tile->end = a->cuts + next * groups + g;
        tile->first = q == 0;
        if (coded)
            fc_kernels.multiply_blocks_u8_s8(tile);
        else
            fc_kernels.multiply_blocks_f32(tile);
    }
}

static void finish(const fc_sparse_linear *a, const fc_blocks_tile *tile, int64_t row, int64_t m, int64_t count) {
    const int in_place = a->codes.codes && a->codes.scale != 0.0f;
    const int64_t stride = in_place ? tile->width : a->codes.codes ? FC_LANES : a->to_rows ? a->weight.n : a->m;
    const int64_t at = a->codes.codes ? row * stride : a->to_rows ? m * stride + row : row * stride + m;
    const int64_t rows = tile->groups * tile->block_rows;
    const fc_lanes_epilogue epilogue = {
        .sum = tile->sum,
        .width = tile->width,
        .count = count,
        .rows = rows,
        .stride = stride,
        .transposed = a->to_rows,
        .scales = a->scales ? a->scales + m : NULL,
        .weight_scale = a->weight_scale ? a->weight_scale + row : NULL,
        .bias = a->bias ? a->bias + row : NULL,
        .residual = a->residual ? a->residual + at : NULL,
        .out = in_place ? tile->sum : a->out + at,
        .activation = a->activation,
    };
    if (a->weight.kind == FC_BLOCKS_S8)
        fc_kernels.finish_lanes_s32(&epilogue);
    else
        fc_kernels.finish_lanes_f32(&epilogue);
    if (in_place) fc_quantize_depths(&a->codes, tile->sum, stride, m, m + count, row, row + rows);
}

/* Row groups whose sums are on the stack at once: few leave them in L1 for the epilogue; as many as fit where a panel is made or
 * changed for them. */
static int64_t groups_at_once(const fc_weight *w, int64_t width) {
    const int stays = w->kind == FC_BLOCKS_S8 && width >= 16 && fc_blocks_split_k(w).count <= FC_LANES / width;
    return (stays ? NEAR_ROWS : FC_TILE_ROWS * FC_LANES / width) / w->block_rows;
}

/* Row groups whose weights stay in L2 while the tiles of M pass by, but never so few that their panels cost more. */
static int64_t resident_groups(const fc_sparse_linear *a) {
    const fc_weight *w = &a->weight;
    const int64_t groups = w->n / w->block_rows, per_value = w->kind == FC_BLOCKS_S8 ? 1 : 4;
    const int64_t bytes = w->row_offsets[groups] * (w->block_rows * w->block_cols * per_value + (int64_t)sizeof *w->index);
    if (a->m <= FC_LANES || bytes <= WEIGHT_BYTES) return groups;
    const int64_t least = groups_at_once(w, FC_LANES);
    return groups * WEIGHT_BYTES / bytes / least * least + least;
}

/* Row groups first ... last of the columns m ... (count of them). */
static void run_tile(const fc_sparse_linear *a, int64_t first, int64_t last, int64_t m, int64_t count) {
    const fc_weight *w = &a->weight;
    const int64_t width = tile_width(w, count), most = groups_at_once(w, width);
    _Alignas(64) dword panel[FC_PANEL_ROWS * FC_LANES];
    _Alignas(64) dword sum[FC_TILE_ROWS * FC_LANES];
    _Alignas(64) int32_t zeros[FC_LANES];
    for (int64_t i = 0; i < FC_LANES; i++) zeros[i] = a->zeros && i < count ? a->zeros[m + i] : 128;
    for (int64_t g = first; g < last; g += most) {
        fc_blocks_tile tile = {
            .panel = panel,
            .width = width,
            .stride = w->kind == FC_BLOCKS_S8 && width >= 16 ? codes_stride(a, m) : width,
            .values = w->values,
            .index = w->index,
            .sums = a->sums ? a->sums + g * w->block_rows : NULL,
            .negatives = a->sums ? a->sums + w->n + g * w->block_rows : NULL,
            .zeros = zeros,
            .sum = sum,
            .groups = smaller(last - g, most),
            .block_rows = w->block_rows,
            .block_cols = w->block_cols,
        };
        multiply(a, &tile, panel, g, m, count);
        finish(a, &tile, g * w->block_rows, m, count);
    }
}

/* Each tile is made in float32 where it stays in L2, then quantised; with a static scale that needs no whole tile, but whole
 * dwords of codes. */
static void run_to_codes(const fc_sparse_linear *a, int rank, int size) {
    const fc_weight *w = &a->weight;
    const int team = (int)smaller(a->tiles, size);
    fc_sparse_linear part = *a;
    int64_t begin, end;
    if (rank >= team) return;
    fc_partition(a->m, FC_LANES, rank, team, &begin, &end);
    part.out = a->out + rank * w->n * FC_LANES;
    for (int64_t m = begin; m < end; m += FC_LANES) {
        const int64_t count = smaller(FC_LANES, end - m);
        run_tile(&part, 0, w->n / w->block_rows, m, count);
        if (a->codes.scale == 0.0f) fc_quantize_tile(&a->codes, part.out, FC_LANES, m, m + count);
    }
}

void fc_sparse_linear_run(const void *args, int rank, int size) {
    const fc_sparse_linear *a = args;
    if (a->codes.codes) {
        run_to_codes(a, rank, size);
        return;
    }
    const share s = divide(a, rank, size);
    const int64_t resident = resident_groups(a);
    for (int64_t g = s.first_group; g < s.last_group; g += resident)
        for (int64_t m = s.first_column; m < s.last_column; m += FC_LANES)
            run_tile(a, g, smaller(g + resident, s.last_group), m, smaller(FC_LANES, s.last_column - m));
}
