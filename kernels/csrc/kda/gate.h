// The stages in front of the delta rule, one vector or one row at a time: decay gate, L2 norm, write strength.
#pragma once

#include "problem.h"

namespace kimi::KIMI_ISA {

constexpr float kL2NormEps = 1e-6f;  // added to the sum of squares, as in the published model (Kimi Linear, section 4)

// Log decay of one head from its raw gate values.
struct GateHead {
  int64_t kind;
  float rate;         // e^A_log of this head
  float lower_bound;  // of kGateLowerBound
  const float* bias;  // [Kp] or null

  KIMI_INLINE vf biased(vf raw, int c) const { return bias == nullptr ? raw : raw + load(bias + c); }

  KIMI_INLINE vf operator()(vf raw, int c) const {
    if (kind == kGateNone) return raw;
    vf z = biased(raw, c);
    if (kind == kGateSoftplus) return -rate * vsoftplus(z);
    return lower_bound * vsigmoid(rate * z);
  }

  // From the gradient of the log decay g to those of raw (returned) and of A_log (added to *d_log_rate, per lane).
  KIMI_INLINE vf backward(vf raw, int c, vf g, vf dg, vf* d_log_rate) const {
    if (kind == kGateNone) return dg;
    vf z = biased(raw, c);
    if (kind == kGateSoftplus) {
      *d_log_rate += dg * g;
      return dg * (-rate * vsigmoid(z));
    }
    vf d_scaled = dg * (lower_bound * rate) * vsigmoid_slope(rate * z);
    *d_log_rate += d_scaled * z;
    return d_scaled;
  }
};

// `bias_row` is room for Kp floats.
inline GateHead gate_head(const KdaArgs& args, int64_t head, int K, int Kp, float* bias_row) {
  GateHead gate{args.gate, 1.0f, static_cast<float>(args.lower_bound), nullptr};
  if (args.gate == kGateNone) return gate;
  if (args.A_log != nullptr) gate.rate = std::exp(args.A_log[head]);
  if (args.dt_bias != nullptr) {
    for (int c = 0; c < Kp; ++c) bias_row[c] = c < K ? args.dt_bias[head * K + c] : 0.0f;
    gate.bias = bias_row;
  }
  return gate;
}

inline float write_strength(const KdaArgs& args, float raw) {
  float strength = args.beta_sigmoid ? 1.0f / (1.0f + std::exp(-raw)) : raw;
  return strength * static_cast<float>(args.beta_scale);
}

// Derivative of write_strength.
inline float write_strength_slope(const KdaArgs& args, float raw) {
  float slope = 1.0f;
  if (args.beta_sigmoid) {
    const float e = std::exp(-std::fabs(raw));
    slope = e / ((1.0f + e) * (1.0f + e));
  }
  return slope * static_cast<float>(args.beta_scale);
}

// The vector of partial sums of squares of a row.
KIMI_INLINE vf squares(const float* x, int padded) {
  vf sum{};
  for (int c = 0; c < padded; c += kLanes) {
    vf v = load(x + c);
    sum += v * v;
  }
  return sum;
}

}  // namespace kimi::KIMI_ISA
