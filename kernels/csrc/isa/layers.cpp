// A layer of a decode step in one call: the kernels between hidden state and hidden state, one after the other.
#include "layers.h"

#include <memory>

#include "isa.h"
#include "kernels.h"
#include "simd.h"

namespace kimi::KIMI_ISA {
namespace {

// Room for what passes between the kernels of one call, kept by the calling thread.
class Room {
 public:
  explicit Room(int64_t bytes) {
    thread_local std::unique_ptr<char, Free> kept;
    thread_local int64_t size = 0;
    if (bytes > size) {
      kept.reset(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
      size = bytes;
    }
    next_ = kept.get();
  }
  void* take(int64_t bytes) {
    void* p = next_;
    next_ += padded(bytes);
    return p;
  }
  static int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  char* next_;
};

template <class T>
void norm_row(const T* x, const T* weight, int64_t D, float eps, T* out) {
  vf sum{};
  for (int64_t d = 0; d < D; d += kLanes) {
    const vf v = load_n(x + d, D - d < kLanes ? int(D - d) : kLanes);
    sum += v * v;
  }
  const vf factor = splat(1.0f / std::sqrt(hsum(sum) / float(D) + eps));
  for (int64_t d = 0; d < D; d += kLanes) {
    const int m = D - d < kLanes ? int(D - d) : kLanes;
    store_n(out + d, load_n(x + d, m) * factor * load_n(weight + d, m), m);
  }
}

}  // namespace

// hidden [T, D], normed; out [T, O]. args and layer hold what is constant; states [N, columns], cu_seqlens [N + 1] and
// accepted [N] as in KdaLayer, where a problem is reported too.
void kda_decode_layer(KdaArgs* args, KdaLayer* layer, const KdaWeights* w, const void* hidden, void* out, int64_t T,
                      int64_t N, const int32_t* states, int64_t columns, const int32_t* cu_seqlens,
                      const int32_t* accepted) {
  const int64_t element = w->dtype == 0 ? 4 : 2, threads = args->num_threads;
  const int64_t keys = args->H * args->K, gate = args->HV * args->K, width = args->HV * args->V;
  Room room(Room::padded(T * w->N * element) + Room::padded(2 * T * gate * element) + T * width * element);
  char* projected = static_cast<char*>(room.take(T * w->N * element));
  char* gates = static_cast<char*>(room.take(2 * T * gate * element));
  void* core = room.take(T * width * element);
  char* latents = projected + (2 * keys + width) * element;

  args->q = {projected, w->dtype, 0, w->N, args->K};
  args->k = {projected + keys * element, w->dtype, 0, w->N, args->K};
  args->v = {projected + 2 * keys * element, w->dtype, 0, w->N, args->V};
  args->g = {gates, w->dtype, 0, gate, args->K};
  args->beta = {latents + 2 * w->rank * element, w->dtype, 0, w->N, 1};
  args->o = {core, w->dtype, 0, width, args->V};
  args->N = N;
  args->T = T;
  layer->gate = {gates + T * gate * element, w->dtype, 0, gate, args->V};
  layer->state_indices = states;
  layer->indices_per_sequence = columns;
  layer->cu_seqlens = cu_seqlens;
  layer->num_accepted = accepted;
  layer->problem = kNoProblem;

  const LinearArgs in{hidden, w->in_proj, projected, 1, T, w->D, w->N, 0, w->D, 0, 0, w->N, w->dtype, threads};
  const LinearArgs up{latents,      w->gate_up, gates,    2,    T,        w->rank, gate, w->rank, w->N,
                      gate * w->rank, T * gate,   gate, w->dtype, threads};
  const LinearArgs down{core, w->o_proj, out, 1, T, width, w->O, 0, width, 0, 0, w->O, w->dtype, threads};
  batched_linear(&in);
  batched_linear(&up);
  kda_decode(args, layer);
  if (layer->problem == kNoProblem) batched_linear(&down);
}
KIMI_EXPORT(kda_decode_layer);

namespace {

template <class T>
void mla_layer(const MlaWeights& w, const T* hidden, T* out, int64_t tokens, int64_t N, const int64_t* slots,
               const int32_t* block_table, int64_t table_stride, const int32_t* seq_lens, const int32_t* cu_query) {
  const int64_t head = w.nope + w.rope, row = w.rank + w.rope, query_width = w.H * head;
  const int64_t first = w.q_rank ? w.q_rank : query_width, N_in = first + row, threads = w.threads;
  auto bytes = [&](int64_t count) { return Room::padded(tokens * count * int64_t(sizeof(T))); };
  Room room(bytes(N_in) + bytes(w.q_rank) + bytes(w.q_rank ? query_width : 0) + bytes(w.H * row) +
            bytes(w.H * w.rank) + bytes(w.H * w.v));
  auto take = [&](int64_t count) { return static_cast<T*>(room.take(tokens * count * int64_t(sizeof(T)))); };
  T *projected = take(N_in), *latent = take(w.q_rank), *lifted = take(w.q_rank ? query_width : 0);
  T *absorbed = take(w.H * row), *mixed = take(w.H * w.rank), *values = take(w.H * w.v);

  const LinearArgs in{hidden, w.in_proj, projected, 1, tokens, w.D, N_in, 0, w.D, 0, 0, N_in, w.dtype, threads};
  batched_linear(&in);
  const T* query = projected;
  int64_t query_stride = N_in;
  if (w.q_rank) {
    for (int64_t t = 0; t < tokens; ++t)
      norm_row(projected + t * N_in, static_cast<const T*>(w.q_norm), w.q_rank, float(w.eps), latent + t * w.q_rank);
    const LinearArgs lift{latent, w.q_up, lifted, 1, tokens, w.q_rank, query_width, 0, w.q_rank, 0, 0, query_width,
                          w.dtype, threads};
    batched_linear(&lift);
    query = lifted;
    query_stride = query_width;
  }
  for (int64_t t = 0; t < tokens; ++t) {
    if (slots[t] < 0) continue;  // padding
    const T* from = projected + t * N_in + first;
    T* to = static_cast<T*>(w.cache) + slots[t] / w.block_size * w.block_stride + slots[t] % w.block_size * w.row_stride;
    norm_row(from, static_cast<const T*>(w.latent_norm), w.rank, float(w.eps), to);
    std::memcpy(to + w.rank, from + w.rank, w.rope * sizeof(T));
  }
  // The keys' up projection goes to the query, so that scores are products with the latent itself.
  const LinearArgs absorb{query,    w.key_up,     absorbed,        w.H, tokens,    w.nope,  w.rank, head,
                          query_stride, w.rank * w.nope, row, w.H * row, w.dtype, threads};
  batched_linear(&absorb);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t h = 0; h < w.H; ++h)
      std::memcpy(absorbed + (t * w.H + h) * row + w.rank, query + t * query_stride + h * head + w.nope,
                  w.rope * sizeof(T));
  mla_paged_attention(absorbed, w.dtype, w.cache, w.dtype, w.block_size, w.block_stride, w.row_stride, block_table,
                      table_stride, seq_lens, cu_query, mixed, N, tokens, w.H, row, w.rank, float(w.scale), threads);
  const LinearArgs lower{mixed,        w.value_up,     values, w.H, tokens,    w.rank,  w.v, w.rank,
                         w.H * w.rank, w.value_stride, w.v,    w.H * w.v, w.dtype, threads};
  batched_linear(&lower);
  const LinearArgs down{values, w.o_proj, out, 1, tokens, w.H * w.v, w.O, 0, w.H * w.v, 0, 0, w.O, w.dtype, threads};
  batched_linear(&down);
}

}  // namespace

// hidden [T, D], normed; out [T, O]. slots [T]: the cache row of each token, -1 for padding; the others as for
// mla_paged_attention.
void mla_decode_layer(const MlaWeights* w, const void* hidden, void* out, int64_t T, int64_t N, const int64_t* slots,
                      const int32_t* block_table, int64_t table_stride, const int32_t* seq_lens,
                      const int32_t* cu_query) {
  if (w->dtype == 0) {
    mla_layer(*w, static_cast<const float*>(hidden), static_cast<float*>(out), T, N, slots, block_table, table_stride,
              seq_lens, cu_query);
  } else {
    mla_layer(*w, static_cast<const bf16*>(hidden), static_cast<bf16*>(out), T, N, slots, block_table, table_stride,
              seq_lens, cu_query);
  }
}
KIMI_EXPORT(mla_decode_layer);

// x and out [T, D]: the choice of moe_route, then moe_experts.
void moe_layer(const MoeWeights* w, const void* x, void* out, int64_t T) {
  const int64_t choices = T * (w->k + w->shared);
  Room room(2 * Room::padded(4 * choices));
  int32_t* ids = static_cast<int32_t*>(room.take(4 * choices));
  float* weights = static_cast<float*>(room.take(4 * choices));
  moe_route(x, w->gate, w->bias, ids, weights, T, w->E, w->D, w->k, w->groups, w->kept, w->shared, w->renormalize,
            float(w->factor), w->dtype, w->threads);
  moe_experts(x, w->w13, w->w2, ids, weights, out, T, w->k + w->shared, w->E + w->shared, w->D, w->I, w->dtype,
              w->threads);
}
KIMI_EXPORT(moe_layer);

}  // namespace kimi::KIMI_ISA
