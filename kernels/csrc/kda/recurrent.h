// One token of one head, on a state whose rows are value channels of K contiguous key channels.
//
// For a row s of the state (Kimi Linear, equation 1): s' = s e^g; u = beta (v - <s', k>); s = s' + u k; o = <s, q>.
// As <s, q> = <s', q> + u <k, q>, both products are taken in one pass, and the row is written in a second pass while it
// is still in L1: memory is read and written once.
#pragma once

#include "forward.h"

namespace kimi::KIMI_ISA {

struct Step {
  float *decay, *q, *k;            // [Kp]
  float *decayed_q, *decayed_k;    // [Kp]: what a row is multiplied with before it decays
  float *v, *o;                    // [Vp]
  float beta, qk;

  Step(const TileShape& s, Scratch& scratch) {
    for (float** p : {&decay, &q, &k, &decayed_q, &decayed_k}) *p = scratch.floats(s.Kp);
    for (float** p : {&v, &o}) *p = scratch.floats(s.Vp);
    std::memset(o, 0, sizeof(float) * s.Vp);  // step_rows leaves the padding alone
  }
};

// 1 / sqrt(sum of squares + eps) of one row.
inline float reciprocal_norm(const float* x, int Kp) { return 1.0f / std::sqrt(hsum(squares(x, Kp)) + kL2NormEps); }

KIMI_INLINE void load_step_row(const Rows& rows, const ConvRows& conv, int64_t t, float* to, int padded) {
  if (conv.width > 0) {
    conv_silu(conv, rows, t, 1, to, padded);
  } else {
    load_row(rows, t, to, padded);
  }
}

inline void prepare_step(Step& step, const HeadInputs& in, const KdaArgs& args, const TileShape& s, int64_t t) {
  load_row(in.g, t, step.decay, s.Kp);
  load_step_row(in.q, in.conv_q, t, step.q, s.Kp);
  load_step_row(in.k, in.conv_k, t, step.k, s.Kp);
  load_step_row(in.v, in.conv_v, t, step.v, s.Vp);
  step.beta = write_strength(args, load_scalar(in.beta, t));
  float q_factor = in.scale, k_factor = 1.0f;
  if (args.l2norm) {
    q_factor *= reciprocal_norm(step.q, s.Kp);
    k_factor *= reciprocal_norm(step.k, s.Kp);
  }
  vf qk{};
  for (int c = 0; c < s.Kp; c += kLanes) {
    vf q = load(step.q + c) * q_factor, k = load(step.k + c) * k_factor;
    store(step.q + c, q);
    store(step.k + c, k);
    qk += q * k;
    vf decay = vexp(in.gate(load(step.decay + c), c));
    store(step.decay + c, decay);
    store(step.decayed_q + c, decay * q);
    store(step.decayed_k + c, decay * k);
  }
  step.qk = hsum(qk);
}

constexpr int kStepRows = 4;

// Reads one value of each line of the rows, line after line. The memory system's own prefetch follows one rising stream,
// not the rows of a group in turn; software prefetch in this order was slower (Zen 4, state pool in memory).
KIMI_INLINE void touch_rows(const float* from, int64_t row_stride, int K) {
  constexpr int line = kLineBytes / sizeof(float);
  for (int r = 0; r < kStepRows; ++r)
    for (int c = 0; c < K; c += line) (void)*static_cast<const volatile float*>(from + r * row_stride + c);
}

// kStepRows rows of the state from `from` to `to` (which may be the same memory), and their outputs. `ahead`: the rows
// that come next, or null.
KIMI_INLINE void step_rows(const Step& step, const float* from, int64_t from_row, float* to, int64_t to_row, int K,
                           int row, const float* ahead) {
  vf sums[2 * kStepRows];
#pragma GCC unroll 8
  for (int i = 0; i < 2 * kStepRows; ++i) sums[i] = vf{};
  const int whole = K / kLanes * kLanes;
  for (int c = 0; c < whole; c += kLanes) {
    vf k = load(step.decayed_k + c), q = load(step.decayed_q + c);
#pragma GCC unroll 4
    for (int r = 0; r < kStepRows; ++r) {
      vf x = load(from + r * from_row + c);
      sums[r] += x * k;
      sums[kStepRows + r] += x * q;
    }
  }
  if (whole < K) {
    vf k = load(step.decayed_k + whole), q = load(step.decayed_q + whole);
#pragma GCC unroll 4
    for (int r = 0; r < kStepRows; ++r) {
      vf x = load_n(from + r * from_row + whole, K - whole);
      sums[r] += x * k;
      sums[kStepRows + r] += x * q;
    }
  }
  if (ahead != nullptr) touch_rows(ahead, from_row, K);
  constexpr int together = 2 * kStepRows < kLanes ? 2 * kStepRows : kLanes;
  float products[2 * kStepRows], u[kStepRows];
  for (int i = 0; i < 2 * kStepRows; i += together) fold_lanes<together>(sums + i, products + i);
  for (int r = 0; r < kStepRows; ++r) {
    u[r] = step.beta * (step.v[row + r] - products[r]);
    step.o[row + r] = products[kStepRows + r] + u[r] * step.qk;
  }
  for (int c = 0; c < whole; c += kLanes) {
    vf a = load(step.decay + c), k = load(step.k + c);
#pragma GCC unroll 4
    for (int r = 0; r < kStepRows; ++r) store(to + r * to_row + c, load(from + r * from_row + c) * a + splat(u[r]) * k);
  }
  if (whole < K) {
    vf a = load(step.decay + whole), k = load(step.k + whole);
    for (int r = 0; r < kStepRows; ++r) {
      store_n(to + r * to_row + whole, load_n(from + r * from_row + whole, K - whole) * a + splat(u[r]) * k, K - whole);
    }
  }
}

// Rows [first, end) of the state. A last group of fewer than kStepRows rows goes through a copy. `next`: a state of the
// same shape that is read after this one, or null.
inline void step_state(const Step& step, const float* from, int64_t from_row, float* to, int64_t to_row, int K,
                       int first, int end, const float* next = nullptr) {
  int row = first;
  for (; row + kStepRows <= end; row += kStepRows) {
    const float* ahead = row + 2 * kStepRows <= end ? from + (row + kStepRows) * from_row : next;
    step_rows(step, from + row * from_row, from_row, to + row * to_row, to_row, K, row, ahead);
  }
  if (row == end) return;
  alignas(64) float group[kStepRows * kMaxHead] = {};
  for (int r = 0; row + r < end; ++r) std::memcpy(group + r * K, from + (row + r) * from_row, sizeof(float) * K);
  step_rows(step, group, K, group, K, K, row, nullptr);
  for (int r = 0; row + r < end; ++r) std::memcpy(to + (row + r) * to_row, group + r * K, sizeof(float) * K);
}

// Reads rows [first, end) of a state in memory into S [V][K], or zeros.
inline void load_rows(const States& view, const float* from, int K, int first, int end, float* S) {
  for (int v = first; v < end; ++v) {
    for (int k = 0; k < K; ++k) S[v * K + k] = from == nullptr ? 0.0f : from[k * view.stride_k + v * view.stride_v];
  }
}
inline void store_rows(const States& view, float* to, int K, int first, int end, const float* S) {
  if (to == nullptr) return;
  for (int v = first; v < end; ++v) {
    for (int k = 0; k < K; ++k) to[k * view.stride_k + v * view.stride_v] = S[v * K + k];
  }
}

// `length` tokens on rows [first, end) of the state; finish(t, step) is called with the outputs of each token.
template <class Finish>
inline void run_steps(const KdaArgs& args, const HeadInputs& in, const TileShape& s, int64_t length, int first, int end,
                      const float* initial, float* final, Scratch& scratch, Finish finish) {
  Step step(s, scratch);
  if (length == 1 && initial != nullptr && final != nullptr && args.initial.stride_k == 1 && args.final.stride_k == 1) {
    prepare_step(step, in, args, s, 0);
    step_state(step, initial, args.initial.stride_v, final, args.final.stride_v, s.K, first, end);
    finish(0, step);
    return;
  }
  float* S = scratch.floats(size_t(s.V) * s.K);
  load_rows(args.initial, initial, s.K, first, end, S);
  for (int64_t t = 0; t < length; ++t) {
    prepare_step(step, in, args, s, t);
    step_state(step, S, s.K, S, s.K, s.K, first, end);
    finish(t, step);
  }
  store_rows(args.final, final, s.K, first, end, S);
}

}  // namespace kimi::KIMI_ISA
