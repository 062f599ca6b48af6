// Products of rows with each sample's own few components, each in one pass over the rows. calls.py says what the functions
// compute. B batch, N tokens, I/O features, M components; contiguous where no stride is given. Sums are float; a sample's
// rows are cut into `pieces`, of which each adds to sums of its own.
#include "tailors.hpp"

namespace {

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

}  // namespace

#define FOR(T, name) \
    extern "C" void across_##name(const T* x, const T* v, T* out, const T* h, long stride, float* g, \
                                  float* sums, long B, long on, long N, long I, long M, long pieces) { \
        across(x, v, out, h, stride, g, sums, B, on, N, I, M, pieces); \
    } \
    extern "C" void add_##name(T* y, const T* h, long stride, const T* u, const T* bias, long B, long on, long N, \
                                   long O, long M) { \
        add(y, h, stride, u, bias, B, on, N, O, M); \
    }

FOR(float, float32)
FOR(bf16, bfloat16)
