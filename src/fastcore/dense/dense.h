#ifndef FC_DENSE_H
#define FC_DENSE_H

#include "../status.h"

#define FC_DENSE_SLOTS(SLOT)
#define FC_DENSE_TUNING

struct fc_table;
void fc_dense_install_scalar(struct fc_table *table);
void fc_dense_install_avx2(struct fc_table *table);
void fc_dense_install_avx512(struct fc_table *table);

#endif
