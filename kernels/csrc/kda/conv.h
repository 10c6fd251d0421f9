// Short causal convolution with SiLU in front of q, k and v (Kimi Linear, section 4), for the tokens of one tile.
#pragma once

#include "problem.h"

namespace kimi::KIMI_ISA {

constexpr int kMaxConvWidth = 8;
constexpr int kMaxConvRows = 16;  // tokens convolved at once
constexpr int kMaxHead = 256;     // channels of one head

// The filter and the past of one head's channels, in fp32. Width 0: there is no convolution.
struct ConvRows {
  int width = 0;
  const float* weight = nullptr;   // [width][padded], oldest tap first
  const float* history = nullptr;  // [width - 1][padded]: the inputs before token 0 of the sequence
};

// to[r] = silu(sum over taps of weight * input) for tokens t0 .. t0 + count - 1 of the sequence.
inline void conv_silu(const ConvRows& conv, const Rows& x, int64_t t0, int count, float* to, int padded) {
  alignas(64) float inputs[(kMaxConvRows + kMaxConvWidth - 1) * kMaxHead];
  const int past = conv.width - 1;
  for (int i = 0; i < past + count; ++i) {
    int64_t t = t0 - past + i;
    if (t >= 0) {
      load_row(x, t, inputs + i * padded, padded);
    } else {
      std::memcpy(inputs + i * padded, conv.history + (past + t) * padded, sizeof(float) * padded);
    }
  }
  for (int c = 0; c < padded; c += kLanes) {
    for (int r = 0; r < count; ++r) {
      vf sum{};
      for (int w = 0; w < conv.width; ++w) {
        sum += load(conv.weight + w * padded + c) * load(inputs + (r + w) * padded + c);
      }
      store(to + r * padded + c, sum * vsigmoid(sum));
    }
  }
}

}  // namespace kimi::KIMI_ISA
