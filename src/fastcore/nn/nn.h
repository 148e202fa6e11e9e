#ifndef FC_NN_H
#define FC_NN_H

#include "../status.h"

#define FC_NN_SLOTS(SLOT)

struct fc_table;
void fc_nn_install_scalar(struct fc_table *table);
void fc_nn_install_avx2(struct fc_table *table);
void fc_nn_install_avx512(struct fc_table *table);

#endif
