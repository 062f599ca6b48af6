// Vectors of float as the compiler itself has them (GCC, Clang), and the numbers
// that are loaded into them: float or bf16.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX512F__)
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

inline Vec only(Vec x, long n, float after = 0) {
    Vec found = Vec{} + after;
    if (n == W) return x;
    memcpy(&found, &x, 4 * n);
    return found;
}

inline Bits numbers(const bf16* from, long n) {  // as they are stored
    Half x = {};
    if (n == W) return __builtin_convertvector(*reinterpret_cast<const Half*>(from), Bits);
    memcpy(&x, from, 2 * n);
    return __builtin_convertvector(x, Bits);
}

inline Vec load(const bf16* from, long n) { return (Vec)(numbers(from, n) << 16); }

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

template <class T>
inline T narrowed(float x) {
    T found;
    store(&found, Vec{} + x, 1);
    return found;
}

inline float total(Vec x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#endif
    for (long half = W / 2; half > 0; half /= 2)
        for (long i = 0; i < half; i++) x[i] += x[i + half];
    return x[0];
}

template <class F>
inline __attribute__((always_inline)) void by_vectors(long i, long count, F&& part) {
    for (; i + W <= count; i += W) part(i, W);
    if (i < count) part(i, count - i);
}

// of each pair the lesser, or the larger; of a number and none: the second
inline Vec lesser(Vec x, Vec y) {
#if defined(__AVX512F__)
    return (Vec)_mm512_min_ps((__m512)x, (__m512)y);
#else
    return x < y ? x : y;
#endif
}

inline Vec larger(Vec x, Vec y) {
#if defined(__AVX512F__)
    return (Vec)_mm512_max_ps((__m512)x, (__m512)y);
#else
    return x > y ? x : y;
#endif
}

// from -most to most; what is no number stays none
inline Vec within(Vec x, float most) { return larger(Vec{} - most, lesser(Vec{} + most, x)); }

// e^x for x from -87 to 87, for what is stored as T: in float within two units in the last place (polynomial of Cephes'
// expf), in bf16 within a fiftieth of one (the best cubic polynomial)
template <class T>
inline Vec exponential(Vec x) {
    constexpr float INTEGER = 12582912;  // 1.5 * 2^23: what is added to it is rounded to an integer, in the last bits
    Vec shifted = x * 1.44269504f + INTEGER, whole = shifted - INTEGER, power;
    if constexpr (std::is_same_v<T, float>) {
        Vec r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
        Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
        p = p * r + 8.3334519073e-3f;
        p = p * r + 4.1665795894e-2f;
        p = p * r + 1.6666665459e-1f;
        p = p * r + 5.0000001201e-1f;
        power = p * (r * r) + (r + 1.0f);
    } else {
        Vec r = x - whole * 0.693147181f;
        power = ((r * 0.16566823f + 0.50496427f) * r + 1.00016425f) * r + 0.99992804f;
    }
    return (Vec)((Ints)power + ((Ints)shifted << 23));
}

// 1 / x, for what is stored as T: in bf16 within a sixtieth of a unit in the last place
template <class T>
inline Vec inverse(Vec x) {
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<T, bf16>) return (Vec)_mm512_rcp14_ps((__m512)x);
#endif
    return 1.0f / x;
}

constexpr float LINEAR = 1.5957691216f, CUBIC = 0.0713548162726f;  // 2 sqrt(2 / pi), and that times 0.044715
constexpr float FAR = 9.5;  // beyond it GELU is the number itself, or next to zero
// with z = x (LINEAR + CUBIC x^2): the sigmoid of z
template <class T>
inline Vec sigmoid(Vec z) {
    return inverse<T>(1.0f + exponential<T>(-z));
}

// GELU, by its tanh formula, of what is stored as T
template <class T>
inline Vec gelu(Vec x) {
    Vec a = within(x, FAR);
    return larger(Vec{} - FAR, x) * sigmoid<T>(a * (LINEAR + CUBIC * a * a));
}

template <class T>
inline Vec slope_of_gelu(Vec x) {
    Vec a = within(x, FAR), z = a * (LINEAR + CUBIC * a * a), s = sigmoid<T>(z);
    Vec rise = 3.0f * z - (2 * LINEAR) * a;  // a times the slope of z
    return s * (1.0f + rise * (1.0f - s));
}

}  // namespace
