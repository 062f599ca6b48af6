// Products of some rows with a sample's own few components: M of them, by FEW. Sums are float.
#pragma once
#include "products.hpp"

namespace {

constexpr long FEW = 4, STEP = 16;  // components, and rows, that are taken together

// by STEP rows at a time, what is left one by one
template <class F>
inline void by_rows(long from, long to, F&& part) {
    for (; from + STEP <= to; from += STEP) part(from, std::integral_constant<long, STEP>{});
    for (; from < to; from++) part(from, std::integral_constant<long, 1>{});
}

// h = x v^T of R rows and C components
template <class T, long R, long C>
inline void dots(const T* x, long I, const T* v, T* h, long stride) {
    Vec sums[R][C];
    clear(sums);
    long i = 0;
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<T, bf16>)
        for (; i + 2 * W <= I; i += 2 * W) {
            each<R, C>(C * W, R, [&](long r, long c, long) {
                __m512bh a, b;
                memcpy(&a, x + r * I + i, sizeof a);
                memcpy(&b, v + c * I + i, sizeof b);
                sums[r][c] = (Vec)_mm512_dpbf16_ps((__m512)sums[r][c], a, b);
            });
        }
#endif
    by_vectors(i, I, [&](long i, long n) {
        each<R, C>(C * W, R, [&](long r, long c, long) { sums[r][c] += load(x + r * I + i, n) * load(v + c * I + i, n); });
    });
    each<R, C>(C * W, R, [&](long r, long c, long) { store(h + r * stride + c, Vec{} + total(sums[r][c]), 1); });
}

template <class T, long R>
inline void dots_of_rows(const T* x, long I, const T* v, long M, T* h, long stride) {
    long m = 0;
    for (; m + FEW <= M; m += FEW) dots<T, R, FEW>(x, I, v + m * I, h + m, stride);
    for (; m < M; m++) dots<T, R, 1>(x, I, v + m * I, h + m, stride);
}

// g += h^T x of R rows and C components; with ONES, plain += the sum of the rows
template <class T, long R, long C, bool ONES>
inline void collect(const T* x, long I, const T* h, long stride, float* g, float* plain) {
    constexpr long P = PAIR<T>, S = up(R, P);
    const Unit<T> one = ones<T>(P);
    Unit<T> a[S][C + 1];
    for (long s = 0; s < S; s++)
        for (long c = 0; c < C; c++) a[s][c] = unit(h + s * P * stride + c, stride, R - s * P);
    by_vectors(0, I, [&](long i, long n) {
        Vec found[C + 1], sum = ONES ? load(plain + i, n) : Vec{};
        for (long c = 0; c < C; c++) found[c] = load(g + c * I + i, n);
        for (long s = 0; s < S; s++) {
            Vec rows = units(x + s * P * I + i, I, R - s * P, n);
            for (long c = 0; c < C; c++) found[c] = added<T>(found[c], a[s][c], rows);
            if (ONES) sum = added<T>(sum, one, rows);
        }
        for (long c = 0; c < C; c++) store(g + c * I + i, found[c], n);
        if (ONES) store(plain + i, sum, n);
    });
}

template <class T, long R>
inline void collect_of_rows(const T* x, long I, const T* h, long M, long stride, float* g, float* plain) {
    long m = 0;
    if (plain && M < FEW) collect<T, R, 0, true>(x, I, h, stride, g, plain);
    for (; m + FEW <= M; m += FEW)
        if (plain && m == 0) collect<T, R, FEW, true>(x, I, h, stride, g, plain);
        else collect<T, R, FEW, false>(x, I, h + m, stride, g + m * I, nullptr);
    for (; m < M; m++) collect<T, R, 1, false>(x, I, h + m, stride, g + m * I, nullptr);
}

}  // namespace
