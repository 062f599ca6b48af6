// Layers of components that share their input, a whole pass at a time: each thread takes some rows through all products, so
// that what one gives is still in the cache for the next. layers.py says what the functions compute. B batch, N tokens, I/O
// features, L layers, R learngene components, S slots of a bank, K slots of a sample, C components of a slot, M = K C of a
// sample. Sums are float. Parameters are float, and scaled by sigma and a slot's weight, then rounded, as they are packed.
#include "products.hpp"
#include "tailors.hpp"

namespace {

// hands out pieces of one allocation; from no allocation, only counts
struct Pieces {
    char* start;
    long used = 0;
    template <class X>
    X* of(long count) {
        X* found = start ? reinterpret_cast<X*>(start + used) : nullptr;
        used += up(count * sizeof(X), 64) * 64;
        return found;
    }
};

struct Sizes {
    long B, N, I, O, L, R, S, K, C;
};

// Of each layer: u, sigma, v, bias, and the bank's u, sigma, v
struct Parameters : Sizes {
    const float* const* all;
    const int64_t* slots;
    const float* weights;
    long M = K * C;
    long bank_row(long b, long m) const { return slots[b * K + m / C] * C + m % C; }
    Row u(long l, long r) const { return {all[l] + r * O, all[L + l][r]}; }
    Row v(long lr) const { return {all[2 * L + lr / R] + lr % R * I, 1.0f}; }
    const float* bias(long l) const { return all[3 * L + l]; }
    Row own_u(long l, long b, long m) const {
        long row = bank_row(b, m);
        return {all[4 * L + l] + row * O, all[5 * L + l][row] * weights[b * K + m / C]};
    }
    Row own_v(long b, long lm) const { return {all[6 * L + lm / M] + bank_row(b, lm % M) * I, 1.0f}; }
};

template <class T>
inline void copy_rounded(const Row& row, long count, T* to) {
    by_vectors(0, count, [&](long i, long n) { store(to + i, load(row.at + i, n) * row.by, n); });
}

// x v^T of rows first.. to end - 1
template <class T>
inline void dots_of_block(const T* x, long I, const T* v, long M, T* h, long stride, long first, long end) {
    long t = first;
    for (; t + ROWS <= end; t += ROWS) dots_of_rows<T, ROWS>(x + t * I, I, v, M, h + t * stride, stride);
    for (; t < end; t++) dots_of_rows<T, 1>(x + t * I, I, v, M, h + t * stride, stride);
}

// y_l = h_l u_l + h_own,l own u_l + bias with h = x v^T, h_own = x own v^T; `active`, where wanted: GELU of the one y
template <class T>
long forward(const T* x, Parameters p, char* scratch, T* const* y, T* active, T* h, T* h_own) {
    constexpr long P = PAIR<T>;
    const long LR = p.L * p.R, LM = p.L * p.M, v_strips = up(LR, STRIP), strips = up(p.O, STRIP);
    const long v_size = up(p.I, P) * STRIP, size = up(p.R, P) * STRIP, own_size = up(p.M, P) * STRIP;
    Pieces pieces{scratch};
    Unit<T>*packed_v = pieces.of<Unit<T>>(v_strips * v_size), *packed_u = pieces.of<Unit<T>>(p.L * strips * size);
    Unit<T>* packed_own = pieces.of<Unit<T>>(p.B * p.L * strips * own_size);
    T* own_v = pieces.of<T>(p.B * LM * p.I);
    if (!scratch) return pieces.used;
#pragma omp parallel
    {
#pragma omp for schedule(static) nowait
        for (long s = 0; s < v_strips; s++)
            pack_columns<T>([&](long lr) { return p.v(lr); }, p.I, s * STRIP, std::min(STRIP, LR - s * STRIP),
                            packed_v + s * v_size);
#pragma omp for collapse(2) schedule(static) nowait
        for (long l = 0; l < p.L; l++)
            for (long s = 0; s < strips; s++) {
                const long o = s * STRIP, n = std::min(STRIP, p.O - o);
                pack_rows<T>([&](long r) { return p.u(l, r); }, p.R, o, n, packed_u + (l * strips + s) * size);
                for (long b = 0; b < p.B; b++)
                    pack_rows<T>([&](long m) { return p.own_u(l, b, m); }, p.M, o, n,
                                 packed_own + ((b * p.L + l) * strips + s) * own_size);
            }
#pragma omp for schedule(static)
        for (long at = 0; at < p.B * LM; at++) copy_rounded(p.own_v(at / LM, at % LM), p.I, own_v + at * p.I);
#pragma omp for collapse(2) schedule(static)
        for (long b = 0; b < p.B; b++)
            for (long first = 0; first < p.N; first += BLOCK) {
                const long end = b * p.N + std::min(p.N, first + BLOCK), start = b * p.N + first;
                rows_times(x, p.I, p.I, packed_v, h, LR, LR, start, end);
                dots_of_block(x, p.I, own_v + b * LM * p.I, LM, h_own, LM, start, end);
                for (long l = 0; l < p.L; l++)
                    rows_times(h + l * p.R, LR, p.R, packed_u + l * strips * size, y[l], p.O, p.O, start, end, h_own + l * p.M,
                               LM, p.M, packed_own + (b * p.L + l) * strips * own_size, p.bias(l));
                if (active)
                    by_vectors(start * p.O, end * p.O, [&](long i, long n) { store(active + i, gelu<T>(load(y[0] + i, n)), n); });
            }
    }
    return 0;
}

// The gradients of x (dx) and of the parameters (d, in their order), each where it is wanted. With `before`, what GELU was
// taken of, dy is the gradient of GELU of the one y. Of each sample's rows there are `pieces`, with sums of their own.
template <class T>
long backward(const T* const* dys, const T* before, const T* x, const T* h, const T* h_own, Parameters p, char* scratch, T* dx,
              float* const* d, long pieces_of_a_sample) {
    constexpr long P = PAIR<T>;
    const bool common = d[0], biases = d[3 * p.L], own = d[4 * p.L], inner = dx || common;
    const long parts = p.B * pieces_of_a_sample, rows = p.B * p.N, LR = p.L * p.R, LM = p.L * p.M;
    const long u_strips = up(p.R, STRIP), u_size = up(p.O, P) * STRIP;
    const long strips = up(p.I, STRIP), size = up(LR, P) * STRIP, own_size = up(LM, P) * STRIP;
    Pieces pieces{scratch};
    Unit<T>*packed_u = pieces.of<Unit<T>>(p.L * u_strips * u_size), *packed_v = pieces.of<Unit<T>>(strips * size);
    Unit<T>* packed_own = pieces.of<Unit<T>>(p.B * strips * own_size);
    Unit<T>*first_packed = pieces.of<Unit<T>>(up(rows, P) * up(LR, W) * W),
        *second_packed = pieces.of<Unit<T>>(CHUNK / P * STRIP * omp_get_max_threads());
    T *own_u = pieces.of<T>(p.B * LM * p.O), *dh = pieces.of<T>(rows * LR), *dh_own = pieces.of<T>(rows * LM);
    T* inside = pieces.of<T>(before ? rows * p.O : 0);
    float *sums_u = pieces.of<float>(parts * LM * p.O), *sums_v = pieces.of<float>(parts * LM * p.I);
    float* sums = pieces.of<float>(parts * p.L * p.O);
    if (!scratch) return pieces.used;
#pragma omp parallel
    {
#pragma omp for collapse(2) schedule(static) nowait
        for (long l = 0; l < p.L; l++)
            for (long s = 0; s < u_strips; s++)
                pack_columns<T>([&](long r) { return p.u(l, r); }, p.O, s * STRIP, std::min(STRIP, p.R - s * STRIP),
                                packed_u + (l * u_strips + s) * u_size);
#pragma omp for schedule(static) nowait
        for (long s = 0; s < strips; s++) {
            const long o = s * STRIP, n = std::min(STRIP, p.I - o);
            pack_rows<T>([&](long lr) { return p.v(lr); }, LR, o, n, packed_v + s * size);
            for (long b = 0; b < p.B; b++)
                pack_rows<T>([&](long lm) { return p.own_v(b, lm); }, LM, o, n, packed_own + (b * strips + s) * own_size);
        }
#pragma omp for schedule(static)
        for (long at = 0; at < p.B * LM; at++)
            copy_rounded(p.own_u(at % LM / p.M, at / LM, at % p.M), p.O, own_u + at * p.O);
#pragma omp for schedule(static)
        for (long part = 0; part < parts; part++) {
            const long b = part / pieces_of_a_sample, piece = part % pieces_of_a_sample;
            const long last = b * p.N + p.N * (piece + 1) / pieces_of_a_sample;
            float *part_u = sums_u + part * LM * p.O, *part_v = sums_v + part * LM * p.I, *plain = sums + part * p.L * p.O;
            std::fill(part_u, part_u + LM * p.O, 0.0f);
            std::fill(part_v, part_v + LM * p.I, 0.0f);
            std::fill(plain, plain + p.L * p.O, 0.0f);
            for (long start = b * p.N + p.N * piece / pieces_of_a_sample; start < last; start += BLOCK) {
                const long end = std::min(last, start + BLOCK);
                for (long l = 0; l < p.L; l++) {
                    const T* dy = dys[l];
                    if (before) {
                        by_vectors(start * p.O, end * p.O, [&](long i, long n) {
                            store(inside + i, load(dy + i, n) * slope_of_gelu<T>(load(before + i, n)), n);
                        });
                        dy = inside;
                    }
                    if (inner)
                        rows_times(dy, p.O, p.O, packed_u + l * u_strips * u_size, dh + l * p.R, LR, p.R, start, end);
                    dots_of_block(dy, p.O, own_u + (b * LM + l * p.M) * p.O, p.M, dh_own + l * p.M, LM, start, end);
                    if (own || biases)
                        by_rows(start, end, [&](long t, auto count) {
                            collect_of_rows<T, decltype(count)::value>(
                                dy + t * p.O, p.O, h_own + t * LM + l * p.M, own ? p.M : 0, LM, part_u + l * p.M * p.O,
                                plain + l * p.O);
                        });
                }
                if (dx)
                    rows_times(dh, LR, LR, packed_v, dx, p.I, p.I, start, end, dh_own, LM, LM,
                               packed_own + b * strips * own_size);
                if (own)
                    by_rows(start, end, [&](long t, auto count) {
                        collect_of_rows<T, decltype(count)::value>(x + t * p.I, p.I, dh_own + t * LM, LM, LM, part_v, nullptr);
                    });
            }
        }
        if (biases)
#pragma omp for schedule(static)
            for (long lo = 0; lo < p.L * p.O; lo++) {
                float sum = 0;
                for (long part = 0; part < parts; part++) sum += sums[part * p.L * p.O + lo];
                d[3 * p.L + lo / p.O][lo % p.O] = sum;
            }
        if (own)
#pragma omp for collapse(2) schedule(static)
            for (long l = 0; l < p.L; l++)
                for (long row = 0; row < p.S * p.C; row++) {
                    float *du = d[4 * p.L + l] + row * p.O, *dv = d[6 * p.L + l] + row * p.I, along = 0;
                    std::fill(du, du + p.O, 0.0f);
                    std::fill(dv, dv + p.I, 0.0f);
                    for (long part = 0; part < parts * p.K; part++) {
                        const long piece = part / p.K, k = piece / pieces_of_a_sample * p.K + part % p.K;
                        if (p.slots[k] != row / p.C) continue;
                        const long m = piece * LM + l * p.M + part % p.K * p.C + row % p.C;
                        const float *u = p.all[4 * p.L + l] + row * p.O, *from = sums_u + m * p.O;
                        const float by = p.all[5 * p.L + l][row] * p.weights[k];
                        Vec dots = {};
                        by_vectors(0, p.O, [&](long i, long n) {
                            Vec found = load(from + i, n);
                            store(du + i, load(du + i, n) + found * by, n);
                            dots += found * load(u + i, n);
                        });
                        along += p.weights[k] * total(dots);
                        from = sums_v + m * p.I;
                        by_vectors(0, p.I, [&](long i, long n) { store(dv + i, load(dv + i, n) + load(from + i, n), n); });
                    }
                    d[5 * p.L + l][row] = along;
                }
        if (common) {
            over_rows(dh, LR, x, p.I, first_packed, second_packed, d[2 * p.L], rows, LR, p.I);
            for (long l = 0; l < p.L; l++)
                over_rows(h + l * p.R, LR, before ? inside : dys[l], p.O, first_packed, second_packed, d[l], rows, p.R, p.O);
#pragma omp for collapse(2) schedule(static)
            for (long l = 0; l < p.L; l++)
                for (long r = 0; r < p.R; r++) {
                    const Row u = p.u(l, r);
                    float* du = d[l] + r * p.O;
                    Vec dots = {};
                    by_vectors(0, p.O, [&](long i, long n) {
                        Vec found = load(du + i, n);
                        dots += found * load(u.at + i, n);
                        store(du + i, found * u.by, n);
                    });
                    d[p.L + l][r] = total(dots);
                }
        }
    }
    return 0;
}

}  // namespace

#define FOR(T, name) \
    extern "C" long forward_##name(const T* x, const float* const* all, const int64_t* slots, const float* weights, \
                                   char* scratch, T* const* y, T* active, T* h, T* h_own, long B, long N, long I, long O, \
                                   long L, long R, long S, long K, long C) { \
        return forward(x, Parameters{{B, N, I, O, L, R, S, K, C}, all, slots, weights}, scratch, y, active, h, h_own); \
    } \
    extern "C" long backward_##name(const T* const* dys, const T* before, const T* x, const T* h, const T* h_own, \
                                    const float* const* all, const int64_t* slots, const float* weights, char* scratch, \
                                    T* dx, float* const* d, long pieces, long B, long N, long I, long O, long L, long R, \
                                    long S, long K, long C) { \
        return backward(dys, before, x, h, h_own, Parameters{{B, N, I, O, L, R, S, K, C}, all, slots, weights}, scratch, dx, \
                        d, pieces); \
    }

FOR(float, float32)
FOR(bf16, bfloat16)
