#include "../fastcore.h"

void fc_sparse_install_avx512vnni(fc_table *table) { (void)table; }
