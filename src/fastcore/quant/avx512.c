/* AVX-512 without VNNI takes the AVX2 kernels: vpmaddwd at twice the width has no machine here to be tuned on. */
#include "../fastcore.h"

void fc_quant_install_avx512(fc_table *table) { (void)table; }
