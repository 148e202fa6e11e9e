#ifndef FC_AGGREGATE_H
#define FC_AGGREGATE_H

#include "../status.h"

#define FC_AGGREGATE_SLOTS(SLOT)

struct fc_table;
void fc_aggregate_install_scalar(struct fc_table *table);
void fc_aggregate_install_avx2(struct fc_table *table);
void fc_aggregate_install_avx512(struct fc_table *table);

#endif
