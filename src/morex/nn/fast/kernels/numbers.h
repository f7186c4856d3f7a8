// Number formats, and vectors of them.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__AVX__)
#include <immintrin.h>
#endif

// Bytes of a vector; rows of a tile of products, times four outputs, and sums that attention keeps in registers.
#if defined(__AVX512F__)
constexpr int BYTES = 64, TOKENS = 6, TOTALS = 20;
#elif defined(__AVX__)
constexpr int BYTES = 32, TOKENS = 3, TOTALS = 8;
#else
constexpr int BYTES = 16, TOKENS = 3, TOTALS = 8;
#endif
constexpr int LANES = BYTES / 4;

typedef float Floats __attribute__((vector_size(BYTES)));
typedef uint32_t Words __attribute__((vector_size(BYTES)));
typedef uint16_t Halves __attribute__((vector_size(BYTES / 2)));
typedef float Quad __attribute__((vector_size(16)));

struct Bfloat {
    uint16_t bits;
};

// What products are computed from: bf16 where the processor multiplies it, else fp32.
#if defined(__AVX512BF16__)
template <class T> using Factor = T;
#else
template <class T> using Factor = std::conditional_t<std::is_same_v<T, Bfloat>, float, T>;
#endif

static inline float widen(float x) { return x; }
static inline double widen(double x) { return x; }
static inline float widen(Bfloat x) {
    uint32_t word = uint32_t(x.bits) << 16;
    float wide;
    std::memcpy(&wide, &word, 4);
    return wide;
}

static inline void narrow(float x, float* out) { *out = x; }
static inline void narrow(double x, double* out) { *out = x; }
static inline void narrow(float x, Bfloat* out) {
    uint32_t word;
    std::memcpy(&word, &x, 4);
    // To the nearest, ties to even; what is not a number stays none.
    uint32_t rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
    out->bits = (word & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
}

static inline Floats load(const float* x) {
    Floats v;
    std::memcpy(&v, x, BYTES);
    return v;
}

static inline Floats load(const Bfloat* x) {
    Halves halves;
    std::memcpy(&halves, x, BYTES / 2);
    return (Floats)(__builtin_convertvector(halves, Words) << 16);
}

static inline void store(Floats v, float* x) { std::memcpy(x, &v, BYTES); }

// Compilers decide from place to place whether to fuse; here all agree.
static inline Floats fused(Floats a, Floats b, Floats total) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)total);
#elif defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)total);
#else
    for (int i = 0; i < LANES; i++) total[i] = std::fma(a[i], b[i], total[i]);
    return total;
#endif
}

static inline Quad folded(Floats v) {
#if defined(__AVX512F__)
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
    return (Quad)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#else
    Quad parts[BYTES / 16];
    std::memcpy(parts, &v, BYTES);
    for (int i = 1; i < BYTES / 16; i++) parts[0] += parts[i];
    return parts[0];
#endif
}

// The sums of four vectors.
static inline Quad sums(Floats v, Floats w, Floats x, Floats y) {
#if defined(__AVX512F__)
    auto half = [](Floats a, Floats b) { return _mm512_unpacklo_ps((__m512)a, (__m512)b) + _mm512_unpackhi_ps((__m512)a, (__m512)b); };
    __m512d vw = (__m512d)half(v, w), xy = (__m512d)half(x, y);
    return folded((Floats)_mm512_unpacklo_pd(vw, xy) + (Floats)_mm512_unpackhi_pd(vw, xy));
#else
    Quad a = folded(v), b = folded(w), c = folded(x), d = folded(y);
    Quad ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
    Quad cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
    return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
#endif
}

// e^x for x <= 0, to 2 units in the last place.
static inline float exponential(float x) {
    x = std::max(x, -87.0f);
    float n = std::floor(x * 1.44269504f + 0.5f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t power = (int32_t(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &power, 4);
    return p * scale;
}
static inline double exponential(double x) { return std::exp(x); }
