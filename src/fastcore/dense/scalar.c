#include "../fastcore.h"

void fc_dense_install_scalar(fc_table *table) { (void)table; }
