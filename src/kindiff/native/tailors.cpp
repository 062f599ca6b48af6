// Products of rows with each sample's own few components, each in one pass over the rows. calls.py says what the functions
// compute. B batch, N tokens, I/O features, M components; contiguous where no stride is given. Sums are float; a sample's
// rows are cut into `pieces`, of which each adds to sums of its own.
#include "vectors.hpp"

namespace {

constexpr long FEW = 4, STEP = 8;  // components, and rows, that are taken together

// by STEP rows at a time, what is left one by one
template <class F>
inline void by_rows(long from, long to, F&& part) {
    for (; from + STEP <= to; from += STEP) part(from, std::integral_constant<long, STEP>{});
    for (; from < to; from++) part(from, std::integral_constant<long, 1>{});
}

// h = x v^T of R rows and C components
template <class T, long R, long C>
inline void dots(const T* x, long I, const T* v, T* h, long stride) {
    Vec sums[R][C] = {};
    long i = 0;
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<T, bf16>)
        for (; i + 2 * W <= I; i += 2 * W) {
            __m512bh a, b[C];
            for (long c = 0; c < C; c++) memcpy(&b[c], v + c * I + i, sizeof a);
            for (long r = 0; r < R; r++) {
                memcpy(&a, x + r * I + i, sizeof a);
                for (long c = 0; c < C; c++) sums[r][c] = (Vec)_mm512_dpbf16_ps((__m512)sums[r][c], a, b[c]);
            }
        }
#endif
    by_vectors(i, I, [&](long i, long n) {
        Vec b[C];
        for (long c = 0; c < C; c++) b[c] = load(v + c * I + i, n);
        for (long r = 0; r < R; r++) {
            Vec a = load(x + r * I + i, n);
            for (long c = 0; c < C; c++) sums[r][c] += a * b[c];
        }
    });
    for (long r = 0; r < R; r++)
        for (long c = 0; c < C; c++) store(h + r * stride + c, Vec{} + total(sums[r][c]), 1);
}

template <class T, long R>
inline void dots_of_rows(const T* x, long I, const T* v, long M, T* h, long stride) {
    long m = 0;
    for (; m + FEW <= M; m += FEW) dots<T, R, FEW>(x, I, v + m * I, h + m, stride);
    for (; m < M; m++) dots<T, R, 1>(x, I, v + m * I, h + m, stride);
}

// g += h^T x of R rows and C components; plain += the sum of the rows, where there is one
template <class T, long R, long C>
inline void collect(const T* x, long I, const T* h, long stride, float* g, float* plain) {
    float a[R][C + 1];
    for (long r = 0; r < R; r++)
        for (long c = 0; c < C; c++) a[r][c] = number(h + r * stride + c);
    by_vectors(0, I, [&](long i, long n) {
        Vec found[C + 1], sum = {};
        for (long c = 0; c < C; c++) found[c] = load(g + c * I + i, n);
        for (long r = 0; r < R; r++) {
            Vec row = load(x + r * I + i, n);
            for (long c = 0; c < C; c++) found[c] += a[r][c] * row;
            sum += row;
        }
        for (long c = 0; c < C; c++) store(g + c * I + i, found[c], n);
        if (plain) store(plain + i, load(plain + i, n) + sum, n);
    });
}

template <class T, long R>
inline void collect_of_rows(const T* x, long I, const T* h, long M, long stride, float* g, float* plain) {
    long m = 0;
    for (; m + FEW <= M; m += FEW, plain = nullptr) collect<T, R, FEW>(x, I, h + m, stride, g + m * I, plain);
    for (; m < M; m++, plain = nullptr) collect<T, R, 1>(x, I, h + m, stride, g + m * I, plain);
    if (plain) collect<T, R, 0>(x, I, h, stride, g, plain);
}

template <class T>
void across(const T* x, const T* v, T* out, const T* h, long stride, float* g, float* sums, long B,
            long on, long N, long I, long M, long pieces) {
#pragma omp parallel for schedule(static)
    for (long part = 0; part < B * pieces; part++) {
        long b = part / pieces, piece = part % pieces;
        float* own = g && b < on ? g + part * M * I : nullptr;
        float* plain = sums ? sums + part * I : nullptr;
        if (own) std::fill(own, own + M * I, 0.0f);
        if (plain) std::fill(plain, plain + I, 0.0f);
        by_rows(N * piece / pieces, N * (piece + 1) / pieces, [&](long t, auto count) {
            constexpr long R = decltype(count)::value, SOME = std::min(R, ROWS);
            const T* rows = x + (b * N + t) * I;
            if (out && b < on)
                for (long r = 0; r < R; r += SOME)
                    dots_of_rows<T, SOME>(rows + r * I, I, v + b * M * I, M, out + (b * N + t + r) * M, M);
            if (own || plain) collect_of_rows<T, R>(rows, I, h + (b * N + t) * stride, own ? M : 0, stride, own, plain);
        });
    }
}

// y += h u + bias of R rows and C vectors n wide
template <class T, long R, long C>
inline void rank(T* y, long O, const T* h, long stride, const T* u, long M, const T* bias, long n) {
    Vec sums[R][C];
    for (long c = 0; c < C; c++) {
        Vec start = bias ? load(bias + c * W, n) : Vec{};
        for (long r = 0; r < R; r++) sums[r][c] = load(y + r * O + c * W, n) + start;
    }
    for (long m = 0; m < M; m++) {
        Vec b[C];
        for (long c = 0; c < C; c++) b[c] = load(u + m * O + c * W, n);
        for (long r = 0; r < R; r++) {
            float a = number(h + r * stride + m);
            for (long c = 0; c < C; c++) sums[r][c] += a * b[c];
        }
    }
    for (long r = 0; r < R; r++)
        for (long c = 0; c < C; c++) store(y + r * O + c * W, sums[r][c], n);
}

template <class T>
void add(T* y, const T* h, long stride, const T* u, const T* bias, long B, long on, long N, long O, long M) {
#pragma omp parallel for collapse(2) schedule(static)
    for (long b = 0; b < B; b++)
        for (long block = 0; block < (N + STEP - 1) / STEP; block++)
            by_rows(block * STEP, std::min(N, (block + 1) * STEP), [&](long t, auto count) {
                constexpr long R = std::min(decltype(count)::value, ROWS);
                for (long r = 0; r < decltype(count)::value; r += R) {
                    T* to = y + (b * N + t + r) * O;
                    const T *by = h + (b * N + t + r) * stride, *with = u + b * M * O;
                    long o = 0, own = b < on ? M : 0;
                    for (; o + 4 * W <= O; o += 4 * W)
                        rank<T, R, 4>(to + o, O, by, stride, with + o, own, bias ? bias + o : bias, W);
                    by_vectors(o, O, [&](long o, long n) {
                        rank<T, R, 1>(to + o, O, by, stride, with + o, own, bias ? bias + o : bias, n);
                    });
                }
            });
}

// Of banks u (S, C, O), sigma (S, C) and v (S, C, I) what each sample has by its K slots, M = K C: u times sigma and the
// slot's weight (B, M, O), and v (B, M, I), from a sample to the next `apart`. Without slots there is one sample: slot 0.
template <class T>
void take(const float* u, const float* sigma, const float* v, const int64_t* slots, const float* weights, T* u_out,
          T* v_out, long apart, long B, long K, long C, long O, long I) {
#pragma omp parallel for schedule(static)
    for (long at = 0; at < B * K * C; at++) {
        long part = at / C, row = (slots ? slots[part] : 0) * C + at % C;
        float by = sigma[row] * (weights ? weights[part] : 1.0f);
        T* v_row = v_out + part / K * apart + (part % K * C + at % C) * I;
        by_vectors(0, O, [&](long i, long n) { store(u_out + at * O + i, load(u + row * O + i, n) * by, n); });
        by_vectors(0, I, [&](long i, long n) { store(v_row + i, load(v + row * I + i, n), n); });
    }
}

// and what gradients of those are for the banks
template <class T>
void take_back(const T* gu, const T* gv, long apart, const float* u, const float* sigma, const int64_t* slots,
               const float* weights, float* du, float* dsigma, float* dv, long S, long B, long K, long C, long O, long I) {
#pragma omp parallel for schedule(static)
    for (long row = 0; row < S * C; row++) {
        float *u_row = du + row * O, *v_row = dv + row * I, along = 0;
        by_vectors(0, O, [&](long i, long n) { store(u_row + i, Vec{}, n); });
        by_vectors(0, I, [&](long i, long n) { store(v_row + i, Vec{}, n); });
        for (long part = 0; part < B * K; part++) {
            if ((slots ? slots[part] : 0) != row / C) continue;
            const T* from = gu + (part * C + row % C) * O;
            float weight = weights ? weights[part] : 1.0f, by = sigma[row] * weight;
            Vec sums = {};
            by_vectors(0, O, [&](long i, long n) {
                Vec d = load(from + i, n);
                store(u_row + i, load(u_row + i, n) + d * by, n);
                sums += d * load(u + row * O + i, n);
            });
            along += weight * total(sums);
            from = gv + part / K * apart + (part % K * C + row % C) * I;
            by_vectors(0, I, [&](long i, long n) { store(v_row + i, load(v_row + i, n) + load(from + i, n), n); });
        }
        dsigma[row] = along;
    }
}

// Of learngenes u (R, O) the gradients, from that of u times sigma, which is g (O, R) turned and R apart by `stride`: du and
// dsigma; or, without a sigma, du alone.
template <class T>
void turn_back(const T* g, long stride, const float* u, const float* sigma, float* du, float* dsigma, long R, long O) {
#pragma omp parallel for schedule(static)
    for (long r = 0; r < R; r += W) {
        const long rows = std::min(W, R - r);
        float along[W] = {};
        by_vectors(0, O, [&](long o, long n) {
            float turned[W][W] = {}, row[W];
            for (long j = 0; j < n; j++) {
                store(row, load(g + (o + j) * stride + r, rows), W);
                for (long i = 0; i < W; i++) turned[i][j] = row[i];
            }
            for (long i = 0; i < rows; i++) {
                Vec d = load(turned[i], W);
                long at = (r + i) * O + o;
                if (dsigma) along[i] += total(d * load(u + at, n));
                store(du + at, sigma ? d * sigma[r + i] : d, n);
            }
        });
        if (dsigma) std::copy(along, along + rows, dsigma + r);
    }
}

}  // namespace

#define FOR(T, name) \
    extern "C" void across_##name(const T* x, const T* v, T* out, const T* h, long stride, float* g, \
                                  float* sums, long B, long on, long N, long I, long M, long pieces) { \
        across(x, v, out, h, stride, g, sums, B, on, N, I, M, pieces); \
    } \
    extern "C" void add_##name(T* y, const T* h, long stride, const T* u, const T* bias, long B, long on, long N, \
                                   long O, long M) { \
        add(y, h, stride, u, bias, B, on, N, O, M); \
    } \
    extern "C" void take_##name(const float* u, const float* sigma, const float* v, const int64_t* slots, \
                                const float* weights, T* u_out, T* v_out, long apart, long B, long K, long C, long O, \
                                long I) { \
        take(u, sigma, v, slots, weights, u_out, v_out, apart, B, K, C, O, I); \
    } \
    extern "C" void take_back_##name(const T* gu, const T* gv, long apart, const float* u, const float* sigma, \
                                     const int64_t* slots, const float* weights, float* du, float* dsigma, float* dv, \
                                     long S, long B, long K, long C, long O, long I) { \
        take_back(gu, gv, apart, u, sigma, slots, weights, du, dsigma, dv, S, B, K, C, O, I); \
    } \
    extern "C" void turn_back_##name(const T* g, long stride, const float* u, const float* sigma, float* du, \
                                     float* dsigma, long R, long O) { \
        turn_back(g, stride, u, sigma, du, dsigma, R, O); \
    }

FOR(float, float32)
FOR(bf16, bfloat16)
