#include "../fastcore.h"

void fc_quant_install_scalar(fc_table *table) { (void)table; }
