// What is element by element or row by row in a transformer block, each in one pass. functions.py says what the functions
// compute. B batch, N tokens, D features; `stride` between the samples' vectors of adaLN. Sums are float; a sample's rows
// are cut into `pieces`, of which each adds to sums of its own.
#include "vectors.hpp"

namespace {

template <class T>
void norm(const float* x, const float* shift, const float* scale, long stride, T* y, float* moments, long B, long N,
          long D, float eps) {
#pragma omp parallel for schedule(static)
    for (long at = 0; at < B * N; at++) {
        const float *row = x + at * D, *add = shift + at / N * stride, *by = scale + at / N * stride;
        Vec sums = {}, squares = {};
        by_vectors(0, D, [&](long i, long n) { sums += load(row + i, n); });
        float mean = total(sums) / D;
        by_vectors(0, D, [&](long i, long n) {
            Vec difference = only(load(row + i, n) - mean, n);
            squares += difference * difference;
        });
        float inverse = 1 / std::sqrt(total(squares) / D + eps);
        by_vectors(0, D, [&](long i, long n) {
            Vec normal = (load(row + i, n) - mean) * inverse;
            store(y + at * D + i, normal * (load(by + i, n) + 1.0f) + load(add + i, n), n);
        });
        moments[2 * at] = mean;
        moments[2 * at + 1] = inverse;
    }
}

template <class T>
void norm_back(const T* dy, const float* x, const float* scale, long stride, const float* moments, float* dx,
               float* dshift, float* dscale, long B, long N, long D, long pieces) {
#pragma omp parallel for schedule(static)
    for (long part = 0; part < B * pieces; part++) {
        long b = part / pieces, piece = part % pieces;
        float *add = dshift + part * D, *by = dscale + part * D;
        std::fill(add, add + D, 0.0f);
        std::fill(by, by + D, 0.0f);
        for (long at = b * N + N * piece / pieces; at < b * N + N * (piece + 1) / pieces; at++) {
            const float mean = moments[2 * at], inverse = moments[2 * at + 1], *row = x + at * D;
            Vec plain = {}, along = {};
            by_vectors(0, D, [&](long i, long n) {
                Vec d = load(dy + at * D + i, n), normal = (load(row + i, n) - mean) * inverse;
                Vec inner = d * (load(scale + b * stride + i, n) + 1.0f);
                plain += inner;
                along += inner * normal;
                store(add + i, load(add + i, n) + d, n);
                store(by + i, load(by + i, n) + d * normal, n);
            });
            float first = total(plain) / D, second = total(along) / D;
            by_vectors(0, D, [&](long i, long n) {
                Vec normal = (load(row + i, n) - mean) * inverse;
                Vec inner = load(dy + at * D + i, n) * (load(scale + b * stride + i, n) + 1.0f);
                store(dx + at * D + i, (inner - first - normal * second) * inverse, n);
            });
        }
    }
}

template <class T>
void residual(const float* x, const float* gate, long stride, const T* y, float* z, long B, long N, long D) {
#pragma omp parallel for schedule(static)
    for (long at = 0; at < B * N; at++) {
        const float *by = gate + at / N * stride, *row = x + at * D;
        by_vectors(0, D, [&](long i, long n) {
            store(z + at * D + i, load(row + i, n) + load(by + i, n) * load(y + at * D + i, n), n);
        });
    }
}

template <class T>
void residual_back(const float* dz, const float* gate, long stride, const T* y, T* dy, float* dgate, long B, long N,
                   long D, long pieces) {
#pragma omp parallel for schedule(static)
    for (long part = 0; part < B * pieces; part++) {
        long b = part / pieces, piece = part % pieces;
        float* by = dgate + part * D;
        std::fill(by, by + D, 0.0f);
        for (long at = b * N + N * piece / pieces; at < b * N + N * (piece + 1) / pieces; at++)
            by_vectors(0, D, [&](long i, long n) {
                Vec d = load(dz + at * D + i, n);
                store(dy + at * D + i, d * load(gate + b * stride + i, n), n);
                store(by + i, load(by + i, n) + d * load(y + at * D + i, n), n);
            });
    }
}

constexpr long RUN = 2048;

template <class T>
void gelu(const T* x, T* y, long count) {
#pragma omp parallel for schedule(static)
    for (long start = 0; start < count; start += RUN)
        by_vectors(start, std::min(count, start + RUN), [&](long i, long n) {
            store(y + i, gelu<T>(load(x + i, n)), n);
        });
}

template <class T>
void gelu_back(const T* x, const T* dy, T* dx, long count) {
#pragma omp parallel for schedule(static)
    for (long start = 0; start < count; start += RUN)
        by_vectors(start, std::min(count, start + RUN), [&](long i, long n) {
            store(dx + i, load(dy + i, n) * slope_of_gelu<T>(load(x + i, n)), n);
        });
}

}  // namespace

#define FOR(T, name) \
    extern "C" void norm_##name(const float* x, const float* shift, const float* scale, long stride, T* y, \
                                float* moments, long B, long N, long D, float eps) { \
        norm(x, shift, scale, stride, y, moments, B, N, D, eps); \
    } \
    extern "C" void norm_back_##name(const T* dy, const float* x, const float* scale, long stride, \
                                     const float* moments, float* dx, float* dshift, float* dscale, long B, long N, \
                                     long D, long pieces) { \
        norm_back(dy, x, scale, stride, moments, dx, dshift, dscale, B, N, D, pieces); \
    } \
    extern "C" void residual_##name(const float* x, const float* gate, long stride, const T* y, float* z, long B, \
                                    long N, long D) { \
        residual(x, gate, stride, y, z, B, N, D); \
    } \
    extern "C" void residual_back_##name(const float* dz, const float* gate, long stride, const T* y, T* dy, \
                                         float* dgate, long B, long N, long D, long pieces) { \
        residual_back(dz, gate, stride, y, dy, dgate, B, N, D, pieces); \
    } \
    extern "C" void gelu_##name(const T* x, T* y, long count) { gelu(x, y, count); } \
    extern "C" void gelu_back_##name(const T* x, const T* dy, T* dx, long count) { gelu_back(x, dy, dx, count); }

FOR(float, float32)
FOR(bf16, bfloat16)
