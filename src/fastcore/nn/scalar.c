#include "../fastcore.h"

void fc_nn_install_scalar(fc_table *table) { (void)table; }
