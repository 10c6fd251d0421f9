// kda_gate and its gradient on [tokens, HV, K], contiguous.
#include "isa.h"
#include "kda/gate.h"
#include "kda/scratch.h"

namespace kimi::KIMI_ISA {
namespace {

// The gate's arguments as the heads of a KdaArgs: `gate_head` reads nothing else of it.
KdaArgs gate_args(const float* A_log, const float* dt_bias, int64_t heads, int64_t width, int64_t lower_bounded,
                  float lower_bound) {
  KdaArgs args{};
  args.A_log = A_log;
  args.dt_bias = dt_bias;
  args.HV = heads;
  args.K = width;
  args.gate = lower_bounded ? kGateLowerBound : kGateSoftplus;
  args.lower_bound = lower_bound;
  return args;
}

Rows head_rows(void* data, int64_t is_bf16, int64_t head, int64_t heads, int64_t width) {
  const int64_t size = is_bf16 ? 2 : 4;
  return {static_cast<char*>(data) + head * width * size, heads * width * size, int(width), is_bf16 != 0};
}

}  // namespace

void kda_gate(void* g, int64_t is_bf16, const float* A_log, const float* dt_bias, int64_t lower_bounded,
              float lower_bound, void* out, int64_t tokens, int64_t heads, int64_t width, int64_t threads) {
  const KdaArgs args = gate_args(A_log, dt_bias, heads, width, lower_bounded, lower_bound);
  const int padded = round_up(int(width), kLanes);
#pragma omp parallel num_threads(int(threads))
  {
    Scratch& scratch = thread_scratch();
    scratch.reset();
    float* bias = scratch.floats(padded);
    float* row = scratch.floats(padded);
    for (int64_t head = 0; head < heads; ++head) {
      const GateHead gate = gate_head(args, head, int(width), padded, bias);
      const Rows from = head_rows(g, is_bf16, head, heads, width);
      Rows to = head_rows(out, 0, head, heads, width);
#pragma omp for schedule(static) nowait
      for (int64_t t = 0; t < tokens; ++t) {
        load_row(from, t, row, padded);
        for (int c = 0; c < padded; c += kLanes) store(row + c, gate(load(row + c), c));
        store_row(to, t, row);
      }
    }
  }
}
KIMI_EXPORT(kda_gate);

// dg [tokens, HV, K], dA_log [HV] and ddt_bias [HV, K] in fp32.
void kda_gate_backward(void* d_out, void* g, int64_t is_bf16, const float* A_log, const float* dt_bias,
                       int64_t lower_bounded, float lower_bound, void* dg, float* dA_log, float* ddt_bias,
                       int64_t tokens, int64_t heads, int64_t width, int64_t threads) {
  const KdaArgs args = gate_args(A_log, dt_bias, heads, width, lower_bounded, lower_bound);
  const int padded = round_up(int(width), kLanes);
#pragma omp parallel for schedule(static) num_threads(int(threads))
  for (int64_t head = 0; head < heads; ++head) {
    Scratch& scratch = thread_scratch();
    scratch.reset();
    const GateHead gate = gate_head(args, head, int(width), padded, scratch.floats(padded));
    float* raw = scratch.floats(padded);
    float* d = scratch.floats(padded);
    float* d_bias = scratch.floats(padded);
    std::memset(d_bias, 0, sizeof(float) * padded);
    const Rows from = head_rows(g, is_bf16, head, heads, width), above = head_rows(d_out, 0, head, heads, width);
    Rows to = head_rows(dg, 0, head, heads, width);
    vf d_log_rate{};
    for (int64_t t = 0; t < tokens; ++t) {
      load_row(from, t, raw, padded);
      load_row(above, t, d, padded);
      for (int c = 0; c < padded; c += kLanes) {
        vf x = load(raw + c);
        vf dx = gate.backward(x, c, gate(x, c), load(d + c), &d_log_rate);
        store(d + c, dx);
        store(d_bias + c, load(d_bias + c) + dx);
      }
      store_row(to, t, d);
    }
    dA_log[head] = hsum(d_log_rate);
    std::memcpy(ddt_bias + head * width, d_bias, sizeof(float) * width);
  }
}
KIMI_EXPORT(kda_gate_backward);

}  // namespace kimi::KIMI_ISA
