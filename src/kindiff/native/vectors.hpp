// Vectors of float as the compiler itself has them (GCC, Clang), and the numbers
// that are loaded into them: float or bf16.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr long W = 16, ROWS = 4;
#else
constexpr long W = 8, ROWS = 2;
#endif

using Vec = float __attribute__((vector_size(4 * W), aligned(4), may_alias));
using Ints = int32_t __attribute__((vector_size(4 * W)));
using Bits = uint32_t __attribute__((vector_size(4 * W)));
using Half = uint16_t __attribute__((vector_size(2 * W), aligned(2), may_alias));
struct bf16 {
    uint16_t bits;
};

inline Vec widen(Half x) { return (Vec)(__builtin_convertvector(x, Bits) << 16); }

inline Half narrow(Vec x) {  // to the nearest, ties to even; what is no number stays none
#if defined(__AVX512BF16__)
    return (Half)_mm512_cvtneps_pbh((__m512)x);
#else
    Bits bits = (Bits)x;
    Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector(x == x ? rounded : Bits{} + 0x7fc0, Half);
#endif
}

// the first n <= W of some numbers, zeros after them
inline Vec load(const float* from, long n) {
    Vec x = {};
    if (n == W) return *reinterpret_cast<const Vec*>(from);
    memcpy(&x, from, 4 * n);
    return x;
}

inline Vec only(Vec x, long n) { return load(reinterpret_cast<float*>(&x), n); }

inline Vec load(const bf16* from, long n) {
    Half x = {};
    if (n == W) return widen(*reinterpret_cast<const Half*>(from));
    memcpy(&x, from, 2 * n);
    return widen(x);
}

inline void store(float* to, Vec x, long n) {
    if (n == W) *reinterpret_cast<Vec*>(to) = x;
    else memcpy(to, &x, 4 * n);
}

inline void store(bf16* to, Vec x, long n) {
    Half rounded = narrow(x);
    if (n == W) *reinterpret_cast<Half*>(to) = rounded;
    else memcpy(to, &rounded, 2 * n);
}

inline float number(const float* from) { return *from; }
inline float number(const bf16* from) { return load(from, 1)[0]; }

inline float total(Vec x) {
    for (long half = W / 2; half > 0; half /= 2)
        for (long i = 0; i < half; i++) x[i] += x[i + half];
    return x[0];
}

template <class F>
inline __attribute__((always_inline)) void by_vectors(long i, long count, F&& part) {
    for (; i + W <= count; i += W) part(i, W);
    if (i < count) part(i, count - i);
}

// e^x within two units in the last place, for x from -87 to 87 (polynomial of Cephes' expf)
inline Vec exponential(Vec x) {
    x = x > 87.0f ? Vec{} + 87.0f : x;
    x = x < -87.0f ? Vec{} - 87.0f : x;
    Vec scaled = x * 1.44269504f;
    Ints n = __builtin_convertvector(scaled + (scaled < 0.0f ? Vec{} - 0.5f : Vec{} + 0.5f), Ints);
    Vec whole = __builtin_convertvector(n, Vec);
    Vec r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (p * r * r + r + 1.0f) * (Vec)((n + 127) << 23);
}

}  // namespace
