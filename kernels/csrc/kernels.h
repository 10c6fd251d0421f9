// Kernels that other kernels are made of. Each is defined and described in a file of isa/.
#pragma once

#include <cstdint>

#include "kda/args.h"

namespace kimi {

// x [B, tokens, K] and w [B, N, K] with contiguous rows, w's of K elements; out [B, tokens, N]. Strides count elements.
// projection/cpu.py mirrors the struct field by field.
struct LinearArgs {
  const void *x, *w;
  void* out;
  int64_t B, tokens, K, N;
  int64_t x_batch, x_token, w_batch, out_batch, out_token;
  int64_t dtype, threads;
};
static_assert(sizeof(LinearArgs) == 112);

}  // namespace kimi

namespace kimi::KIMI_ISA {

void batched_linear(const LinearArgs* a);
void kda_decode(const KdaArgs* args, KdaLayer* layer);
void mla_paged_attention(const void* query, int64_t query_dtype, const void* cache, int64_t cache_dtype,
                         int64_t block_size, int64_t block_stride, int64_t row_stride, const int32_t* block_table,
                         int64_t table_stride, const int32_t* seq_lens, const int32_t* cu_query, void* out, int64_t N,
                         int64_t T, int64_t H, int64_t D, int64_t V, float scale, int64_t threads);
void moe_route(const void* x, const float* gate, const float* bias, int32_t* ids, float* weights, int64_t tokens,
               int64_t E, int64_t D, int64_t k, int64_t groups, int64_t kept, int64_t shared, int64_t renormalize,
               float factor, int64_t dtype, int64_t threads);
void moe_experts(const void* x, const void* w13, const void* w2, const int32_t* ids, const float* weights, void* out,
                 int64_t tokens, int64_t k, int64_t E, int64_t D, int64_t I, int64_t dtype, int64_t threads);

}  // namespace kimi::KIMI_ISA
