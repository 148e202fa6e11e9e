/* The physical limits of one core, measured: fused multiply-add, bf16 and int8 dot products, DRAM streams, and the elementwise
 * functions of an encoder on data in L1. Built and loaded by limits.py. */
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

__attribute__((target("avx512f,avx512bf16"))) float bf16_avx512(int64_t rounds) {
    __m512i a = _mm512_set1_epi32(0x3f803f80), b = _mm512_set1_epi32(0x30003000);
#define DECLARE(i)                                                                                                               \
    __m512 s##i = _mm512_setzero_ps();                                                                                           \
    __asm__("" : "+v"(s##i));
    REPEAT24(DECLARE)
#undef DECLARE
    for (int64_t r = 0; r < rounds; r++) {
        __asm__ volatile("" : "+v"(a), "+v"(b));
#define STEP(i) s##i = _mm512_dpbf16_ps(s##i, (__m512bh)a, (__m512bh)b);
        REPEAT24(STEP)
#undef STEP
    }
    __m512 sum = _mm512_setzero_ps();
#define ADD(i) sum = _mm512_add_ps(sum, s##i);
    REPEAT24(ADD)
#undef ADD
    return _mm512_reduce_add_ps(sum);
}

#define ROW 384
/* The rounds of a function over one row in L1. What counts is the number of operations of a good implementation, not the value.
 */

__attribute__((target("avx512f"), always_inline)) static inline __m512 polynomial(__m512 x, int degree) {
    __m512 y = _mm512_set1_ps(0.01f);
#pragma GCC unroll 16
    for (int i = 0; i < degree; i++) y = _mm512_fmadd_ps(y, x, _mm512_set1_ps(0.1f * (float)(i + 1)));
    return y;
}

/* exp by 2^n * p(r): degree 5, and the sum that a softmax needs. */
__attribute__((target("avx512f"))) float exp_avx512(int64_t rounds, float *row) {
    __m512 s[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t r = 0; r < rounds; r++) {
#pragma GCC unroll 4
        for (int i = 0; i < ROW; i += 16) {
            __m512 x = _mm512_mul_ps(_mm512_loadu_ps(row + i), _mm512_set1_ps(1.442695f));
            __m512 n = _mm512_roundscale_ps(x, 8);
            __m512 y = _mm512_scalef_ps(polynomial(_mm512_sub_ps(x, n), 5), n);
            s[i / 16 % 4] = _mm512_add_ps(s[i / 16 % 4], y);
            _mm512_storeu_ps(row + ROW + i, y);
        }
        __asm__ volatile("" ::: "memory");
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(s[0], s[1]), _mm512_add_ps(s[2], s[3])));
}

/* x * (1 + erf(x / sqrt 2)) / 2 by an odd polynomial of degree 17 of x clamped. */
__attribute__((target("avx512f"))) void gelu_avx512(int64_t rounds, float *row) {
    for (int64_t r = 0; r < rounds; r++) {
#pragma GCC unroll 4
        for (int i = 0; i < ROW; i += 16) {
            __m512 x = _mm512_loadu_ps(row + i);
            __m512 t = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-4.0f)), _mm512_set1_ps(4.0f));
            __m512 p = polynomial(_mm512_mul_ps(t, t), 8);
            _mm512_storeu_ps(row + ROW + i, _mm512_mul_ps(x, _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.5f))));
        }
        __asm__ volatile("" ::: "memory");
    }
}

/* LayerNorm of a row and a residual: sums of values and squares, then scale and shift. */
__attribute__((target("avx512f"))) void norm_avx512(int64_t rounds, float *row) {
    for (int64_t r = 0; r < rounds; r++) {
        __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, squares[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
#pragma GCC unroll 4
        for (int i = 0; i < ROW; i += 16) {
            __m512 x = _mm512_add_ps(_mm512_loadu_ps(row + i), _mm512_loadu_ps(row + ROW + i));
            sum[i / 16 % 2] = _mm512_add_ps(sum[i / 16 % 2], x);
            squares[i / 16 % 2] = _mm512_fmadd_ps(x, x, squares[i / 16 % 2]);
            _mm512_storeu_ps(row + 2 * ROW + i, x);
        }
        __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1])) / ROW);
        __m512 scale = _mm512_rsqrt14_ps(_mm512_set1_ps(_mm512_reduce_add_ps(_mm512_add_ps(squares[0], squares[1])) + 1.0f));
#pragma GCC unroll 4
        for (int i = 0; i < ROW; i += 16) {
            __m512 x = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(row + 2 * ROW + i), mean), scale);
            _mm512_storeu_ps(row + 2 * ROW + i, _mm512_fmadd_ps(x, _mm512_loadu_ps(row), _mm512_loadu_ps(row + ROW)));
        }
        __asm__ volatile("" ::: "memory");
    }
}

/* The largest magnitude of a row, and the row as bytes. */
__attribute__((target("avx512f"))) void quantize_avx512(int64_t rounds, float *row) {
    for (int64_t r = 0; r < rounds; r++) {
        __m512 most[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
#pragma GCC unroll 4
        for (int i = 0; i < ROW; i += 16)
            most[i / 16 % 2] = _mm512_max_ps(most[i / 16 % 2], _mm512_abs_ps(_mm512_loadu_ps(row + i)));
        __m512 scale = _mm512_set1_ps(127.0f / (_mm512_reduce_max_ps(_mm512_max_ps(most[0], most[1])) + 1e-9f));
#pragma GCC unroll 4
        for (int i = 0; i < ROW; i += 16) {
            __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(row + i), scale));
            _mm_storeu_si128((__m128i *)((char *)(row + ROW) + i), _mm512_cvtsepi32_epi8(q));
        }
        __asm__ volatile("" ::: "memory");
    }
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

/* Read one stream of whole cache lines, fetched well ahead: the floor of a product with one row. */
__attribute__((target("avx512f"))) int64_t read_ahead_avx512(const char *in, int64_t bytes) {
    __m512i s[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int64_t i = 0; i + 256 <= bytes; i += 256)
        for (int j = 0; j < 4; j++) {
            _mm_prefetch(in + i + j * 64 + 8192, _MM_HINT_T0);
            s[j] = _mm512_xor_si512(s[j], _mm512_loadu_si512(in + i + j * 64));
        }
    return _mm512_reduce_add_epi64(_mm512_xor_si512(_mm512_xor_si512(s[0], s[1]), _mm512_xor_si512(s[2], s[3])));
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
