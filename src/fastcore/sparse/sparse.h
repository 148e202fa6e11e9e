#ifndef FC_SPARSE_H
#define FC_SPARSE_H

#include "../status.h"
#include "../weight.h"

#define FC_SPARSE_SLOTS(SLOT)
#define FC_SPARSE_TUNING

/* Check row_offsets and index of a block weight before any kernel follows them. */
fc_status fc_blocks_validate(const fc_weight *weight, int64_t blocks);

struct fc_table;
void fc_sparse_install_scalar(struct fc_table *table);
void fc_sparse_install_avx2(struct fc_table *table);
void fc_sparse_install_avx512(struct fc_table *table);
void fc_sparse_install_avx512vnni(struct fc_table *table);

#endif
