// What Python passes to the KDA kernels. Every field is 8 bytes; kda/_layout.py mirrors the structs field by field.
#pragma once

#include <cstdint>

namespace kimi {

// A [batch, token, head, channel] tensor (beta: without channel). Channels are contiguous; strides count elements.
struct Tokens {
  void* data;
  int64_t dtype;  // 0 fp32, 1 bf16
  int64_t stride_b, stride_t, stride_h;
};

// fp32 states, one matrix per (slot, value head). A null pointer means zeros (read) or not wanted (written).
struct States {
  float* data;
  int64_t stride_n, stride_h, stride_k, stride_v;
};

enum Gate : int64_t { kGateNone = 0, kGateSoftplus = 1, kGateLowerBound = 2 };

struct KdaArgs {
  Tokens q, k, v, g, beta, o;
  States initial, final;
  const int64_t* cu_seqlens;  // [N + 1], or null: N sequences of T tokens, one per batch row
  const float* A_log;         // [HV], null without a gate in the kernel (lower-bounded: null means 0)
  const float* dt_bias;       // [HV, K] or null
  int64_t N, T, H, HV, K, V;
  int64_t l2norm, gate, beta_sigmoid;
  int64_t num_threads;
  double scale, lower_bound, beta_scale;
};

// Gradients, fp32 and contiguous; q and k per value head ([B, T, HV, K]).
struct KdaGrads {
  Tokens d_o;
  States d_final, d_initial;
  float *dq, *dk, *dv, *dg, *dbeta;
  float* dA_log;    // [N, HV] or null
  float* ddt_bias;  // [N, HV, K] or null
};

// The layer around the delta rule when serving: short convolution before it, gated RMSNorm after it, states in pools.
struct KdaLayer {
  const void* conv_weight;  // [channels, width], width contiguous
  int64_t conv_weight_dtype, conv_width;
  void* conv_state;
  int64_t conv_state_dtype, conv_stride_slot, conv_stride_entry, conv_stride_channel;
  Tokens gate;
  const float* norm_weight;  // [V]
  double norm_eps;
  const int32_t* state_indices;  // [N, indices_per_sequence], -1: skip
  int64_t indices_per_sequence;
  const uint8_t* has_initial;   // [N] (prefill) or null
  const int32_t* num_accepted;  // [N] (speculative decode) or null
  const int32_t* cu_seqlens;    // [N + 1] or null: one token per sequence
  int64_t slots;                // of the state pool, for checking the indices
  int64_t problem, problem_at;  // set by the kernel: what is wrong (LayerProblem), and with which sequence
};

enum LayerProblem : int64_t { kNoProblem = 0, kBadIndex = 1, kBadLength = 2, kBadAccepted = 3, kBadOffsets = 4 };

// A field added on one side only must not compile.
static_assert(sizeof(KdaArgs) == 448 && sizeof(KdaGrads) == 176 && sizeof(KdaLayer) == 184);

}  // namespace kimi
