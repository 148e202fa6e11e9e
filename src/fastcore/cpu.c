/* CPUID says what the core implements, XCR0 what the operating system saves on a context switch: both must hold, or the first
 * wide instruction raises SIGILL (Intel SDM vol. 1, 13.2-13.3; 14.3). */
#include "cpu.h"

#ifdef FC_X86
#include <cpuid.h>

enum { XCR0_YMM = 0x6, XCR0_ZMM = 0xe6 };

static unsigned long long read_xcr0(void) {
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return ((unsigned long long)high << 32) | low;
}

static int has(unsigned word, unsigned bits) { return (word & bits) == bits; }

unsigned fc_cpu_flags(void) {
    unsigned a, b, c, d, leaf1_c, leaf7_b, leaf7_c, leaf7_1_a, extended_c, flags = 0;
    if (!__get_cpuid(1, &a, &b, &leaf1_c, &d) || !has(leaf1_c, 1u << 27 | 1u << 28)) /* OSXSAVE, AVX */
        return 0;
    if (!__get_cpuid_count(7, 0, &a, &leaf7_b, &leaf7_c, &d)) return 0;
    if (!__get_cpuid(0x80000001, &a, &b, &extended_c, &d)) return 0;
    const unsigned long long xcr0 = read_xcr0();
    /* leaf 1 ecx: FMA 12, POPCNT 23, F16C 29; leaf 7 ebx: AVX2 5, BMI2 8; extended leaf 1 ecx: LZCNT 5, which a CPU that lacks it
     * runs as BSR, to a wrong answer */
    if ((xcr0 & XCR0_YMM) != XCR0_YMM || !has(leaf1_c, 1u << 12 | 1u << 23 | 1u << 29) || !has(leaf7_b, 1u << 5 | 1u << 8) ||
        !has(extended_c, 1u << 5))
        return 0;
    flags |= FC_CPU_AVX2;
    /* leaf 7 ebx: F 16, DQ 17, CD 28, BW 30, VL 31 */
    if ((xcr0 & XCR0_ZMM) != XCR0_ZMM || !has(leaf7_b, 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31)) return flags;
    flags |= FC_CPU_AVX512;
    if (has(leaf7_c, 1u << 6)) flags |= FC_CPU_AVX512VBMI2;
    if (has(leaf7_c, 1u << 11)) flags |= FC_CPU_AVX512VNNI;
    /* leaf 7 subleaf 1 eax: BF16 5; a CPU without that subleaf answers with zeros */
    if (__get_cpuid_count(7, 1, &leaf7_1_a, &b, &c, &d) && has(leaf7_1_a, 1u << 5)) flags |= FC_CPU_AVX512BF16;
    return flags;
}
#else
unsigned fc_cpu_flags(void) { return 0; }
#endif
