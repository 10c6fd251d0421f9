// Small register-blocked products of rows: the inner loops of matrix products whose operands are both stored by rows.
#pragma once

#include <utility>

#include "simd.h"

namespace kimi::KIMI_ISA {

// A block of kRowBlock x kColBlock sums fits the registers and fills whole vectors when it is reduced.
constexpr int kRowBlock = 4;
#if defined(__AVX512F__)
constexpr int kColBlock = 4;
#else
constexpr int kColBlock = 2;
#endif

// Lane of (a, b) that goes to lane i when groups of W lanes are halved: first halves, those of a before those of b.
constexpr int fold_lane(int W, int i) {
  const int j = i % (kLanes / 2);
  return j / (W / 2) * W + j % (W / 2) + i / (kLanes / 2) * kLanes;
}

template <int W, int... I>
KIMI_INLINE vf fold(vf a, vf b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, fold_lane(W, I)...) +
         __builtin_shufflevector(a, b, (fold_lane(W, I) + W / 2)...);
}
// Halve groups of W lanes by adding their halves: those of a, then those of b.
template <int W>
KIMI_INLINE vf fold(vf a, vf b) {
  return fold<W>(a, b, std::make_integer_sequence<int, kLanes>());
}

// Lane i of the result is the sum of the lanes of v[i]; v has kLanes vectors and is overwritten.
KIMI_INLINE vf sum_each(vf* v) {
  if constexpr (kLanes == 16) {
    for (int i = 0; i < 8; ++i) v[i] = fold<16>(v[2 * i], v[2 * i + 1]);
    for (int i = 0; i < 4; ++i) v[i] = fold<8>(v[2 * i], v[2 * i + 1]);
  } else if constexpr (kLanes == 8) {
    for (int i = 0; i < 4; ++i) v[i] = fold<8>(v[2 * i], v[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) v[i] = fold<4>(v[2 * i], v[2 * i + 1]);
  return fold<2>(v[0], v[1]);
}

// c[r * ldc + n] = <a row r, b row n> for R rows of a (fp32) and kColBlock rows of b. The order of the additions in one
// sum depends on K alone, never on R: a row gives the same bits in any company.
template <int R, class B>
KIMI_INLINE void dots_block(const float* a, int64_t lda, const B* b, int64_t ldb, int64_t K, float* c, int64_t ldc) {
  vf acc[kRowBlock * kColBlock] = {};
  int64_t k = 0;
  for (; k + kLanes <= K; k += kLanes) {
    vf right[kColBlock];
#pragma GCC unroll 4
    for (int n = 0; n < kColBlock; ++n) {
      right[n] = load(b + n * ldb + k);
      // One or two rows of a wait for memory: ask for the next block of b's rows (15 % faster from DRAM on Zen 4).
      if (R <= 2) __builtin_prefetch(b + (n + kColBlock) * ldb + k);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      vf left = load(a + r * lda + k);
#pragma GCC unroll 4
      for (int n = 0; n < kColBlock; ++n) acc[r * kColBlock + n] += left * right[n];
    }
  }
  if (k < K) {
    const int m = int(K - k);
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < kColBlock; ++n)
        acc[r * kColBlock + n] += load_n(a + r * lda + k, m) * load_n(b + n * ldb + k, m);
  }
  float sums[kRowBlock * kColBlock];
#pragma GCC unroll 4
  for (int i = 0; i < kRowBlock * kColBlock; i += kLanes) store(sums + i, sum_each(acc + i));
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < kColBlock; ++n) c[r * ldc + n] = sums[r * kColBlock + n];
}

// c[r * ldc + n] = <a row r, b row n>, r < R (any), n < N (a multiple of kColBlock).
template <class B>
void dots(const float* a, int64_t lda, int64_t R, const B* b, int64_t ldb, int64_t N, int64_t K, float* c,
          int64_t ldc) {
  for (int64_t n = 0; n < N; n += kColBlock) {
    const B* right = b + n * ldb;
    int64_t r = 0;
    for (; r + 4 <= R; r += 4) dots_block<4>(a + r * lda, lda, right, ldb, K, c + r * ldc + n, ldc);
    const float* left = a + r * lda;
    float* to = c + r * ldc + n;
    if (R - r == 3) dots_block<3>(left, lda, right, ldb, K, to, ldc);
    if (R - r == 2) dots_block<2>(left, lda, right, ldb, K, to, ldc);
    if (R - r == 1) dots_block<1>(left, lda, right, ldb, K, to, ldc);
  }
}

}  // namespace kimi::KIMI_ISA
