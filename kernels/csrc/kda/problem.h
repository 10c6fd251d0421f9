// Addressing: from the arguments of a call to the rows of one (sequence, value head).
#pragma once

#include <cstring>

#include "args.h"
#include "math.h"

namespace kimi::KIMI_ISA {

// Rows of `count` channels, one a token, in fp32 or bf16.
struct Rows {
  char* base;
  int64_t stride_bytes;
  int count;
  bool is_bf16;

  const void* at(int64_t t) const { return base + t * stride_bytes; }
  void* at(int64_t t) { return base + t * stride_bytes; }
};

inline Rows rows_of(const Tokens& x, int64_t batch, int64_t first_token, int64_t head, int count) {
  int64_t size = x.dtype == 1 ? 2 : 4;
  int64_t offset = batch * x.stride_b + first_token * x.stride_t + head * x.stride_h;
  return {static_cast<char*>(x.data) + offset * size, x.stride_t * size, count, x.dtype == 1};
}

KIMI_INLINE void load_row(const Rows& rows, int64_t t, float* to, int padded) {
  const void* p = rows.at(t);
  for (int c = 0; c < padded; c += kLanes) {
    vf x{};
    if (c < rows.count) {
      x = rows.is_bf16 ? load_upto(static_cast<const bf16*>(p) + c, rows.count - c)
                       : load_upto(static_cast<const float*>(p) + c, rows.count - c);
    }
    store(to + c, x);
  }
}

KIMI_INLINE void store_row(Rows& rows, int64_t t, const float* from) {
  void* p = rows.at(t);
  for (int c = 0; c < rows.count; c += kLanes) {
    if (rows.is_bf16) {
      store_upto(static_cast<bf16*>(p) + c, load(from + c), rows.count - c);
    } else {
      store_upto(static_cast<float*>(p) + c, load(from + c), rows.count - c);
    }
  }
}

inline float load_scalar(const Rows& rows, int64_t t) {
  const void* p = rows.at(t);
  return rows.is_bf16 ? to_float(*static_cast<const bf16*>(p)) : *static_cast<const float*>(p);
}

constexpr int64_t kLineBytes = 64;

// Asks for `bytes` of memory that will be needed soon.
KIMI_INLINE void prefetch_span(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kLineBytes) __builtin_prefetch(static_cast<const char*>(p) + i);
}

// Asks for row t, to be used some microseconds from now: into the second-level cache.
KIMI_INLINE void prefetch_row(const Rows& rows, int64_t t) {
  const char* p = static_cast<const char*>(rows.at(t));
  const int64_t bytes = int64_t(rows.count) * (rows.is_bf16 ? 2 : 4);
  for (int64_t i = 0; i < bytes; i += kLineBytes) __builtin_prefetch(p + i, 0, 2);
}

// Asks for the row of the next head, which follows this one.
KIMI_INLINE void prefetch_next(const Rows& rows) {
  const int64_t bytes = int64_t(rows.count) * (rows.is_bf16 ? 2 : 4);
  prefetch_span(rows.base + bytes, bytes);
}

// Where sequence n lies: batch row, first token and length.
struct Span {
  int64_t batch, first, length;
};
inline Span span_of(const KdaArgs& args, int64_t n) {
  if (args.cu_seqlens == nullptr) return {n, 0, args.T};
  return {0, args.cu_seqlens[n], args.cu_seqlens[n + 1] - args.cu_seqlens[n]};
}

// ---- states: on chip [panel][K][kPanel], V padded with zero columns to whole panels, K to whole vectors ----

inline float* state_of(const States& s, int64_t n, int64_t head) {
  return s.data == nullptr ? nullptr : s.data + n * s.stride_n + head * s.stride_h;
}

}  // namespace kimi::KIMI_ISA
