/* What this CPU and its operating system can run, as one word of flags. */
#ifndef FC_CPU_H
#define FC_CPU_H

#include "isa.h"

enum {
    FC_CPU_AVX2 = 1 << 0,   /* AVX2, FMA, F16C, BMI2, LZCNT and the OS saves ymm */
    FC_CPU_AVX512 = 1 << 1, /* F, BW, DQ, VL, CD and the OS saves zmm */
    FC_CPU_AVX512VNNI = 1 << 2,
    FC_CPU_AVX512BF16 = 1 << 3,
    FC_CPU_AVX512VBMI2 = 1 << 4,
};

FC_HIDDEN unsigned fc_cpu_flags(void);

#endif
