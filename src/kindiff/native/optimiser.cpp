// Adam of named rows of many banks, in one pass over memory. optimiser.py says what it computes.
#include "vectors.hpp"

// Of `count` banks, bank j's rows are numbers offsets[j] to offsets[j + 1] of a row of the moments. Row i of n: gradients' row
// from[i], the banks' and moments' row rows[i]; a bank without a gradient has none but zeros.
extern "C" void adam_rows(const float* const* gradients, float* const* banks, const int64_t* offsets, const int64_t* rows,
                          const int64_t* from, const float* steps, float* mean, float* square, long n, long count, float rate,
                          float beta, float square_beta, float eps) {
#pragma omp parallel for collapse(2) schedule(static)
    for (long i = 0; i < n; i++)
        for (long j = 0; j < count; j++) {
            const long row = rows[i], width = offsets[j + 1] - offsets[j], at = row * offsets[count] + offsets[j];
            const float* gradient = gradients[j] ? gradients[j] + from[i] * width : nullptr;
            const double step = steps[row];
            const float size = rate / (1 - std::pow((double)beta, step));
            const float root = std::sqrt(1 - std::pow((double)square_beta, step));
            by_vectors(0, width, [&](long k, long w) {
                float *m = mean + at + k, *q = square + at + k, *value = banks[j] + row * width + k;
                Vec g = gradient ? load(gradient + k, w) : Vec{}, first = load(m, w), second = load(q, w), roots;
                first += (g - first) * (1 - beta);
                second += (g * g - second) * (1 - square_beta);
                for (long lane = 0; lane < W; lane++) roots[lane] = std::sqrt(second[lane]);
                store(m, first, w);
                store(q, second, w);
                store(value, load(value, w) - size * first / (roots / root + eps), w);
            });
        }
}
