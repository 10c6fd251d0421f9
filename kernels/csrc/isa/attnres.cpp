// Attention Residuals: softmax over depth between a learned query and the RMS-normalised sources, mixing the
// sources as they are. One pass serves S queries; the gains of the key norm are folded into the queries beforehand.
#include <cstdlib>

#include "isa.h"
#include "simd.h"

namespace kimi::KIMI_ISA {
namespace {

// Rows of one backward work item: the partial sums of the query gradient are added in this fixed grouping, so that
// the result does not depend on the number of threads.
constexpr int64_t kRowsPerPartial = 64;

float* buffer(int64_t count) { return static_cast<float*>(std::malloc(sizeof(float) * (count > 0 ? count : 1))); }

// <v, v>
template <class T>
float sum_squares(const T* v, int64_t D) {
  vf a{}, b{};
  int64_t d = 0;
  for (; d + 2 * kLanes <= D; d += 2 * kLanes) {
    vf x = load(v + d), y = load(v + d + kLanes);
    a += x * x;
    b += y * y;
  }
  for (; d < D; d += kLanes) {
    vf x = load_n(v + d, D - d < kLanes ? int(D - d) : kLanes);
    a += x * x;
  }
  return hsum(a + b);
}

// <v, w>
template <class T, class U>
float dot(const T* v, const U* w, int64_t D) {
  vf a{}, b{};
  int64_t d = 0;
  for (; d + 2 * kLanes <= D; d += 2 * kLanes) {
    a += load(v + d) * load(w + d);
    b += load(v + d + kLanes) * load(w + d + kLanes);
  }
  for (; d < D; d += kLanes) {
    int n = D - d < kLanes ? int(D - d) : kLanes;
    a += load_n(v + d, n) * load_n(w + d, n);
  }
  return hsum(a + b);
}

// <v, v> and <v, w> in one pass.
template <class T>
void moments(const T* v, const float* w, int64_t D, float* squares, float* along) {
  vf a{}, b{}, p{}, q{};
  int64_t d = 0;
  for (; d + 2 * kLanes <= D; d += 2 * kLanes) {
    vf x = load(v + d), y = load(v + d + kLanes);
    a += x * x;
    b += y * y;
    p += x * load(w + d);
    q += y * load(w + d + kLanes);
  }
  for (; d < D; d += kLanes) {
    int n = D - d < kLanes ? int(D - d) : kLanes;
    vf x = load_n(v + d, n);
    a += x * x;
    p += x * load_n(w + d, n);
  }
  *squares = hsum(a + b);
  *along = hsum(p + q);
}

// Softmax weights of one row: weight[s * n + i], the reciprocal RMS of each source, the raw <query, v>, and lse[s].
template <class T>
void row_weights(const T* const* source, int64_t n, int64_t row, const float* query, int64_t S, int64_t D, float eps,
                 float* weight, float* rrms, float* raw, float* lse) {
  for (int64_t i = 0; i < n; ++i) {
    const T* v = source[i] + row * D;
    float squares;
    moments(v, query, D, &squares, raw + i);
    rrms[i] = 1.0f / std::sqrt(squares / float(D) + eps);
    for (int64_t s = 1; s < S; ++s) raw[s * n + i] = dot(v, query + s * D, D);
  }
  for (int64_t s = 0; s < S; ++s) {
    float top = -INFINITY, total = 0;
    for (int64_t i = 0; i < n; ++i) {
      float logit = raw[s * n + i] * rrms[i];
      weight[s * n + i] = logit;
      top = logit > top ? logit : top;
    }
    for (int64_t i = 0; i < n; ++i) total += weight[s * n + i] = std::exp(weight[s * n + i] - top);
    for (int64_t i = 0; i < n; ++i) weight[s * n + i] /= total;
    lse[s] = top + std::log(total);
  }
}

// out[d] = sum_i weight[i] * source_i[d]
template <class T, class U>
void mix(const T* const* source, int64_t n, int64_t row, const float* weight, int64_t D, U* out) {
  int64_t d = 0;
  for (; d + 4 * kLanes <= D; d += 4 * kLanes) {
    vf a0{}, a1{}, a2{}, a3{};
    for (int64_t i = 0; i < n; ++i) {
      const T* v = source[i] + row * D + d;
      vf w = splat(weight[i]);
      a0 += w * load(v);
      a1 += w * load(v + kLanes);
      a2 += w * load(v + 2 * kLanes);
      a3 += w * load(v + 3 * kLanes);
    }
    store(out + d, a0);
    store(out + d + kLanes, a1);
    store(out + d + 2 * kLanes, a2);
    store(out + d + 3 * kLanes, a3);
  }
  for (; d < D; d += kLanes) {
    int m = D - d < kLanes ? int(D - d) : kLanes;
    vf a{};
    for (int64_t i = 0; i < n; ++i) a += splat(weight[i]) * load_n(source[i] + row * D + d, m);
    store_n(out + d, a, m);
  }
}

// out = RMSNorm(v) * gain
template <class T>
void rms_norm(const float* v, const float* gain, int64_t D, float eps, T* out) {
  vf r = splat(1.0f / std::sqrt(sum_squares(v, D) / float(D) + eps));
  for (int64_t d = 0; d < D; d += kLanes) {
    int m = D - d < kLanes ? int(D - d) : kLanes;
    store_n(out + d, load_n(v + d, m) * r * load_n(gain + d, m), m);
  }
}

// Gradient through RMSNorm(v) * gain: dv from dy; dgain is added to.
template <class T>
void rms_norm_backward(const float* v, const T* dy, const float* gain, int64_t D, float eps, float* dv, float* dgain) {
  float r = 1.0f / std::sqrt(sum_squares(v, D) / float(D) + eps);
  vf across{};
  for (int64_t d = 0; d < D; d += kLanes) {
    int m = D - d < kLanes ? int(D - d) : kLanes;
    vf g = load_n(dy + d, m), unit = load_n(v + d, m) * r;
    across += g * load_n(gain + d, m) * unit;
    store_n(dgain + d, load_n(dgain + d, m) + g * unit, m);
  }
  float mean = hsum(across) / float(D);
  for (int64_t d = 0; d < D; d += kLanes) {
    int m = D - d < kLanes ? int(D - d) : kLanes;
    vf unit = load_n(v + d, m) * r;
    store_n(dv + d, (load_n(dy + d, m) * load_n(gain + d, m) - unit * mean) * r, m);
  }
}

template <class T>
void forward(const T* const* source, int64_t n, const float* query, int64_t S, const float* out_gain, T* out,
             float* lse, int64_t rows, int64_t D, float eps, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float* scratch = buffer(2 * S * n + n + S + D);
    float *weight = scratch, *raw = weight + S * n, *rrms = raw + S * n, *row_lse = rrms + n, *mixed = row_lse + S;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      row_weights(source, n, row, query, S, D, eps, weight, rrms, raw, row_lse);
      for (int64_t s = 0; s < S; ++s) {
        T* to = out + (s * rows + row) * D;
        if (out_gain) {
          mix(source, n, row, weight + s * n, D, mixed);
          rms_norm(mixed, out_gain, D, eps, to);
        } else {
          mix(source, n, row, weight + s * n, D, to);
        }
        if (lse) lse[s * rows + row] = row_lse[s];
      }
    }
    std::free(scratch);
  }
}

template <class T>
void backward(const T* const* source, int64_t n, const float* query, int64_t S, const float* out_gain, const T* dout,
              const float* dlse, T* const* dsource, float* dquery, float* dout_gain, int64_t rows, int64_t D,
              float eps, int threads) {
  const int64_t parts = (rows + kRowsPerPartial - 1) / kRowsPerPartial;
  const int64_t width = S * D + (out_gain ? D : 0);
  float* partial = static_cast<float*>(std::calloc(parts * width + 1, sizeof(float)));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float* scratch = buffer(4 * S * n + n + S + 2 * D + S * D);
    float *weight = scratch, *raw = weight + S * n, *on_query = raw + S * n, *on_value = on_query + S * n;
    float *rrms = on_value + S * n, *row_lse = rrms + n, *mixed = row_lse + S, *dmixed = mixed + D;
#pragma omp for schedule(static)
    for (int64_t part = 0; part < parts; ++part) {
      float* dq = partial + part * width;
      const int64_t last = (part + 1) * kRowsPerPartial < rows ? (part + 1) * kRowsPerPartial : rows;
      for (int64_t row = part * kRowsPerPartial; row < last; ++row) {
        row_weights(source, n, row, query, S, D, eps, weight, rrms, raw, row_lse);
        for (int64_t s = 0; s < S; ++s) {
          const T* dy = dout + (s * rows + row) * D;
          float* dm = dmixed + s * D;
          if (out_gain) {
            mix(source, n, row, weight + s * n, D, mixed);
            rms_norm_backward(mixed, dy, out_gain, D, eps, dm, dq + S * D);
          } else {
            for (int64_t d = 0; d < D; d += kLanes) {
              int m = D - d < kLanes ? int(D - d) : kLanes;
              store_n(dm + d, load_n(dy + d, m), m);
            }
          }
          // d loss / d logit_i = p_i (<dm, v_i> - sum_j p_j <dm, v_j> + dlse)
          float mean = 0;
          for (int64_t i = 0; i < n; ++i) {
            float along = dot(source[i] + row * D, dm, D);
            on_query[s * n + i] = along;
            mean += weight[s * n + i] * along;
          }
          const float shift = dlse ? dlse[s * rows + row] : 0.0f;
          for (int64_t i = 0; i < n; ++i) {
            float dlogit = weight[s * n + i] * (on_query[s * n + i] - mean + shift);
            on_query[s * n + i] = dlogit * rrms[i];
            on_value[s * n + i] = -dlogit * raw[s * n + i] * rrms[i] * rrms[i] * rrms[i] / float(D);
          }
        }
        for (int64_t i = 0; i < n; ++i) {
          const T* v = source[i] + row * D;
          T* dv = dsource[i] + row * D;
          float self = 0;
          for (int64_t s = 0; s < S; ++s) self += on_value[s * n + i];
          for (int64_t d = 0; d < D; d += kLanes) {
            int m = D - d < kLanes ? int(D - d) : kLanes;
            vf value = load_n(v + d, m), acc = value * self;
            for (int64_t s = 0; s < S; ++s) {
              acc += load_n(dmixed + s * D + d, m) * weight[s * n + i];
              acc += load_n(query + s * D + d, m) * on_query[s * n + i];
              float* to = dq + s * D + d;
              store_n(to, load_n(to, m) + value * on_query[s * n + i], m);
            }
            store_n(dv + d, acc, m);
          }
        }
      }
    }
    std::free(scratch);
  }
  for (int64_t c = 0; c < S * D; ++c) dquery[c] = 0;
  for (int64_t c = S * D; c < width; ++c) dout_gain[c - S * D] = 0;
  for (int64_t part = 0; part < parts; ++part) {
    const float* from = partial + part * width;
    for (int64_t c = 0; c < S * D; ++c) dquery[c] += from[c];
    for (int64_t c = S * D; c < width; ++c) dout_gain[c - S * D] += from[c];
  }
  std::free(partial);
}

// h = out + sigmoid(logit(partial) - lse) * (partial - out), then the optional output norm.
template <class T>
float merge_gate(const T* p, const float* query, float lse, int64_t D, float eps, float* rrms, float* raw) {
  float squares;
  moments(p, query, D, &squares, raw);
  *rrms = 1.0f / std::sqrt(squares / float(D) + eps);
  return 1.0f / (1.0f + std::exp(lse - *raw * *rrms));
}

template <class T>
void merge_forward(const T* out, const float* lse, const T* part, const float* query, const float* out_gain, T* merged,
                   int64_t rows, int64_t D, float eps, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float* mixed = buffer(D);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      const T *o = out + row * D, *p = part + row * D;
      float rrms, raw;
      vf gate = splat(merge_gate(p, query, lse[row], D, eps, &rrms, &raw));
      for (int64_t d = 0; d < D; d += kLanes) {
        int m = D - d < kLanes ? int(D - d) : kLanes;
        vf x = load_n(o + d, m);
        vf h = x + gate * (load_n(p + d, m) - x);
        if (out_gain) {
          store_n(mixed + d, h, m);
        } else {
          store_n(merged + row * D + d, h, m);
        }
      }
      if (out_gain) rms_norm(mixed, out_gain, D, eps, merged + row * D);
    }
    std::free(mixed);
  }
}

template <class T>
void merge_backward(const T* out, const float* lse, const T* part, const float* query, const float* out_gain,
                    const T* dmerged, T* dout, float* dlse, T* dpart, float* dquery, float* dout_gain, int64_t rows,
                    int64_t D, float eps, int threads) {
  const int64_t parts = (rows + kRowsPerPartial - 1) / kRowsPerPartial;
  const int64_t width = D + (out_gain ? D : 0);
  float* partial = static_cast<float*>(std::calloc(parts * width + 1, sizeof(float)));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float *mixed = buffer(2 * D), *dm = mixed + D;
#pragma omp for schedule(static)
    for (int64_t item = 0; item < parts; ++item) {
      float* dq = partial + item * width;
      const int64_t last = (item + 1) * kRowsPerPartial < rows ? (item + 1) * kRowsPerPartial : rows;
      for (int64_t row = item * kRowsPerPartial; row < last; ++row) {
        const T *o = out + row * D, *p = part + row * D, *dy = dmerged + row * D;
        float rrms, raw;
        const float gate = merge_gate(p, query, lse[row], D, eps, &rrms, &raw);
        for (int64_t d = 0; d < D; d += kLanes) {
          int m = D - d < kLanes ? int(D - d) : kLanes;
          vf x = load_n(o + d, m);
          store_n(mixed + d, x + (load_n(p + d, m) - x) * gate, m);
          store_n(dm + d, load_n(dy + d, m), m);
        }
        if (out_gain) rms_norm_backward(mixed, dy, out_gain, D, eps, dm, dq + D);
        vf along{};
        for (int64_t d = 0; d < D; d += kLanes) {
          int m = D - d < kLanes ? int(D - d) : kLanes;
          along += load_n(dm + d, m) * (load_n(p + d, m) - load_n(o + d, m));
        }
        const float dlogit = hsum(along) * gate * (1.0f - gate);
        dlse[row] = -dlogit;
        const float on_query = dlogit * rrms;
        const float on_value = -dlogit * raw * rrms * rrms * rrms / float(D);
        for (int64_t d = 0; d < D; d += kLanes) {
          int m = D - d < kLanes ? int(D - d) : kLanes;
          vf g = load_n(dm + d, m), value = load_n(p + d, m);
          store_n(dout + row * D + d, g * (1.0f - gate), m);
          store_n(dpart + row * D + d, g * gate + load_n(query + d, m) * on_query + value * on_value, m);
          store_n(dq + d, load_n(dq + d, m) + value * on_query, m);
        }
      }
    }
    std::free(mixed);
  }
  for (int64_t c = 0; c < D; ++c) dquery[c] = 0;
  for (int64_t c = D; c < width; ++c) dout_gain[c - D] = 0;
  for (int64_t item = 0; item < parts; ++item) {
    const float* from = partial + item * width;
    for (int64_t c = 0; c < D; ++c) dquery[c] += from[c];
    for (int64_t c = D; c < width; ++c) dout_gain[c - D] += from[c];
  }
  std::free(partial);
}

}  // namespace

// out [S, rows, D]; lse [S, rows] or null; query [S, D] with the key gains and the scale folded in.
void attn_res_forward(const void* const* source, int64_t n, const float* query, int64_t S, const float* out_gain,
                      void* out, float* lse, int64_t rows, int64_t D, float eps, int64_t dtype, int64_t threads) {
  if (dtype == 0) {
    forward(reinterpret_cast<const float* const*>(source), n, query, S, out_gain, static_cast<float*>(out), lse, rows,
            D, eps, int(threads));
  } else {
    forward(reinterpret_cast<const bf16* const*>(source), n, query, S, out_gain, static_cast<bf16*>(out), lse, rows,
            D, eps, int(threads));
  }
}
KIMI_EXPORT(attn_res_forward);

void attn_res_backward(const void* const* source, int64_t n, const float* query, int64_t S, const float* out_gain,
                       const void* dout, const float* dlse, void* const* dsource, float* dquery, float* dout_gain,
                       int64_t rows, int64_t D, float eps, int64_t dtype, int64_t threads) {
  if (dtype == 0) {
    backward(reinterpret_cast<const float* const*>(source), n, query, S, out_gain, static_cast<const float*>(dout),
             dlse, reinterpret_cast<float* const*>(dsource), dquery, dout_gain, rows, D, eps, int(threads));
  } else {
    backward(reinterpret_cast<const bf16* const*>(source), n, query, S, out_gain, static_cast<const bf16*>(dout), dlse,
             reinterpret_cast<bf16* const*>(dsource), dquery, dout_gain, rows, D, eps, int(threads));
  }
}
KIMI_EXPORT(attn_res_backward);

void attn_res_merge_forward(const void* out, const float* lse, const void* part, const float* query,
                            const float* out_gain, void* merged, int64_t rows, int64_t D, float eps, int64_t dtype,
                            int64_t threads) {
  if (dtype == 0) {
    merge_forward(static_cast<const float*>(out), lse, static_cast<const float*>(part), query, out_gain,
                  static_cast<float*>(merged), rows, D, eps, int(threads));
  } else {
    merge_forward(static_cast<const bf16*>(out), lse, static_cast<const bf16*>(part), query, out_gain,
                  static_cast<bf16*>(merged), rows, D, eps, int(threads));
  }
}
KIMI_EXPORT(attn_res_merge_forward);

void attn_res_merge_backward(const void* out, const float* lse, const void* part, const float* query,
                             const float* out_gain, const void* dmerged, void* dout, float* dlse, void* dpart,
                             float* dquery, float* dout_gain, int64_t rows, int64_t D, float eps, int64_t dtype,
                             int64_t threads) {
  if (dtype == 0) {
    merge_backward(static_cast<const float*>(out), lse, static_cast<const float*>(part), query, out_gain,
                   static_cast<const float*>(dmerged), static_cast<float*>(dout), dlse, static_cast<float*>(dpart),
                   dquery, dout_gain, rows, D, eps, int(threads));
  } else {
    merge_backward(static_cast<const bf16*>(out), lse, static_cast<const bf16*>(part), query, out_gain,
                   static_cast<const bf16*>(dmerged), static_cast<bf16*>(dout), dlse, static_cast<bf16*>(dpart), dquery,
                   dout_gain, rows, D, eps, int(threads));
  }
}
KIMI_EXPORT(attn_res_merge_backward);

}  // namespace kimi::KIMI_ISA
