// Products of rows with matrices. calls.py says what the functions compute. B batch, N tokens, K features or tokens that are
// summed over, O columns, M components of a sample's own. Sums are float.
#include "products.hpp"

namespace {

template <class T>
void multiply(const T* a, long apart, const T* b, long along, long across, Unit<T>* packed, const T* h, long stride,
              const T* u, const T* bias, T* y, long y_apart, long B, long on, long N, long K, long O, long M) {
    const long strips = up(O, STRIP), size = up(K, PAIR<T>) * STRIP, own_size = up(M, PAIR<T>) * STRIP;
    Unit<T>* packed_own = packed + strips * size;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (long s = 0; s < strips; s++) {
            const long o = s * STRIP, n = std::min(STRIP, O - o);
            pack(b + o * across, along, across, K, n, up(n, W), packed + s * size);
            for (long sample = 0; sample < on; sample++)
                pack(u + sample * M * O + o, O, 1, M, n, up(n, W), packed_own + (sample * strips + s) * own_size);
        }
#pragma omp for collapse(2) schedule(static)
        for (long sample = 0; sample < B; sample++)
            for (long first = 0; first < N; first += BLOCK)
                rows_times(a, apart, K, packed, y, y_apart, O, sample * N + first, sample * N + std::min(N, first + BLOCK), h,
                           stride, sample < on ? M : 0, packed_own + sample * strips * own_size, bias);
    }
}

}  // namespace

#define FOR(T, name) \
    extern "C" void multiply_##name(const T* a, long apart, const T* b, long along, long across, Unit<T>* packed, \
                                    const T* h, long stride, const T* u, const T* bias, T* y, long y_apart, long B, \
                                    long on, long N, long K, long O, long M) { \
        multiply(a, apart, b, along, across, packed, h, stride, u, bias, y, y_apart, B, on, N, K, O, M); \
    } \
    extern "C" void multiply_turned_##name(const T* a, long a_apart, const T* b, long b_apart, Unit<T>* packed_a, \
                                  Unit<T>* packed_b, float* g, long rows, long R, long O) { \
        _Pragma("omp parallel") over_rows(a, a_apart, b, b_apart, packed_a, packed_b, g, rows, R, O); \
    }

FOR(float, float32)
FOR(bf16, bfloat16)
