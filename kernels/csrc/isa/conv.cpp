// Depthwise causal convolution over packed sequences, with optional SiLU and a state that carries the last W inputs.
#include <cstdlib>
#include <type_traits>

#include "isa.h"
#include "simd.h"

namespace kimi::KIMI_ISA {
namespace {

constexpr int64_t kTokens = 256;    // tokens in a work item; also the fixed grouping of the weight gradient's sums
constexpr int64_t kChannels = 256;  // channels in a work item: its rows and weights stay in the first-level cache

struct Problem {
  const void* x;
  int64_t x_stride;      // elements between tokens
  const float* weight;   // [W, D], oldest input first
  const float* bias;     // [D] or null
  const float* initial;  // [N, D, W] or null: the W inputs before the sequence
  const int64_t* offsets;
  int64_t N, D;
  bool silu;
};

// Tokens first .. last of a sequence, counted from its start, and a block of channels.
struct Item {
  int64_t sequence, begin, length, first, last, channel, channels;
};

KIMI_INLINE int lanes_left(int64_t d, int64_t D) { return D - d < kLanes ? int(D - d) : kLanes; }

struct Plan {
  int64_t *sequence, *first;
  int64_t chunks, blocks;
};

Plan plan(const Problem& p) {
  Plan out{nullptr, nullptr, 0, (p.D + kChannels - 1) / kChannels};
  for (int64_t n = 0; n < p.N; ++n) out.chunks += (p.offsets[n + 1] - p.offsets[n] + kTokens - 1) / kTokens;
  out.sequence = static_cast<int64_t*>(std::malloc((2 * out.chunks + 1) * sizeof(int64_t)));
  out.first = out.sequence + out.chunks;
  int64_t at = 0;
  for (int64_t n = 0; n < p.N; ++n) {
    for (int64_t t = 0; t < p.offsets[n + 1] - p.offsets[n]; t += kTokens) {
      out.sequence[at] = n;
      out.first[at++] = t;
    }
  }
  return out;
}

Item item(const Problem& p, const Plan& pl, int64_t chunk, int64_t block) {
  Item i;
  i.sequence = pl.sequence[chunk];
  i.begin = p.offsets[i.sequence];
  i.length = p.offsets[i.sequence + 1] - i.begin;
  i.first = pl.first[chunk];
  i.last = i.first + kTokens < i.length ? i.first + kTokens : i.length;
  i.channel = block * kChannels;
  i.channels = p.D - i.channel < kChannels ? p.D - i.channel : kChannels;
  return i;
}

// Input t of the item's sequence as fp32; t < 0 is the initial state.
template <class T>
void read_row(const Problem& p, const Item& i, int64_t W, int64_t t, float* row) {
  if (t >= 0) {
    const T* x = static_cast<const T*>(p.x) + (i.begin + t) * p.x_stride + i.channel;
    for (int64_t d = 0; d < i.channels; d += kLanes) store(row + d, load_n(x + d, lanes_left(d, i.channels)));
  } else if (p.initial) {
    const float* state = p.initial + (i.sequence * p.D + i.channel) * W + W + t;
    for (int64_t d = 0; d < i.channels; ++d) row[d] = state[d * W];
  } else {
    std::memset(row, 0, kChannels * sizeof(float));
  }
}

// The last W rows of a running sequence; row(t) is valid for the W latest t, which may be negative.
template <int W>
struct Ring {
  float memory[W][kChannels];
  float* row(int64_t t) { return memory[(t + 2 * W) % W]; }
};

template <int W>
KIMI_INLINE vf convolve(const Problem& p, const Item& i, Ring<W>& x, int64_t t, int64_t d) {
  const int m = lanes_left(d, i.channels);
  vf acc = p.bias ? load_n(p.bias + i.channel + d, m) : vf{};
#pragma GCC unroll 8
  for (int j = 0; j < W; ++j)
    acc += load_n(p.weight + j * p.D + i.channel + d, m) * load(x.row(t - (W - 1) + j) + d);
  return acc;
}

template <class T, int W>
void forward(const Problem& p, T* y, int threads) {
  Plan pl = plan(p);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t work = 0; work < pl.chunks * pl.blocks; ++work) {
    const Item i = item(p, pl, work / pl.blocks, work % pl.blocks);
    Ring<W> x;
    for (int64_t t = i.first - (W - 1); t < i.first; ++t) read_row<T>(p, i, W, t, x.row(t));
    for (int64_t t = i.first; t < i.last; ++t) {
      read_row<T>(p, i, W, t, x.row(t));
      T* to = y + (i.begin + t) * p.D + i.channel;
      for (int64_t d = 0; d < i.channels; d += kLanes) {
        vf z = convolve<W>(p, i, x, t, d);
        store_n(to + d, p.silu ? z * vsigmoid(z) : z, lanes_left(d, i.channels));
      }
    }
  }
  std::free(pl.sequence);
}

// final[n, d, j]: input length - W + j of sequence n, reaching back into the initial state.
template <class T>
void write_final(const Problem& p, int64_t W, float* final) {
  for (int64_t n = 0; n < p.N; ++n) {
    const int64_t begin = p.offsets[n], length = p.offsets[n + 1] - begin;
    for (int64_t j = 0; j < W; ++j) {
      const int64_t t = length - W + j;
      for (int64_t d = 0; d < p.D; ++d) {
        float v = 0;
        if (t >= 0) {
          v = to_float(static_cast<const T*>(p.x)[(begin + t) * p.x_stride + d]);
        } else if (p.initial) {
          v = p.initial[(n * p.D + d) * W + W + t];
        }
        final[(n * p.D + d) * W + j] = v;
      }
    }
  }
}

template <class T, int W>
void backward(const Problem& p, const T* dy, const float* dfinal, T* dx, float* dweight, float* dbias, float* dinitial,
              int threads) {
  Plan pl = plan(p);
  float* partial = static_cast<float*>(std::calloc(pl.chunks * (W + 1) * p.D + 1, sizeof(float)));
  if (dinitial) {  // gradients of states that no token reads: they can only come from the final state
    for (int64_t n = 0; n < p.N; ++n) {
      const bool empty = p.offsets[n + 1] == p.offsets[n];
      for (int64_t c = n * p.D * W; c < (n + 1) * p.D * W; ++c) dinitial[c] = empty && dfinal ? dfinal[c] : 0.0f;
    }
  }
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t work = 0; work < pl.chunks * pl.blocks; ++work) {
    const int64_t chunk = work / pl.blocks;
    const Item i = item(p, pl, chunk, work % pl.blocks);
    float* dw = partial + chunk * (W + 1) * p.D + i.channel;
    Ring<W> x, dz;
    std::memset(&dz, 0, sizeof dz);
    for (int64_t t = i.first - (W - 1); t < i.first; ++t) read_row<T>(p, i, W, t, x.row(t));
    for (int64_t t = i.first; t < i.last + W - 1; ++t) {
      float* g_row = dz.row(t);
      if (t < i.length) {
        read_row<T>(p, i, W, t, x.row(t));
        const T* from = dy + (i.begin + t) * p.D + i.channel;
        for (int64_t d = 0; d < i.channels; d += kLanes) {
          const int m = lanes_left(d, i.channels);
          vf g = load_n(from + d, m);
          if (p.silu) {
            vf z = convolve<W>(p, i, x, t, d), s = vsigmoid(z);
            g *= s + z * s * (1.0f - s);
          }
          store(g_row + d, g);
          if (t < i.last) {
#pragma GCC unroll 8
            for (int j = 0; j < W; ++j) {
              float* to = dw + j * p.D + d;
              store_n(to, load_n(to, m) + g * load(x.row(t - (W - 1) + j) + d), m);
            }
            float* to = dw + W * p.D + d;
            store_n(to, load_n(to, m) + g, m);
          }
        }
      } else {
        std::memset(g_row, 0, kChannels * sizeof(float));
      }
      // Input s is now complete: it was read by tokens s .. s + W - 1.
      const int64_t s = t - (W - 1), kept = s - (i.length - W);
      if (s < i.first && (i.first > 0 || !dinitial)) continue;
      float done[kChannels];
      for (int64_t d = 0; d < i.channels; d += kLanes) {
        const int m = lanes_left(d, i.channels);
        vf acc{};
#pragma GCC unroll 8
        for (int j = 0; j < W; ++j)
          acc += load_n(p.weight + j * p.D + i.channel + d, m) * load(dz.row(t - j) + d);
        store(done + d, acc);
      }
      const int64_t state = (i.sequence * p.D + i.channel) * W;
      if (dfinal && kept >= 0)
        for (int64_t d = 0; d < i.channels; ++d) done[d] += dfinal[state + d * W + kept];
      if (s >= 0) {
        T* to = dx + (i.begin + s) * p.D + i.channel;
        for (int64_t d = 0; d < i.channels; d += kLanes) store_n(to + d, load(done + d), lanes_left(d, i.channels));
      } else {
        for (int64_t d = 0; d < i.channels; ++d) dinitial[state + d * W + W + s] = done[d];
      }
    }
  }
  std::memset(dweight, 0, W * p.D * sizeof(float));
  if (dbias) std::memset(dbias, 0, p.D * sizeof(float));
  for (int64_t chunk = 0; chunk < pl.chunks; ++chunk) {
    const float* from = partial + chunk * (W + 1) * p.D;
    for (int64_t c = 0; c < W * p.D; ++c) dweight[c] += from[c];
    if (dbias)
      for (int64_t d = 0; d < p.D; ++d) dbias[d] += from[W * p.D + d];
  }
  std::free(partial);
  std::free(pl.sequence);
}

// Call f with the kernel width as a compile-time number.
template <class F>
void with_width(int64_t W, F f) {
  switch (W) {
    case 2: return f(std::integral_constant<int, 2>());
    case 3: return f(std::integral_constant<int, 3>());
    case 4: return f(std::integral_constant<int, 4>());
    case 5: return f(std::integral_constant<int, 5>());
    case 6: return f(std::integral_constant<int, 6>());
    case 7: return f(std::integral_constant<int, 7>());
    case 8: return f(std::integral_constant<int, 8>());
  }
}

}  // namespace

// x [tokens, D] with row stride x_stride; y contiguous; offsets [N + 1]; initial and final [N, D, W] or null.
void causal_conv1d_forward(const void* x, int64_t x_stride, const float* weight, const float* bias,
                           const float* initial, const int64_t* offsets, void* y, float* final, int64_t N, int64_t D,
                           int64_t W, int64_t silu, int64_t dtype, int64_t threads) {
  const Problem p{x, x_stride, weight, bias, initial, offsets, N, D, silu != 0};
  with_width(W, [&](auto width) {
    if (dtype == 0) {
      forward<float, width()>(p, static_cast<float*>(y), int(threads));
    } else {
      forward<bf16, width()>(p, static_cast<bf16*>(y), int(threads));
    }
  });
  if (final && dtype == 0) write_final<float>(p, W, final);
  if (final && dtype == 1) write_final<bf16>(p, W, final);
}
KIMI_EXPORT(causal_conv1d_forward);

// dweight [W, D]; bias, initial, dfinal, dbias and dinitial may be null (dinitial only if initial is).
void causal_conv1d_backward(const void* x, int64_t x_stride, const float* weight, const float* bias,
                            const float* initial, const int64_t* offsets, const void* dy, const float* dfinal, void* dx,
                            float* dweight, float* dbias, float* dinitial, int64_t N, int64_t D, int64_t W,
                            int64_t silu, int64_t dtype, int64_t threads) {
  const Problem p{x, x_stride, weight, bias, initial, offsets, N, D, silu != 0};
  with_width(W, [&](auto width) {
    if (dtype == 0) {
      backward<float, width()>(p, static_cast<const float*>(dy), dfinal, static_cast<float*>(dx), dweight, dbias,
                               dinitial, int(threads));
    } else {
      backward<bf16, width()>(p, static_cast<const bf16*>(dy), dfinal, static_cast<bf16*>(dx), dweight, dbias,
                              dinitial, int(threads));
    }
  });
}
KIMI_EXPORT(causal_conv1d_backward);

}  // namespace kimi::KIMI_ISA
