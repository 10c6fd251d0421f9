// out[b, t] = w[b] x[b, t] for a few tokens: the projections of a decode step, and its products per head and gate.
#include <cstdlib>

#include "dots.h"
#include "isa.h"
#include "kernels.h"
#include "simd.h"

namespace kimi::KIMI_ISA {
namespace {

constexpr int64_t kBlock = 64;  // rows of w in a work item

template <class T>
void linear(const LinearArgs& a, const T* x, const T* w, T* out, int threads) {
  const int64_t K = a.K, N = a.N, tokens = a.tokens, blocks = (N + kBlock - 1) / kBlock;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float* sums = static_cast<float*>(std::aligned_alloc(64, (tokens * (K + kBlock) * sizeof(float) + 127) / 64 * 64));
    Left<T>* copied = reinterpret_cast<Left<T>*>(sums + tokens * kBlock);
    const Left<T>* rows = nullptr;
    int64_t held = -1, ld = 0;
#pragma omp for schedule(static)
    for (int64_t item = 0; item < a.B * blocks; ++item) {
      const int64_t b = item / blocks, first = item % blocks * kBlock, n = N - first < kBlock ? N - first : kBlock;
      if (b != held) {
        held = b;
        rows = left_rows(x + b * a.x_batch, a.x_token, tokens, K, copied, &ld);
      }
      dots(rows, ld, tokens, w + b * a.w_batch + first * K, K, n, K, sums, kBlock);
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t i = 0; i < n; i += kLanes) {
          const int m = n - i < kLanes ? int(n - i) : kLanes;
          store_n(out + b * a.out_batch + t * a.out_token + first + i, load_n(sums + t * kBlock + i, m), m);
        }
    }
    std::free(sums);
  }
}

}  // namespace

void batched_linear(const LinearArgs* a) {
  const int team = a->B * a->tokens * a->K * a->N < 1 << 17 ? 1 : int(a->threads);
  if (a->dtype == 0) {
    linear(*a, static_cast<const float*>(a->x), static_cast<const float*>(a->w), static_cast<float*>(a->out), team);
  } else {
    linear(*a, static_cast<const bf16*>(a->x), static_cast<const bf16*>(a->w), static_cast<bf16*>(a->out), team);
  }
}
KIMI_EXPORT(batched_linear);

}  // namespace kimi::KIMI_ISA
