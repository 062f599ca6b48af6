// Attention of each head, head by head in a thread's own cache. functions.py says what the functions compute. B batch, H heads,
// N tokens, E features of a head; tokens' rows of all heads, which are `apart` from each other. Sums are float.
#include "products.hpp"

namespace {

// In place: the softmax of a row of N scores, times `scale` before it.
template <class T>
inline void softmax(T* row, long N, float scale, float* powers) {
    Vec tops = Vec{} - INFINITY, sums = {};
    by_vectors(0, N, [&](long i, long n) {
        Vec a = load(row + i, n) * scale;
        tops = larger(tops, only(a, n, -INFINITY));
        store(powers + i, a, n);
    });
    float top = tops[0];
    for (long i = 1; i < W; i++) top = std::max(top, tops[i]);
    by_vectors(0, N, [&](long i, long n) {
        Vec a = load(powers + i, n) - top, power = exponential<T>(larger(Vec{} - 87.0f, a));
        power = a == a ? power : a;
        sums += only(power, n);
        store(powers + i, power, n);
    });
    float inverse = 1 / total(sums);
    by_vectors(0, N, [&](long i, long n) { store(row + i, load(powers + i, n) * inverse, n); });
}

// In place of the gradients of shares, which the softmax gave: those of the scores.
template <class T>
inline void softmax_back(T* row, const T* shares, long N, float scale) {
    Vec sums = {};
    by_vectors(0, N, [&](long i, long n) { sums += load(row + i, n) * load(shares + i, n); });
    float mean = total(sums);
    by_vectors(0, N, [&](long i, long n) { store(row + i, (load(row + i, n) - mean) * load(shares + i, n) * scale, n); });
}

// b (K, O) in strips, whose rows are `along` and columns `across` apart
template <class T>
inline void pack_strips(const T* b, long along, long across, long K, long O, Unit<T>* to) {
    for (long o = 0; o < O; o += STRIP) {
        const long n = std::min(STRIP, O - o);
        pack(b + o * across, along, across, K, n, up(n, W), to + o * up(K, PAIR<T>));
    }
}

// y (R, O) = a^T b of N rows, b packed
template <class T>
inline void multiply_turned(const T* a, long apart, long R, const Unit<T>* b, T* y, long y_apart, long O, long N, Unit<T>* some) {
    for (long first = 0; first < R; first += HIGH) {
        const long high = std::min(HIGH, R - first);
        if (first % W == 0) pack(a + first, apart, 1, N, std::min(W, R - first), 1, some);
        for (long o = 0; o < O; o += STRIP) {
            const long n = std::min(STRIP, O - o);
            for_width<WIDE>(up(n, W), [&](auto width) {
                constexpr long C = decltype(width)::value;
                Vec sums[HIGH][C];
                clear(sums);
                sum<T, HIGH, C>(sums, up(N, PAIR<T>), [&](long r, long s) { return some[s * W + first % W + r]; },
                                b + o * up(N, PAIR<T>));
                each<HIGH, C>(n, high, [&](long r, long c, long width) {
                    store(y + (first + r) * y_apart + o + c * W, sums[r][c], width);
                });
            });
        }
    }
}

constexpr long padded(long O) { return up(O, STRIP) * STRIP; }

// Bytes of scratch of a thread that has `rows` rows of scores
template <class T>
long scratch(long N, long E, long rows) {
    return up(sizeof(T) * rows * N + 4 * (up(N, PAIR<T>) * (2 * padded(E) + W) + up(E, PAIR<T>) * padded(N) + N), 64) * 64;
}

// shares = softmax(scale q k^T), o = shares v; without `shares` nobody else is to see them
template <class T>
void attention(const T* q, const T* k, const T* v, T* shares, T* o, char* scratch_of_all,
               long B, long N, long H, long E, float scale) {
#pragma omp parallel
    {
        T* some = (T*)(scratch_of_all + omp_get_thread_num() * scratch<T>(N, E, BLOCK));
        Unit<T>* by_keys = (Unit<T>*)((char*)some + up(sizeof(T) * BLOCK * N, 4) * 4);
        Unit<T>* by_values = by_keys + up(E, PAIR<T>) * padded(N);
        float* powers = (float*)(by_values + up(N, PAIR<T>) * padded(E));
#pragma omp for schedule(static)
        for (long head = 0; head < B * H; head++) {
            const long apart = H * E, to = head / H * N * apart + head % H * E;
            pack_strips(k + to, 1, apart, E, N, by_keys);
            pack_strips(v + to, apart, 1, N, E, by_values);
            for (long first = 0; first < N; first += BLOCK) {
                const long count = std::min(BLOCK, N - first), from = to + first * apart;
                T* own = shares ? shares + (head * N + first) * N : some;
                rows_times(q + from, apart, E, by_keys, own, N, N, 0, count);
                for (long t = 0; t < count; t++) softmax(own + t * N, N, scale, powers);
                rows_times(own, N, N, by_values, o + from, apart, E, 0, count);
            }
        }
    }
}

template <class T>
void attention_back(const T* q, const T* k, const T* v, const T* shares, const T* d,
                    T* dq, T* dk, T* dv, char* scratch_of_all, long B, long N, long H, long E, float scale) {
#pragma omp parallel
    {
        T* ds = (T*)(scratch_of_all + omp_get_thread_num() * scratch<T>(N, E, N));
        Unit<T>* by_values = (Unit<T>*)((char*)ds + up(sizeof(T) * N * N, 4) * 4);
        Unit<T>*by_token = by_values + up(E, PAIR<T>) * padded(N), *some = by_token + up(N, PAIR<T>) * padded(E);
#pragma omp for schedule(static)
        for (long head = 0; head < B * H; head++) {
            const long apart = H * E, to = head / H * N * apart + head % H * E;
            const T* own = shares + head * N * N;
            pack_strips(v + to, 1, apart, E, N, by_values);
            pack_strips(k + to, apart, 1, N, E, by_token);
            for (long first = 0; first < N; first += BLOCK) {
                const long end = std::min(N, first + BLOCK);
                rows_times(d + to, apart, E, by_values, ds, N, N, first, end);
                for (long t = first; t < end; t++) softmax_back(ds + t * N, own + t * N, N, scale);
                rows_times(ds, N, N, by_token, dq + to, apart, E, first, end);
            }
            pack_strips(q + to, apart, 1, N, E, by_token);
            multiply_turned(ds, N, N, by_token, dk + to, apart, E, N, some);
            pack_strips(d + to, apart, 1, N, E, by_token);
            multiply_turned(own, N, N, by_token, dv + to, apart, E, N, some);
        }
    }
}

}  // namespace

#define FOR(T, name) \
    extern "C" long attention_scratch_##name(long N, long E, long back) { return scratch<T>(N, E, back ? N : BLOCK); } \
    extern "C" void attention_##name(const T* q, const T* k, const T* v, T* shares, \
                                     T* o, char* scratch, long B, long N, long H, long E, float scale) { \
        attention(q, k, v, shares, o, scratch, B, N, H, E, scale); \
    } \
    extern "C" void attention_back_##name(const T* q, const T* k, const T* v, \
                                          const T* shares, const T* d, T* dq, T* dk, T* dv, char* scratch, long B, long N, \
                                          long H, long E, float scale) { \
        attention_back(q, k, v, shares, d, dq, dk, dv, scratch, B, N, H, E, scale); \
    }

FOR(float, float32)
FOR(bf16, bfloat16)
