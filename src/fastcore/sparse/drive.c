#include "../fastcore.h"

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
