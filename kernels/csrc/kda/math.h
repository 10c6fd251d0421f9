// Vector helpers of the KDA kernels: gate functions, reductions and transposes in registers.
#pragma once

#include <utility>

#include "../simd.h"

namespace kimi::KIMI_ISA {

// KDA matrices are cut into panels of kPanel columns, so that one panel's rows are contiguous and fit in L1;
// the matrix kernels hold kRows x kPanelVecs accumulators in registers.
#if defined(__AVX512F__)
constexpr int kRows = 8;
#else
constexpr int kRows = 4;
#endif
constexpr int kPanelVecs = 2;
constexpr int kPanel = kPanelVecs * kLanes;

KIMI_INLINE int round_up(int n, int to) { return (n + to - 1) / to * to; }

// e^x * 2^shift for x in (-limit, 40); exactly 0 at or below -limit. The power of two costs nothing and is exact.
KIMI_INLINE vf exp_shifted(vf x, int shift, float limit) {
  vf c = vmin(vmax(x, splat(-limit)), splat(40.0f));
  vf n = c * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer kept in the low mantissa bits
  vi e = reinterpret_cast<vi>(n) - 0x4b400000;
  n -= 12582912.0f;
  vf r = c - n * 0.693359375f + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  vf y = p * reinterpret_cast<vf>((e + (127 + shift)) << 23);
  y = x <= splat(-limit) ? vf{} : y;
  return x == x ? y : x;
}

// log(1 + y) for y in [0, 1], by the series of atanh(y / (2 + y)): relative error about 1e-7.
KIMI_INLINE vf log1p_unit(vf y) {
  vf s = y / (y + 2.0f);
  vf z = s * s;
  vf p = splat(2.0f / 15.0f);
  p = p * z + 2.0f / 13.0f;
  p = p * z + 2.0f / 11.0f;
  p = p * z + 2.0f / 9.0f;
  p = p * z + 2.0f / 7.0f;
  p = p * z + 2.0f / 5.0f;
  p = p * z + 2.0f / 3.0f;
  return s * (p * z + 2.0f);
}

KIMI_INLINE vf vsoftplus(vf x) {
  vf magnitude = x < vf{} ? x : -x;
  return vmax(x, vf{}) + log1p_unit(vexp(magnitude));
}

// Derivative of the sigmoid, also where the sigmoid rounds to 1.
KIMI_INLINE vf vsigmoid_slope(vf x) {
  vf e = vexp(x < vf{} ? x : -x);
  vf d = e + 1.0f;
  return e / (d * d);
}

// Load or store a whole vector, or the n < kLanes elements that are left of a row.
template <class T>
KIMI_INLINE vf load_upto(const T* p, int n) {
  return n >= kLanes ? load(p) : load_n(p, n);
}
template <class T>
KIMI_INLINE void store_upto(T* p, vf v, int n) {
  if (n >= kLanes) {
    store(p, v);
  } else {
    store_n(p, v, n);
  }
}

// ---- many reductions at once ----

// Lanes of [a | b], cut into segments of kSegment: the lower (or upper) halves of all segments, in order.
template <int kSegment, bool kUpper, int... I>
KIMI_INLINE vf segment_halves(vf a, vf b, std::integer_sequence<int, I...>) {
  constexpr int half = kSegment / 2;
  return __builtin_shufflevector(a, b, (I / half * kSegment + I % half + (kUpper ? half : 0))...);
}
struct Add {
  KIMI_INLINE vf operator()(vf a, vf b) const { return a + b; }
};
struct Max {
  KIMI_INLINE vf operator()(vf a, vf b) const { return vmax(a, b); }
};
template <int kSegment, class Op>
KIMI_INLINE vf fold_segments(vf a, vf b) {
  constexpr std::make_integer_sequence<int, kLanes> lanes{};
  return Op()(segment_halves<kSegment, false>(a, b, lanes), segment_halves<kSegment, true>(a, b, lanes));
}
// v holds kCount vectors whose segments of kSegment lanes are partial results; destroys v.
template <int kCount, int kSegment, class Op>
KIMI_INLINE void fold_all(vf* v) {
  if constexpr (kSegment > 1) {
    constexpr int next = kCount > 1 ? kCount / 2 : 1;
#pragma GCC unroll 16
    for (int i = 0; i < next; ++i) {
      v[i] = fold_segments<kSegment, Op>(v[kCount > 1 ? 2 * i : 0], v[kCount > 1 ? 2 * i + 1 : 0]);
    }
    fold_all<next, kSegment / 2, Op>(v);
  }
}
// Sums (or maxima) of the lanes of kCount <= kLanes vectors (a power of two) into out[kCount]; the order of operations
// of one result does not depend on its place.
template <int kCount, class Op = Add>
KIMI_INLINE void fold_lanes(vf* v, float* out) {
  static_assert(kCount <= kLanes);
  fold_all<kCount, kLanes, Op>(v);
  float t[kLanes];
  store(t, v[0]);
  for (int i = 0; i < kCount; ++i) out[i] = t[i];
}

// ---- transpose kLanes x kLanes in registers ----

template <int kHalf, bool kSecond, int... I>
KIMI_INLINE vf swap_halves(vf a, vf b, std::integer_sequence<int, I...>) {
  if constexpr (!kSecond) {
    return __builtin_shufflevector(a, b, ((I & kHalf) ? kLanes + I - kHalf : I)...);
  } else {
    return __builtin_shufflevector(a, b, ((I & kHalf) ? kLanes + I : I + kHalf)...);
  }
}
template <int kHalf>
KIMI_INLINE void transpose_stage(vf (&r)[kLanes]) {
  constexpr std::make_integer_sequence<int, kLanes> lanes{};
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kHalf) continue;
    vf a = r[i], b = r[i + kHalf];
    r[i] = swap_halves<kHalf, false>(a, b, lanes);
    r[i + kHalf] = swap_halves<kHalf, true>(a, b, lanes);
  }
  if constexpr (kHalf > 1) transpose_stage<kHalf / 2>(r);
}
// to[j * to_row + i] = from[i * from_row + j] for i, j < kLanes.
KIMI_INLINE void transpose_block(const float* from, int64_t from_row, float* to, int64_t to_row) {
  vf r[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) r[i] = load(from + i * from_row);
  transpose_stage<kLanes / 2>(r);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) store(to + i * to_row, r[i]);
}

// ---- matrix kernel: acc[r][n] += sum over d of a[r * a_row + d * a_depth] * b[d * b_depth + n * kLanes] ----
// The additions of one element are made in the order of d whatever kR, so a row's result does not depend on the rows
// computed with it: outputs cannot depend on later tokens, nor on the length of the tile.
template <int kR, int kN>
KIMI_INLINE void multiply_add(vf (&acc)[kR][kN], const float* a, int64_t a_row, int64_t a_depth, const float* b,
                              int64_t b_depth, int depth) {
  for (int d = 0; d < depth; ++d) {
    vf bv[kN];
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) bv[n] = load(b + d * b_depth + n * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) {
      vf x = splat(a[r * a_row + d * a_depth]);
#pragma GCC unroll 4
      for (int n = 0; n < kN; ++n) acc[r][n] += x * bv[n];
    }
  }
}

// Calls f(row, std::integral_constant<int, R>) over groups of rows, R falling to a power of two at the end. The last
// group may reach past `rows` (never past the next multiple of kRows): buffers are padded with zero rows.
template <class F>
KIMI_INLINE void for_row_groups(int rows, F f) {
  int r = 0;
  for (; rows - r > kRows / 2; r += kRows) f(r, std::integral_constant<int, kRows>{});
  if constexpr (kRows >= 8) {
    if (rows - r > 2) {
      f(r, std::integral_constant<int, 4>{});
      return;
    }
  }
  if (rows - r > 1) {
    f(r, std::integral_constant<int, 2>{});
  } else if (rows - r == 1) {
    f(r, std::integral_constant<int, 1>{});
  }
}

}  // namespace kimi::KIMI_ISA
