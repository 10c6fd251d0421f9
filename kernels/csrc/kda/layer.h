// What surrounds the delta rule when serving: conv filters and states of a head, gated RMSNorm of its output.
#pragma once

#include "recurrent.h"

namespace kimi::KIMI_ISA {

// Every second lane of [a | b]: the even ones, or the odd ones.
template <int kOdd, int... I>
KIMI_INLINE vf every_second(vf a, vf b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (2 * I + kOdd)...);
}

// Filters of width 4 for kLanes channels: from [channel][tap] to [tap][channel].
template <class T>
KIMI_INLINE void split_taps4(const T* from, float* to, int padded) {
  constexpr std::make_integer_sequence<int, kLanes> lanes{};
  vf x0 = load(from), x1 = load(from + kLanes), x2 = load(from + 2 * kLanes), x3 = load(from + 3 * kLanes);
  vf even_low = every_second<0>(x0, x1, lanes), even_high = every_second<0>(x2, x3, lanes);
  vf odd_low = every_second<1>(x0, x1, lanes), odd_high = every_second<1>(x2, x3, lanes);
  store(to, every_second<0>(even_low, even_high, lanes));
  store(to + padded, every_second<0>(odd_low, odd_high, lanes));
  store(to + 2 * padded, every_second<1>(even_low, even_high, lanes));
  store(to + 3 * padded, every_second<1>(odd_low, odd_high, lanes));
}

template <class T>
inline void load_filter_as(const T* from, int width, int count, int padded, float* to) {
  int c = 0;
  if (width == 4) {
    for (; c + kLanes <= count; c += kLanes) split_taps4(from + c * 4, to + c, padded);
  }
  for (; c < padded; ++c)
    for (int w = 0; w < width; ++w) to[w * padded + c] = c < count ? to_float(from[c * width + w]) : 0.0f;
}

inline void load_filter(const KdaLayer& layer, int64_t channel, int count, int padded, float* to) {
  const int width = int(layer.conv_width);
  const int64_t bytes = int64_t(width) * (layer.conv_weight_dtype == 1 ? 2 : 4);
  prefetch_span(static_cast<const char*>(layer.conv_weight) + (channel + count) * bytes, count * bytes);
  if (layer.conv_weight_dtype == 1) {
    load_filter_as(static_cast<const bf16*>(layer.conv_weight) + channel * width, width, count, padded, to);
  } else {
    load_filter_as(static_cast<const float*>(layer.conv_weight) + channel * width, width, count, padded, to);
  }
}

// `count` channels of one entry of a sequence's conv state.
struct ConvEntry {
  char* base;
  int64_t stride_channel;
  bool is_bf16;
  ConvEntry(const KdaLayer& layer, int64_t slot, int64_t entry, int64_t channel)
      : stride_channel(layer.conv_stride_channel), is_bf16(layer.conv_state_dtype == 1) {
    int64_t offset = slot * layer.conv_stride_slot + entry * layer.conv_stride_entry + channel * stride_channel;
    base = static_cast<char*>(layer.conv_state) + offset * (is_bf16 ? 2 : 4);
  }
  void read(float* to, int count, int padded) const {
    if (stride_channel == 1) {
      const Rows row{base, 0, count, is_bf16};
      prefetch_next(row);
      load_row(row, 0, to, padded);
      return;
    }
    for (int c = 0; c < padded; ++c) {
      if (c >= count) {
        to[c] = 0.0f;
      } else if (is_bf16) {
        to[c] = to_float(reinterpret_cast<const bf16*>(base)[c * stride_channel]);
      } else {
        to[c] = reinterpret_cast<const float*>(base)[c * stride_channel];
      }
    }
  }
  void write(const float* from, int count) {
    if (stride_channel == 1) {
      Rows rows{base, 0, count, is_bf16};
      store_row(rows, 0, from);
      return;
    }
    for (int c = 0; c < count; ++c) {
      if (is_bf16) {
        put(reinterpret_cast<bf16*>(base) + c * stride_channel, from[c]);
      } else {
        reinterpret_cast<float*>(base)[c * stride_channel] = from[c];
      }
    }
  }
};

// The width - 1 inputs before the sequence's first token, from entry `first_entry` on; slot < 0: zeros.
inline void load_history(const KdaLayer& layer, int64_t slot, int64_t first_entry, int64_t channel, int count,
                         int padded, float* to) {
  for (int i = 0; i < layer.conv_width - 1; ++i) {
    if (slot < 0) {
      std::memset(to + i * padded, 0, sizeof(float) * padded);
    } else {
      ConvEntry(layer, slot, first_entry + i, channel).read(to + i * padded, count, padded);
    }
  }
}

// Channels of the three convolutions in the packed projection: all q heads, all k heads, all v heads.
struct LayerChannels {
  int64_t q, k, v;
  LayerChannels(const KdaArgs& args, int64_t qk_head, int64_t v_head)
      : q(qk_head * args.K), k((args.H + qk_head) * args.K), v(2 * args.H * args.K + v_head * args.V) {}
};

// Output row of one token and head: RMSNorm over its channels, times the sigmoid of the gate.
inline void gated_norm(const KdaLayer& layer, const float* o, const Rows& gate, int64_t t, const TileShape& s,
                       Rows& out) {
  alignas(64) float row[kMaxHead + kPanel], gates[kMaxHead + kPanel];
  float mean = hsum(squares(o, s.Vp)) / float(s.V);
  float factor = 1.0f / std::sqrt(mean + float(layer.norm_eps));
  load_row(gate, t, gates, s.Vp);
  for (int c = 0; c < s.V; c += kLanes) {
    vf weight = load_upto(layer.norm_weight + c, s.V - c);
    store(row + c, load(o + c) * factor * weight * vsigmoid(load(gates + c)));
  }
  store_row(out, t, row);
}

}  // namespace kimi::KIMI_ISA
