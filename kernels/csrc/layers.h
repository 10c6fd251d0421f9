// Whole layers of a decode step: what does not change from step to step. layers/_layout.py mirrors the structs.
// All weights are contiguous and of one dtype unless said otherwise.
#pragma once

#include <cstdint>

namespace kimi {

struct KdaWeights {
  const void *in_proj, *gate_up, *o_proj;  // [N, D], [2, HV * K, rank], [O, HV * V]
  int64_t D, N, rank, O, dtype;
};

struct MlaWeights {
  const void* in_proj;      // [H * (nope + rope) or q_rank, then rank + rope; D]
  const void *q_norm, *q_up;  // [q_rank], [H * (nope + rope), q_rank]; null without a query latent
  const void *latent_norm, *key_up;  // [rank], [H, rank, nope]
  const void* value_up;     // [H, v, rank], a head every value_stride elements
  const void* o_proj;       // [O, H * v]
  void* cache;              // pages of block_size rows of rank + rope elements
  int64_t D, H, nope, rope, v, rank, q_rank, O, value_stride;
  int64_t block_size, block_stride, row_stride;
  int64_t dtype, threads;
  double eps, scale;
};

struct MoeWeights {
  const float *gate, *bias;  // [E, D], [E]
  const void *w13, *w2;      // [E + shared, 2 I, D], [E + shared, D, I]
  int64_t E, D, I, k, groups, kept, shared, renormalize, dtype, threads;
  double factor;
};

static_assert(sizeof(KdaWeights) == 64 && sizeof(MlaWeights) == 192 && sizeof(MoeWeights) == 120);

}  // namespace kimi
