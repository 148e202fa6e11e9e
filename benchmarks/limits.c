/* The physical limits of one core, measured: fused multiply-add, int8 dot product, and DRAM streams. Built and loaded by
 * limits.py. */
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

/* 24 independent accumulators (opaque, so that the compiler cannot merge them): enough to hide the latency of any core so far.
 * Each loop does `rounds` * 24 instructions. */
#define REPEAT24(X)                                                                                                              \
    X(0)                                                                                                                         \
    X(1)                                                                                                                         \
    X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15) X(16) X(17) X(18) X(19) X(20) X(21) X(22) X(23)

__attribute__((target("avx512f"))) float fma_avx512(int64_t rounds) {
    __m512 a = _mm512_set1_ps(1.0f), b = _mm512_set1_ps(1e-9f);
#define DECLARE(i)                                                                                                               \
    __m512 s##i = _mm512_setzero_ps();                                                                                           \
    __asm__("" : "+v"(s##i));
    REPEAT24(DECLARE)
#undef DECLARE
    for (int64_t r = 0; r < rounds; r++) {
        __asm__ volatile("" : "+v"(a), "+v"(b));
#define STEP(i) s##i = _mm512_fmadd_ps(a, b, s##i);
        REPEAT24(STEP)
#undef STEP
    }
    __m512 sum = _mm512_setzero_ps();
#define ADD(i) sum = _mm512_add_ps(sum, s##i);
    REPEAT24(ADD)
#undef ADD
    return _mm512_reduce_add_ps(sum);
}

__attribute__((target("avx2,fma"))) float fma_avx2(int64_t rounds) {
    __m256 a = _mm256_set1_ps(1.0f), b = _mm256_set1_ps(1e-9f), s[12];
#pragma GCC unroll 12
    for (int i = 0; i < 12; i++) {
        s[i] = _mm256_setzero_ps();
        __asm__("" : "+x"(s[i]));
    }
    for (int64_t r = 0; r < rounds; r++) {
        __asm__ volatile("" : "+x"(a), "+x"(b));
#pragma GCC unroll 12
        for (int i = 0; i < 12; i++) s[i] = _mm256_fmadd_ps(a, b, s[i]);
    }
    float lanes[8], sum = 0;
    for (int i = 0; i < 12; i++) {
        _mm256_storeu_ps(lanes, s[i]);
        sum += lanes[0];
    }
    return sum;
}

__attribute__((target("avx512f,avx512vnni"))) int32_t vnni_avx512(int64_t rounds) {
    __m512i a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(2);
#define DECLARE(i)                                                                                                               \
    __m512i s##i = _mm512_setzero_si512();                                                                                       \
    __asm__("" : "+v"(s##i));
    REPEAT24(DECLARE)
#undef DECLARE
    for (int64_t r = 0; r < rounds; r++) {
        __asm__ volatile("" : "+v"(a), "+v"(b));
#define STEP(i) s##i = _mm512_dpbusd_epi32(s##i, a, b);
        REPEAT24(STEP)
#undef STEP
    }
    __m512i sum = _mm512_setzero_si512();
#define ADD(i) sum = _mm512_add_epi32(sum, s##i);
    REPEAT24(ADD)
#undef ADD
    return _mm512_reduce_add_epi32(sum);
}

/* Read `n` streams of `length` floats once and write one stream with non-temporal stores: the floor of an n-way mean. */
__attribute__((target("avx512f"))) void stream_avx512(const float *const *in, int n, int64_t length, float *out) {
    for (int64_t i = 0; i + 16 <= length; i += 16) {
        __m512i x = _mm512_loadu_si512(in[0] + i);
        for (int j = 1; j < n; j++) x = _mm512_xor_si512(x, _mm512_loadu_si512(in[j] + i));
        _mm512_stream_si512((__m512i *)(out + i), x);
    }
    _mm_sfence();
}

__attribute__((target("avx2"))) void stream_avx2(const float *const *in, int n, int64_t length, float *out) {
    for (int64_t i = 0; i + 8 <= length; i += 8) {
        __m256i x = _mm256_loadu_si256((const __m256i *)(in[0] + i));
        for (int j = 1; j < n; j++) x = _mm256_xor_si256(x, _mm256_loadu_si256((const __m256i *)(in[j] + i)));
        _mm256_stream_si256((__m256i *)(out + i), x);
    }
    _mm_sfence();
}

/* Read one stream. */
__attribute__((target("avx2"))) int64_t read_avx2(const int64_t *in, int64_t bytes) {
    __m256i s0 = _mm256_setzero_si256(), s1 = s0, s2 = s0, s3 = s0;
    const char *p = (const char *)in;
    for (int64_t i = 0; i + 128 <= bytes; i += 128) {
        s0 = _mm256_xor_si256(s0, _mm256_loadu_si256((const __m256i *)(p + i)));
        s1 = _mm256_xor_si256(s1, _mm256_loadu_si256((const __m256i *)(p + i + 32)));
        s2 = _mm256_xor_si256(s2, _mm256_loadu_si256((const __m256i *)(p + i + 64)));
        s3 = _mm256_xor_si256(s3, _mm256_loadu_si256((const __m256i *)(p + i + 96)));
    }
    int64_t lanes[4];
    _mm256_storeu_si256((__m256i *)lanes, _mm256_xor_si256(_mm256_xor_si256(s0, s1), _mm256_xor_si256(s2, s3)));
    return lanes[0] ^ lanes[1] ^ lanes[2] ^ lanes[3];
}
