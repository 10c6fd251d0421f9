// Gated RMSNorm: y = x / rms(x) * weight * act(gate), act = sigmoid or SiLU, and its gradient.
#include <cstdlib>

#include "isa.h"
#include "simd.h"

namespace kimi::KIMI_ISA {
namespace {

// Rows of one backward work item: weight gradients are added in this fixed grouping, whatever the number of threads.
constexpr int64_t kRowsPerPartial = 256;

KIMI_INLINE int lanes_left(int64_t d, int64_t D) { return D - d < kLanes ? int(D - d) : kLanes; }

template <class T>
float reciprocal_rms(const T* x, int64_t D, float eps) {
  vf sum{};
  for (int64_t d = 0; d < D; d += kLanes) {
    vf v = load_n(x + d, lanes_left(d, D));
    sum += v * v;
  }
  return 1.0f / std::sqrt(hsum(sum) / float(D) + eps);
}

template <class T, bool Silu>
void forward(const T* x, const T* gate, const float* weight, T* y, int64_t rows, int64_t D, float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = row * D;
    const vf r = splat(reciprocal_rms(x + at, D, eps));
    for (int64_t d = 0; d < D; d += kLanes) {
      const int m = lanes_left(d, D);
      vf z = load_n(gate + at + d, m), a = vsigmoid(z);
      if (Silu) a *= z;
      store_n(y + at + d, load_n(x + at + d, m) * r * load_n(weight + d, m) * a, m);
    }
  }
}

template <class T, bool Silu>
void backward(const T* x, const T* gate, const float* weight, const T* dy, T* dx, T* dgate, float* dweight,
              int64_t rows, int64_t D, float eps, int threads) {
  const int64_t parts = (rows + kRowsPerPartial - 1) / kRowsPerPartial;
  float* partial = static_cast<float*>(std::calloc(parts * D + 1, sizeof(float)));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t part = 0; part < parts; ++part) {
    float* dw = partial + part * D;
    const int64_t last = (part + 1) * kRowsPerPartial < rows ? (part + 1) * kRowsPerPartial : rows;
    for (int64_t row = part * kRowsPerPartial; row < last; ++row) {
      const int64_t at = row * D;
      const float r = reciprocal_rms(x + at, D, eps);
      vf along{};
      for (int64_t d = 0; d < D; d += kLanes) {
        const int m = lanes_left(d, D);
        vf z = load_n(gate + at + d, m), s = vsigmoid(z), g = load_n(dy + at + d, m);
        vf unit = load_n(x + at + d, m) * r, w = load_n(weight + d, m);
        vf act = Silu ? z * s : s;
        vf slope = Silu ? s + z * s * (1.0f - s) : s * (1.0f - s);
        along += g * w * act * unit;
        store_n(dw + d, load_n(dw + d, m) + g * act * unit, m);
        store_n(dgate + at + d, g * w * unit * slope, m);
      }
      const float mean = hsum(along) / float(D);
      for (int64_t d = 0; d < D; d += kLanes) {
        const int m = lanes_left(d, D);
        vf z = load_n(gate + at + d, m), act = vsigmoid(z);
        if (Silu) act *= z;
        vf unit = load_n(x + at + d, m) * r;
        store_n(dx + at + d, (load_n(dy + at + d, m) * load_n(weight + d, m) * act - unit * mean) * r, m);
      }
    }
  }
  std::memset(dweight, 0, D * sizeof(float));
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t d = 0; d < D; ++d) dweight[d] += partial[part * D + d];
  std::free(partial);
}

template <class T>
void forward_any(const void* x, const void* gate, const float* weight, void* y, int64_t rows, int64_t D, float eps,
                 bool silu, int threads) {
  auto run = silu ? &forward<T, true> : &forward<T, false>;
  run(static_cast<const T*>(x), static_cast<const T*>(gate), weight, static_cast<T*>(y), rows, D, eps, threads);
}

template <class T>
void backward_any(const void* x, const void* gate, const float* weight, const void* dy, void* dx, void* dgate,
                  float* dweight, int64_t rows, int64_t D, float eps, bool silu, int threads) {
  auto run = silu ? &backward<T, true> : &backward<T, false>;
  run(static_cast<const T*>(x), static_cast<const T*>(gate), weight, static_cast<const T*>(dy), static_cast<T*>(dx),
      static_cast<T*>(dgate), dweight, rows, D, eps, threads);
}

}  // namespace

// All [rows, D] contiguous; weight [D] fp32; silu: 0 sigmoid, 1 SiLU.
void rmsnorm_gated_forward(const void* x, const void* gate, const float* weight, void* y, int64_t rows, int64_t D,
                           float eps, int64_t silu, int64_t dtype, int64_t threads) {
  auto run = dtype == 0 ? &forward_any<float> : &forward_any<bf16>;
  run(x, gate, weight, y, rows, D, eps, silu != 0, int(threads));
}
KIMI_EXPORT(rmsnorm_gated_forward);

void rmsnorm_gated_backward(const void* x, const void* gate, const float* weight, const void* dy, void* dx, void* dgate,
                            float* dweight, int64_t rows, int64_t D, float eps, int64_t silu, int64_t dtype,
                            int64_t threads) {
  auto run = dtype == 0 ? &backward_any<float> : &backward_any<bf16>;
  run(x, gate, weight, dy, dx, dgate, dweight, rows, D, eps, silu != 0, int(threads));
}
KIMI_EXPORT(rmsnorm_gated_backward);

}  // namespace kimi::KIMI_ISA
