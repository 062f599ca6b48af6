// What products are made of: some rows times some columns, summed in registers. The columns stand packed in strips, step
// by step, so that they are read one after the other.
#pragma once
#include <omp.h>

#include "vectors.hpp"

namespace {

constexpr long HIGH = W == 16 ? 8 : 4, WIDE = 3;  // rows and vectors that are summed together, as registers allow
constexpr long STRIP = WIDE * W;

// Of what is summed over, how much one step takes: two numbers of bf16 where the processor can, else one
#if defined(__AVX512BF16__)
template <class T>
constexpr long PAIR = std::is_same_v<T, bf16> ? 2 : 1;
#else
template <class T>
constexpr long PAIR = 1;
#endif
template <class T>
using Unit = std::conditional_t<PAIR<T> == 2, uint32_t, float>;

constexpr long up(long count, long size) { return (count + size - 1) / size; }

// a step's numbers, `apart` from each other, of which there are n more
template <class T>
inline Unit<T> unit(const T* from, long apart, long n) {
    if constexpr (PAIR<T> == 2) {
        return from->bits | (n > 1 ? uint32_t(from[apart].bits) << 16 : 0u);
    } else {
        return number(from);
    }
}

template <class T>
inline Unit<T> ones(long n) {
    const T one[] = {narrowed<T>(1.0f), narrowed<T>(1.0f)};
    return unit(one, 1, n);
}

// the same of the first n <= W columns that stand side by side
template <class T>
inline Vec units(const T* from, long apart, long rows, long n) {
    if constexpr (PAIR<T> == 2) {
        Bits first = numbers(from, n), second = rows > 1 ? numbers(from + apart, n) : Bits{};
        return (Vec)(first | second << 16);
    } else {
        return load(from, n);
    }
}

template <class T>
inline Vec added(Vec sum, Unit<T> a, Vec b) {
#if defined(__AVX512BF16__)
    if constexpr (PAIR<T> == 2)
        return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
#endif
    return sum + (float)a * b;
}

// part(row, vector, its width) of the first `rows` of R rows that are n wide, C vectors; without a loop, so that the sums
// that it names stay in registers
template <long R, long C, class F>
inline __attribute__((always_inline)) void each(long n, long rows, F&& part) {
    const bool whole = n == C * W && rows == R;
#pragma GCC unroll 8
    for (long r = 0; r < R; r++)
#pragma GCC unroll 4
        for (long c = 0; c < C; c++)
            if (whole) part(r, c, W);
            else if (r < rows) part(r, c, std::min(W, n - c * W));
}

template <long R, long C>
inline __attribute__((always_inline)) void clear(Vec (&sums)[R][C]) {
    each<R, C>(C * W, R, [&](long r, long c, long) { sums[r][c] = Vec{}; });
}

// sums += the steps' a (of row r) times packed b
template <class T, long R, long C, class A>
inline __attribute__((always_inline)) void sum(Vec (&sums)[R][C], long steps, A&& a, const Unit<T>* b) {
    for (long s = 0; s < steps; s++) {
        Vec columns[C];
#pragma GCC unroll 3
        for (long c = 0; c < C; c++) {
            Vec column = *reinterpret_cast<const Vec*>(b + (s * C + c) * W);
#if defined(__AVX2__) && !defined(__AVX512F__)
            asm("" : "+x"(column));  // in a register: where there are 16, GCC would read it again for each row
#endif
            columns[c] = column;
        }
#pragma GCC unroll 8
        for (long r = 0; r < R; r++) {
            Unit<T> x = a(r, s);
#pragma GCC unroll 3
            for (long c = 0; c < C; c++) sums[r][c] = added<T>(sums[r][c], x, columns[c]);
        }
    }
}

// to (steps, C, W): n columns of a matrix whose K rows are `along` and columns `across` apart; zeros after them
template <class T>
void pack(const T* from, long along, long across, long K, long n, long C, Unit<T>* to) {
    constexpr long P = PAIR<T>, SOME = 16;
    if (across == 1) {
        for (long k = 0; k < K; k += P)
            for (long c = 0; c < C; c++) {
                const long here = std::min(W, n - c * W);
                *reinterpret_cast<Vec*>(to + (k / P * C + c) * W) = units(from + k * along + c * W, along, K - k, here);
            }
        return;
    }
    for (long first = 0; first < K; first += SOME * P)
        for (long c = 0; c < C * W; c++)
            for (long k = first; k < std::min(K, first + SOME * P); k += P)
                to[k / P * C * W + c] = c >= n      ? Unit<T>{}
                                        : along == 1 ? unit(from + k + c * across, 1, K - k)
                                                     : unit(from + k * along + c * across, along, K - k);
}

// what a float source's rows are: where one stands, and what it is multiplied by before it is rounded
struct Row {
    const float* at;
    float by;
};

template <class T>
inline Vec rounded(const Row& row, long i, long n) {
    Vec x = load(row.at + i, n) * row.by;
    if constexpr (std::is_same_v<T, bf16>) x = widen(narrow(x));
    return x;
}

// the same of such rows: columns first.. of row(0), row(1).. to row(K - 1)
template <class T, class F>
void pack_rows(F&& row, long K, long first, long n, Unit<T>* to) {
    constexpr long P = PAIR<T>;
    const long C = up(n, W);
    for (long k = 0; k < K; k += P) {
        const Row one = row(k), other = k + 1 < K ? row(k + 1) : Row{one.at, 0.0f};
        for (long c = 0; c < C; c++) {
            const long here = std::min(W, n - c * W);
            Vec found = rounded<T>(one, first + c * W, here);
            if constexpr (P == 2)
                found = (Vec)((Bits)found >> 16 | (Bits)rounded<T>(other, first + c * W, here));
            *reinterpret_cast<Vec*>(to + (k / P * C + c) * W) = found;
        }
    }
}

// or row(first).. themselves as n columns, of K numbers each
template <class T, class F>
void pack_columns(F&& row, long K, long first, long n, Unit<T>* to) {
    constexpr long P = PAIR<T>;
    const long columns = up(n, W) * W;
    Row rows[STRIP];
    for (long c = 0; c < n; c++) rows[c] = row(first + c);
    for (long k = 0; k < K; k += W)
        for (long c = 0; c < columns; c++) {
            const long here = std::min(W, K - k);
            Unit<T> part[W] = {};
            if (c < n) {
                Vec found = rounded<T>(rows[c], k, here);
                if constexpr (P == 2) {
                    Half half = narrow(found);
                    memcpy(part, &half, sizeof half);
                } else {
                    memcpy(part, &found, sizeof found);
                }
            }
            for (long j = 0; j < up(here, P); j++) to[(k / P + j) * columns + c] = part[j];
        }
}

template <long C, class F>
inline void for_width(long C_here, F&& part) {  // a strip of C_here vectors
    if (C_here == C) part(std::integral_constant<long, C>{});
    else if constexpr (C > 1) for_width<C - 1>(C_here, part);
}

// rows first.. to end - 1 of a strip n wide, HIGH by HIGH: part(row, how many, how many vectors)
template <class F>
inline void by_tiles(long first, long end, long n, F&& part) {
    for_width<WIDE>(up(n, W), [&](auto width) {
        long t = first;
        for (; t + HIGH <= end; t += HIGH) part(t, std::integral_constant<long, HIGH>{}, width);
        for (; t < end; t++) part(t, std::integral_constant<long, 1>{}, width);
    });
}

constexpr long BLOCK = 16;   // rows whose results stay in the cache
constexpr long CHUNK = 512;  // rows whose columns stay in the cache, where it is summed over rows

// sums += a b of R rows and C packed vectors
template <class T, long R, long C>
inline __attribute__((always_inline)) void add_product(Vec (&sums)[R][C], const T* a, long apart, long K, const Unit<T>* b) {
    constexpr long P = PAIR<T>;
    sum<T, R, C>(sums, K / P, [&](long r, long s) { return unit(a + r * apart + s * P, 1, P); }, b);
    if (__builtin_expect(K % P, 0))
        sum<T, R, C>(sums, 1, [&](long r, long) { return unit(a + r * apart + K - 1, 1, 1); }, b + K / P * C * W);
}

// y = a b + h u + bias of R rows and C vectors n wide
template <class T, long R, long C, class S>
inline void tile(const T* a, long apart, long K, const Unit<T>* b, const T* h, long stride, long M, const Unit<T>* u,
                 const S* bias, T* y, long y_apart, long n) {
    Vec sums[R][C];
    each<R, C>(n, R, [&](long r, long c, long width) {
        sums[r][c] = r ? sums[0][c] : bias ? load(bias + c * W, width) : Vec{};
    });
    add_product<T, R, C>(sums, a, apart, K, b);
    if (M) add_product<T, R, C>(sums, h, stride, M, u);
    each<R, C>(n, R, [&](long r, long c, long width) { store(y + r * y_apart + c * W, sums[r][c], width); });
}

// y (O) = a b + h u + bias of rows first.. to end - 1; b and u are packed, strip after strip
template <class T, class S = T>
inline void rows_times(const T* a, long apart, long K, const Unit<T>* b, T* y, long y_apart, long O, long first, long end,
                       const T* h = nullptr, long stride = 0, long M = 0, const Unit<T>* u = nullptr, const S* bias = nullptr) {
    for (long o = 0; o < O; o += STRIP) {
        const long n = std::min(STRIP, O - o);
        by_tiles(first, end, n, [&](long t, auto high, auto width) {
            tile<T, decltype(high)::value, decltype(width)::value>(
                a + t * apart, apart, K, b + o * up(K, PAIR<T>), h + t * stride, stride, M, u + o * up(M, PAIR<T>),
                bias ? bias + o : bias, y + t * y_apart + o, y_apart, n);
        });
    }
}

// g (R, O) = a^T b, of `rows` rows a (R) and b (O); by all threads of a team, each with a part of packed_b
template <class T>
void over_rows(const T* a, long a_apart, const T* b, long b_apart, Unit<T>* packed_a, Unit<T>* packed_b, float* g, long rows,
               long R, long O) {
    constexpr long P = PAIR<T>, SIZE = CHUNK / P;
    const long steps = up(rows, P);
    Unit<T>* own = packed_b + omp_get_thread_num() * SIZE * STRIP;
#pragma omp for schedule(static)
    for (long r = 0; r < R; r += W) pack(a + r, a_apart, 1, rows, std::min(W, R - r), 1, packed_a + r * steps);
#pragma omp for schedule(static)
    for (long o = 0; o < O; o += STRIP) {
        const long n = std::min(STRIP, O - o);
        for (long k = 0; k == 0 || k < rows; k += CHUNK) {  // zeros of no rows
            const long count = std::min(CHUNK, rows - k);
            pack(b + k * b_apart + o, b_apart, 1, count, n, up(n, W), own);
            for (long first = 0; first < R; first += HIGH) {
                const Unit<T>* from = packed_a + first / W * W * steps + k / P * W + first % W;
                for_width<WIDE>(up(n, W), [&](auto width) {
                    constexpr long C = decltype(width)::value;
                    const long high = std::min(HIGH, R - first);
                    Vec sums[HIGH][C];
                    clear(sums);
                    sum<T, HIGH, C>(sums, up(count, P), [&](long r, long s) { return from[s * W + r]; }, own);
                    each<HIGH, C>(n, high, [&](long r, long c, long width) {
                        float* to = g + (first + r) * O + o + c * W;
                        store(to, k ? load(to, width) + sums[r][c] : sums[r][c], width);
                    });
                });
            }
        }
    }
}

}  // namespace
