// Mixture of SwiGLU experts: out[t] = sum_j weight[t, j] * w2[e] (silu(w1[e] x[t]) * (w3[e] x[t])) with e = ids[t, j].
//
// Tokens are grouped by expert; threads share out blocks of weight rows, so that each row is read once. A token's terms
// are added in the order of the experts, whoever computes them: it gets the same bits in any batch.
// The router: sigmoid scores, and the experts whose score plus bias is largest.
#include <cmath>
#include <cstdlib>

#include "dots.h"
#include "isa.h"
#include "kernels.h"
#include "simd.h"

namespace kimi::KIMI_ISA {
namespace {

constexpr int64_t kBlock = 16;   // weight rows in a work item
constexpr int64_t kRowTile = 32;  // tokens whose sums are held at once
// With more tokens than this an expert's bf16 rows are widened once for all of them.
constexpr int64_t kWidenAbove = 8;

float* aligned_floats(int64_t count) {
  return static_cast<float*>(std::aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64 + 64));
}

// The pairs (token, choice) of each expert: those of expert e are at start[e] .. start[e + 1].
struct Groups {
  int64_t *start, *token, *active;
  float* weight;
  int64_t actives, most;
};

// Rows of weights as the products read them: where many tokens share bf16 rows that this CPU cannot multiply as they
// are, they are widened once for all of those tokens.
template <class T>
void product(const Left<T>* a, int64_t R, const T* w, int64_t rows, int64_t K, const float* wide, float* sums) {
  if constexpr (std::is_same_v<Left<T>, float>) {
    if (wide) return dots(a, K, R, wide, K, rows, K, sums, kBlock);
  }
  dots(a, K, R, w, K, rows, K, sums, kBlock);
}

template <class T>
const float* widened(const T* w, int64_t rows, int64_t K, int64_t tokens, float* wide) {
  if (std::is_same_v<Left<T>, T> || tokens <= kWidenAbove) return nullptr;
  for (int64_t i = 0; i < rows * K; i += kLanes) {
    const int m = rows * K - i < kLanes ? int(rows * K - i) : kLanes;
    store_n(wide + i, load_n(w + i, m), m);
  }
  return wide;
}

template <class T>
void experts(const T* x, const T* w13, const T* w2, const Groups& g, T* out, int64_t tokens, int64_t E, int64_t D,
             int64_t I, int threads) {
  using L = Left<T>;
  const int64_t pairs = g.start[E];
  float* copies = aligned_floats(tokens * D + pairs * I);
  L* hidden = reinterpret_cast<L*>(copies + tokens * D);
  int64_t ld = 0;
  const L* rows_x = left_rows(x, D, tokens, D, reinterpret_cast<L*>(copies), &ld);
  const int64_t up_blocks = (I + kBlock - 1) / kBlock, down_blocks = (D + kBlock - 1) / kBlock;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int64_t longest = (D > I ? D : I);
    float* rows_a = aligned_floats(2 * kBlock * longest + g.most * longest + 2 * kRowTile * kBlock + tokens * kBlock);
    float* rows_b = rows_a + kBlock * longest;
    L* gathered = reinterpret_cast<L*>(rows_b + kBlock * longest);
    float *sums_a = rows_b + kBlock * longest + g.most * longest, *sums_b = sums_a + kRowTile * kBlock;
    float* total = sums_b + kRowTile * kBlock;
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < g.actives * up_blocks; ++item) {
      const int64_t e = g.active[item / up_blocks], first = item % up_blocks * kBlock;
      const int64_t rows = I - first < kBlock ? I - first : kBlock;
      const int64_t begin = g.start[e], count = g.start[e + 1] - begin;
      const T *gate = w13 + (e * 2 * I + first) * D, *up = gate + I * D;
      const float* wide_gate = widened(gate, rows, D, count, rows_a);
      const float* wide_up = widened(up, rows, D, count, rows_b);
      for (int64_t r0 = 0; r0 < count; r0 += kRowTile) {
        const int64_t R = count - r0 < kRowTile ? count - r0 : kRowTile;
        const L* a = rows_x + g.token[begin + r0] * D;
        if (R > 1) {
          for (int64_t r = 0; r < R; ++r)
            std::memcpy(gathered + r * D, rows_x + g.token[begin + r0 + r] * D, D * sizeof(L));
          a = gathered;
        }
        product(a, R, gate, rows, D, wide_gate, sums_a);
        product(a, R, up, rows, D, wide_up, sums_b);
        for (int64_t r = 0; r < R; ++r) {
          L* h = hidden + (begin + r0 + r) * I + first;
          for (int64_t n = 0; n < rows; n += kLanes) {
            const int m = rows - n < kLanes ? int(rows - n) : kLanes;
            vf z = load_n(sums_a + r * kBlock + n, m);
            store_n(h + n, z * vsigmoid(z) * load_n(sums_b + r * kBlock + n, m), m);
          }
        }
      }
    }
#pragma omp for schedule(dynamic)
    for (int64_t block = 0; block < down_blocks; ++block) {
      const int64_t first = block * kBlock, rows = D - first < kBlock ? D - first : kBlock;
      std::memset(total, 0, tokens * kBlock * sizeof(float));
      for (int64_t i = 0; i < g.actives; ++i) {
        const int64_t e = g.active[i], begin = g.start[e], count = g.start[e + 1] - begin;
        const T* w = w2 + (e * D + first) * I;
        const float* wide = widened(w, rows, I, count, rows_a);
        for (int64_t r0 = 0; r0 < count; r0 += kRowTile) {
          const int64_t R = count - r0 < kRowTile ? count - r0 : kRowTile;
          product(hidden + (begin + r0) * I, R, w, rows, I, wide, sums_a);
          for (int64_t r = 0; r < R; ++r) {
            const vf scale = splat(g.weight[begin + r0 + r]);
            float* to = total + g.token[begin + r0 + r] * kBlock;
            for (int64_t n = 0; n < kBlock; n += kLanes)
              store(to + n, load(to + n) + scale * load(sums_a + r * kBlock + n));
          }
        }
      }
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t n = 0; n < rows; n += kLanes)
          store_n(out + t * D + first + n, load(total + t * kBlock + n), rows - n < kLanes ? int(rows - n) : kLanes);
    }
    std::free(rows_a);
  }
  std::free(copies);
}

}  // namespace

// x, out [T, D]; w13 [E, 2 I, D], gate rows first; w2 [E, D, I]; ids and weights [T, k]. Ids outside 0..E-1 are skipped.
void moe_experts(const void* x, const void* w13, const void* w2, const int32_t* ids, const float* weights, void* out,
                 int64_t tokens, int64_t k, int64_t E, int64_t D, int64_t I, int64_t dtype, int64_t threads) {
  int64_t* counts = static_cast<int64_t*>(std::calloc(3 * E + 1 + tokens * k + 1, sizeof(int64_t)));
  float* grouped = static_cast<float*>(std::malloc((tokens * k + 1) * sizeof(float)));
  Groups g{counts, counts + 3 * E + 1, counts + E + 1, grouped, 0, 0};
  int64_t* next = counts + 2 * E + 1;
  for (int64_t i = 0; i < tokens * k; ++i)
    if (ids[i] >= 0 && ids[i] < E) ++next[ids[i]];
  for (int64_t e = 0; e < E; ++e) {
    const int64_t count = next[e];
    if (count) g.active[g.actives++] = e;
    g.most = count > g.most ? count : g.most;
    next[e] = g.start[e];
    g.start[e + 1] = g.start[e] + count;
  }
  g.most = g.most < kRowTile ? g.most : kRowTile;
  for (int64_t i = 0; i < tokens * k; ++i) {
    if (ids[i] < 0 || ids[i] >= E) continue;
    g.token[next[ids[i]]] = i / k;
    g.weight[next[ids[i]]++] = weights[i];
  }
  const int team = g.start[E] * I * D < 1 << 16 ? 1 : int(threads);
  if (dtype == 0) {
    experts(static_cast<const float*>(x), static_cast<const float*>(w13), static_cast<const float*>(w2), g,
            static_cast<float*>(out), tokens, E, D, I, team);
  } else {
    experts(static_cast<const bf16*>(x), static_cast<const bf16*>(w13), static_cast<const bf16*>(w2), g,
            static_cast<bf16*>(out), tokens, E, D, I, team);
  }
  std::free(grouped);
  std::free(counts);
}
KIMI_EXPORT(moe_experts);

namespace {

// The positions of the `count` largest of n values, largest first; of equal values the first wins. Marks them with -inf.
void take_largest(float* values, int64_t n, int64_t count, int32_t* taken) {
  for (int64_t i = 0; i < count; ++i) {
    int64_t best = 0;
    for (int64_t j = 1; j < n; ++j)
      if (values[j] > values[best]) best = j;
    taken[i] = int32_t(best);
    values[best] = -INFINITY;
  }
}

// Only the experts of the `kept` groups with the largest sums of their two best choices stay open.
void close_groups(float* choice, int64_t E, int64_t groups, int64_t kept, float* strength, int32_t* open) {
  const int64_t width = E / groups;
  for (int64_t g = 0; g < groups; ++g) {
    float first = -INFINITY, second = -INFINITY;
    for (int64_t j = g * width; j < (g + 1) * width; ++j) {
      second = choice[j] > first ? first : choice[j] > second ? choice[j] : second;
      first = choice[j] > first ? choice[j] : first;
    }
    strength[g] = first + second;
  }
  take_largest(strength, groups, kept, open);
  for (int64_t g = 0; g < groups; ++g) {
    bool stays = false;
    for (int64_t i = 0; i < kept; ++i) stays |= open[i] == g;
    if (!stays)
      for (int64_t j = g * width; j < (g + 1) * width; ++j) choice[j] = -INFINITY;
  }
}

template <class T>
void route(const T* x, const float* gate, const float* bias, int32_t* ids, float* weights, int64_t tokens, int64_t E,
           int64_t D, int64_t k, int64_t groups, int64_t kept, int64_t shared, bool renormalize, float factor,
           int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float* row = aligned_floats(D + 3 * E + 2 * kLanes);
    float *score = row + (D + kLanes - 1) / kLanes * kLanes, *choice = score + E, *strength = choice + E;
    int32_t* open = static_cast<int32_t*>(std::malloc((E + 1) * sizeof(int32_t)));
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t d = 0; d < D; d += kLanes) {
        const int m = D - d < kLanes ? int(D - d) : kLanes;
        store_n(row + d, load_n(x + t * D + d, m), m);
      }
      dots(row, D, 1, gate, D, E, D, score, E);
      for (int64_t e = 0; e < E; e += kLanes) {
        const int m = E - e < kLanes ? int(E - e) : kLanes;
        const vf s = vsigmoid(load_n(score + e, m));
        store_n(score + e, s, m);
        store_n(choice + e, s + load_n(bias + e, m), m);
      }
      if (groups > 1) close_groups(choice, E, groups, kept, strength, open);
      int32_t* chosen = ids + t * (k + shared);
      float* factors = weights + t * (k + shared);
      take_largest(choice, E, k, chosen);
      float sum = 0;
      for (int64_t i = 0; i < k; ++i) sum += factors[i] = score[chosen[i]];
      const float scale = renormalize ? factor / (sum + 1e-20f) : factor;
      for (int64_t i = 0; i < k; ++i) factors[i] *= scale;
      for (int64_t i = 0; i < shared; ++i) chosen[k + i] = int32_t(E + i), factors[k + i] = 1.0f;
    }
    std::free(open);
    std::free(row);
  }
}

}  // namespace

// x [T, D]; gate [E, D] and bias [E] fp32; ids and weights [T, k + shared]. E is a multiple of groups.
void moe_route(const void* x, const float* gate, const float* bias, int32_t* ids, float* weights, int64_t tokens,
               int64_t E, int64_t D, int64_t k, int64_t groups, int64_t kept, int64_t shared, int64_t renormalize,
               float factor, int64_t dtype, int64_t threads) {
  const int team = tokens * E * D < 1 << 16 ? 1 : int(threads);
  if (dtype == 0) {
    route(static_cast<const float*>(x), gate, bias, ids, weights, tokens, E, D, k, groups, kept, shared,
          renormalize != 0, factor, team);
  } else {
    route(static_cast<const bf16*>(x), gate, bias, ids, weights, tokens, E, D, k, groups, kept, shared,
          renormalize != 0, factor, team);
  }
}
KIMI_EXPORT(moe_route);

}  // namespace kimi::KIMI_ISA
