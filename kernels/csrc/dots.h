// Small register-blocked products of rows: the inner loops of matrix products whose operands are both stored by rows.
#pragma once

#include <type_traits>
#include <utility>

#include "simd.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace kimi::KIMI_ISA {

// A block of kRowBlock x kColBlock sums fits the registers and fills whole vectors when it is reduced.
constexpr int kRowBlock = 4;
#if defined(__AVX512F__)
constexpr int kColBlock = 4;
#else
constexpr int kColBlock = 2;
#endif

// The type in which the left rows of a product with weights of type W are held: bf16 where the CPU multiplies pairs of
// bf16 (with fp32 sums), else fp32.
#if defined(__AVX512BF16__)
template <class W>
using Left = W;
#else
template <class W>
using Left = float;
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

// ---- one step of a sum: a vector of the left row times a vector of the right row, onto fp32 sums ----

template <class A, class B>
struct Multiply {
  static constexpr int kCount = kLanes;  // products in a step
  using Vector = vf;
  static KIMI_INLINE vf left(const A* p) { return load(p); }
  static KIMI_INLINE vf right(const B* p) { return load(p); }
  static KIMI_INLINE vf left_n(const A* p, int n) { return load_n(p, n); }
  static KIMI_INLINE vf right_n(const B* p, int n) { return load_n(p, n); }
  static KIMI_INLINE vf add(vf sum, vf a, vf b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
template <>
struct Multiply<bf16, bf16> {
  static constexpr int kCount = 2 * kLanes;
  using Vector = __m512bh;
  static KIMI_INLINE Vector left(const bf16* p) { return reinterpret_cast<Vector>(_mm512_loadu_si512(p)); }
  static KIMI_INLINE Vector right(const bf16* p) { return left(p); }
  static KIMI_INLINE Vector left_n(const bf16* p, int n) {
    return reinterpret_cast<Vector>(_mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << n) - 1), p));
  }
  static KIMI_INLINE Vector right_n(const bf16* p, int n) { return left_n(p, n); }
  static KIMI_INLINE vf add(vf sum, Vector a, Vector b) {
    return reinterpret_cast<vf>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), a, b));
  }
};
#endif

// c[r * ldc + n] = <a row r, b row n> for R rows of a and C <= kColBlock rows of b. The order of the additions in one sum
// depends on K alone, never on R or C: a row gives the same bits in any company.
template <int R, int C, class A, class B>
KIMI_INLINE void dots_block(const A* a, int64_t lda, const B* b, int64_t ldb, int64_t K, float* c, int64_t ldc) {
  using S = Multiply<A, B>;
  vf acc[kRowBlock * kColBlock] = {};
  int64_t k = 0;
  for (; k + S::kCount <= K; k += S::kCount) {
    typename S::Vector right[C];
#pragma GCC unroll 4
    for (int n = 0; n < C; ++n) {
      right[n] = S::right(b + n * ldb + k);
      // One or two rows of a wait for memory: ask for the next block of b's rows (15 % faster from DRAM on Zen 4).
      if (R <= 2) __builtin_prefetch(b + (n + C) * ldb + k);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const auto left = S::left(a + r * lda + k);
#pragma GCC unroll 4
      for (int n = 0; n < C; ++n) acc[r * kColBlock + n] = S::add(acc[r * kColBlock + n], left, right[n]);
    }
  }
  if (k < K) {
    const int m = int(K - k);
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < C; ++n)
        acc[r * kColBlock + n] =
            S::add(acc[r * kColBlock + n], S::left_n(a + r * lda + k, m), S::right_n(b + n * ldb + k, m));
  }
  float sums[kRowBlock * kColBlock];
#pragma GCC unroll 4
  for (int i = 0; i < kRowBlock * kColBlock; i += kLanes) store(sums + i, sum_each(acc + i));
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < C; ++n) c[r * ldc + n] = sums[r * kColBlock + n];
}

template <int C, class A, class B>
KIMI_INLINE void dots_columns(const A* a, int64_t lda, int64_t R, const B* b, int64_t ldb, int64_t K, float* c,
                              int64_t ldc) {
  int64_t r = 0;
  for (; r + 4 <= R; r += 4) dots_block<4, C>(a + r * lda, lda, b, ldb, K, c + r * ldc, ldc);
  a += r * lda;
  c += r * ldc;
  if (R - r == 3) dots_block<3, C>(a, lda, b, ldb, K, c, ldc);
  if (R - r == 2) dots_block<2, C>(a, lda, b, ldb, K, c, ldc);
  if (R - r == 1) dots_block<1, C>(a, lda, b, ldb, K, c, ldc);
}

// c[r * ldc + n] = <a row r, b row n>, r < R, n < N.
template <class A, class B>
void dots(const A* a, int64_t lda, int64_t R, const B* b, int64_t ldb, int64_t N, int64_t K, float* c, int64_t ldc) {
  int64_t n = 0;
  for (; n + kColBlock <= N; n += kColBlock) dots_columns<kColBlock>(a, lda, R, b + n * ldb, ldb, K, c + n, ldc);
  for (; n < N; ++n) dots_columns<1>(a, lda, R, b + n * ldb, ldb, K, c + n, ldc);
}

// Rows [R, K] at the given stride as a left operand: in place where their type is the right one, else copied to `to`.
template <class L, class T>
KIMI_INLINE const L* left_rows(const T* x, int64_t stride, int64_t R, int64_t K, L* to, int64_t* ld) {
  if constexpr (std::is_same_v<L, T>) {
    *ld = stride;
    return x;
  } else {
    for (int64_t r = 0; r < R; ++r)
      for (int64_t k = 0; k < K; k += kLanes) {
        const int m = K - k < kLanes ? int(K - k) : kLanes;
        store_n(to + r * K + k, load_n(x + r * stride + k, m), m);
      }
    *ld = K;
    return to;
  }
}

}  // namespace kimi::KIMI_ISA
