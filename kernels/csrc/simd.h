// Vectors of fp32 written once for every instruction set (GCC/Clang vector extensions), with fp32 and bf16 memory.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace kimi::KIMI_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using vf = float __attribute__((vector_size(kLanes * 4)));
using vi = int32_t __attribute__((vector_size(kLanes * 4)));
using vu = uint32_t __attribute__((vector_size(kLanes * 4)));
using vh = uint16_t __attribute__((vector_size(kLanes * 2)));

// bf16 as stored in memory: the upper half of an fp32.
struct bf16 {
  uint16_t bits;
};

#define KIMI_INLINE inline __attribute__((always_inline))

KIMI_INLINE vf splat(float x) { return x - vf{}; }
KIMI_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
KIMI_INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }

// ---- memory: the pointer needs no alignment; the _n forms touch n <= kLanes elements and read zeros past them ----

KIMI_INLINE vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
KIMI_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

KIMI_INLINE vf load(const bf16* p) {
  vh h;
  std::memcpy(&h, p, sizeof h);
  return reinterpret_cast<vf>(__builtin_convertvector(h, vu) << 16);
}
// Round to nearest even; NaN stays NaN.
KIMI_INLINE vh to_bf16(vf v) {
  vu u = reinterpret_cast<vu>(v);
  vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  vu nan = (u >> 16) | 0x40u;
  return __builtin_convertvector(v == v ? rounded : nan, vh);
}
KIMI_INLINE void store(bf16* p, vf v) {
  vh h = to_bf16(v);
  std::memcpy(p, &h, sizeof h);
}

template <class T>
KIMI_INLINE vf load_n(const T* p, int n) {
  if (__builtin_expect(n == kLanes, 1)) return load(p);
  T tmp[kLanes] = {};
  std::memcpy(tmp, p, n * sizeof(T));
  return load(tmp);
}
template <class T>
KIMI_INLINE void store_n(T* p, vf v, int n) {
  if (__builtin_expect(n == kLanes, 1)) return store(p, v);
  T tmp[kLanes];
  store(tmp, v);
  std::memcpy(p, tmp, n * sizeof(T));
}

KIMI_INLINE float to_float(float x) { return x; }
KIMI_INLINE float to_float(bf16 x) {
  uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
KIMI_INLINE void put(float* p, float x) { *p = x; }
KIMI_INLINE void put(bf16* p, float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  p->bits = x == x ? uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16) : uint16_t((u >> 16) | 0x40u);
}

// ---- reductions, always in the same order ----

KIMI_INLINE float hsum(vf v) {
  float t[kLanes];
  store(t, v);
  for (int w = kLanes / 2; w > 0; w /= 2)
    for (int i = 0; i < w; ++i) t[i] += t[i + w];
  return t[0];
}
KIMI_INLINE float hmax(vf v) {
  float t[kLanes];
  store(t, v);
  for (int w = kLanes / 2; w > 0; w /= 2)
    for (int i = 0; i < w; ++i) t[i] = t[i] > t[i + w] ? t[i] : t[i + w];
  return t[0];
}

// ---- functions ----

// e^x within 1 ulp; 0 below -86.6, +inf above 88.73, NaN for NaN.
KIMI_INLINE vf vexp(vf x) {
  const vf low = splat(-86.6f), high = splat(88.9f);
  vf c = x > high ? high : x;  // in this order NaN passes through
  c = c < low ? low : c;
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
  // By 2^(e - 1), then by 2: e reaches 128, where 2^e alone has left the range of fp32.
  vf y = p * reinterpret_cast<vf>((e + 126) << 23) * 2.0f;
  return x < low ? vf{} : y;
}

KIMI_INLINE vf vsigmoid(vf x) { return 1.0f / (1.0f + vexp(-x)); }

}  // namespace kimi::KIMI_ISA
