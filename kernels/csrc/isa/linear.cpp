// out[b, t] = w[b] x[b, t] for a few tokens: the small per-head and per-gate products of a decode step.
#include <cstdlib>

#include "dots.h"
#include "isa.h"
#include "simd.h"

namespace kimi::KIMI_ISA {
namespace {

constexpr int64_t kBlock = 64;  // rows of w in a work item

template <class T>
void linear(const T* x, const T* w, T* out, int64_t B, int64_t tokens, int64_t K, int64_t N, int64_t x_batch,
            int64_t x_token, int64_t w_batch, int threads) {
  const int64_t blocks = (N + kBlock - 1) / kBlock;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float* sums = static_cast<float*>(std::aligned_alloc(64, (tokens * (K + kBlock) * sizeof(float) + 127) / 64 * 64));
    Left<T>* copied = reinterpret_cast<Left<T>*>(sums + tokens * kBlock);
    const Left<T>* rows = nullptr;
    int64_t held = -1, ld = 0;
#pragma omp for schedule(static)
    for (int64_t item = 0; item < B * blocks; ++item) {
      const int64_t b = item / blocks, first = item % blocks * kBlock, n = N - first < kBlock ? N - first : kBlock;
      if (b != held) {
        held = b;
        rows = left_rows(x + b * x_batch, x_token, tokens, K, copied, &ld);
      }
      dots(rows, ld, tokens, w + b * w_batch + first * K, K, n, K, sums, kBlock);
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t i = 0; i < n; i += kLanes) {
          const int m = n - i < kLanes ? int(n - i) : kLanes;
          store_n(out + (b * tokens + t) * N + first + i, load_n(sums + t * kBlock + i, m), m);
        }
    }
    std::free(sums);
  }
}

}  // namespace

// x [B, T, K] and w [B, N, K] with contiguous rows and the given strides; out [B, T, N].
void batched_linear(const void* x, const void* w, void* out, int64_t B, int64_t tokens, int64_t K, int64_t N,
                    int64_t x_batch, int64_t x_token, int64_t w_batch, int64_t dtype, int64_t threads) {
  const int team = B * tokens * K * N < 1 << 17 ? 1 : int(threads);
  if (dtype == 0) {
    linear(static_cast<const float*>(x), static_cast<const float*>(w), static_cast<float*>(out), B, tokens, K, N,
           x_batch, x_token, w_batch, team);
  } else {
    linear(static_cast<const bf16*>(x), static_cast<const bf16*>(w), static_cast<bf16*>(out), B, tokens, K, N, x_batch,
           x_token, w_batch, team);
  }
}
KIMI_EXPORT(batched_linear);

}  // namespace kimi::KIMI_ISA
