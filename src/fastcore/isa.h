/* Target regions. The only place that knows compilers.
 *
 * A file <family>/<isa>.c opens with its includes, then FC_TARGET_<ISA>, the static kernels and FC_TARGET_END.
 * The rest of the library is built for the baseline, so nothing wide can leak into code that runs everywhere.
 */
#ifndef FC_ISA_H
#define FC_ISA_H

#if defined(__GNUC__) || defined(__clang__)
#define FC_INLINE static inline __attribute__((always_inline))
#define FC_HIDDEN __attribute__((visibility("hidden")))
#else
#define FC_INLINE static inline
#define FC_HIDDEN
#endif

#if defined(__x86_64__) && (defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 10))
#define FC_X86 1
#include <immintrin.h>
#define FC_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define FC_TARGET(features) FC_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define FC_TARGET_END FC_PRAGMA(clang attribute pop)
#else
#define FC_TARGET(features) FC_PRAGMA(GCC push_options) FC_PRAGMA(GCC target(features))
#define FC_TARGET_END FC_PRAGMA(GCC pop_options)
#endif
#define FC_TARGET_AVX2 FC_TARGET("avx2,fma,f16c,bmi2,popcnt,lzcnt")
#if defined(__clang__)
#define FC_WIDE
#else
#define FC_WIDE ",prefer-vector-width=512"
#endif
#define FC_AVX512_FEATURES "avx2,fma,f16c,bmi2,popcnt,lzcnt,avx512f,avx512bw,avx512dq,avx512vl,avx512cd"
#define FC_TARGET_AVX512 FC_TARGET(FC_AVX512_FEATURES FC_WIDE)
#define FC_TARGET_AVX512VNNI FC_TARGET(FC_AVX512_FEATURES ",avx512vnni" FC_WIDE)
#define FC_TARGET_AVX512VBMI2 FC_TARGET(FC_AVX512_FEATURES ",avx512vnni,avx512vbmi2" FC_WIDE)
#define FC_TARGET_AVX512BF16 FC_TARGET(FC_AVX512_FEATURES ",avx512bf16" FC_WIDE)
#endif

#endif
