#ifndef FC_QUANT_H
#define FC_QUANT_H

#include "../status.h"

#define FC_QUANT_SLOTS(SLOT)
#define FC_QUANT_TUNING

struct fc_table;
void fc_quant_install_scalar(struct fc_table *table);
void fc_quant_install_avx2(struct fc_table *table);
void fc_quant_install_avx512(struct fc_table *table);
void fc_quant_install_avx512vnni(struct fc_table *table);

#endif
