// One tile of at most kTile tokens of one head, in matrix form (Kimi Linear, section 2 and equations 6-9).
//
// With G the running sum of the log decay from the start of the tile, S the state before it and D = diag(beta):
//   k~ = k e^G   q~ = q e^G   k^ = k e^(G_last - G)
//   A_ij = <k~_i, k_j e^-G_j> (j < i)      P_ij = <q~_i, k_j e^-G_j> (j <= i)
//   (I + D A) U = D (V - k~ S)    O = q~ S + P U    S' = e^G_last S + k^^T U
// The triangular system is solved by forward substitution: a truncated series is wrong when the decay is slow and keys
// repeat. A tile ends early where the running sum leaves the range in which e^G and e^-G are both exact enough in fp32,
// so any decay is right; where it ends depends on earlier tokens and the next one only, and so do the bits of each row.
#pragma once

#include "conv.h"
#include "gate.h"
#include "scratch.h"

namespace kimi::KIMI_ISA {

constexpr int kTile = 16;
static_assert(kTile % kLanes == 0 && kTile % kRows == 0);

// e^G and e^-G are held as e^G 2^58 and e^-G 2^-58: with G in (-110, 20] both, and their products with unit keys,
// keep about 19 decades from the ends of the normal fp32 range.
constexpr int kShift = 58;
constexpr float kUnshift = 0x1p-58f;
constexpr float kSpan = 110.0f;
constexpr float kGrowth = 20.0f;  // decays are not positive; this only keeps rounding noise and misuse finite

struct TileShape {
  int K, V, Kp, Vp;
  TileShape(int64_t k, int64_t v)
      : K(int(k)), V(int(v)), Kp(round_up(int(k), kPanel)), Vp(round_up(int(v), kPanel)) {}
  int panels() const { return Vp / kPanel; }
  size_t state_floats() const { return size_t(Kp) * Vp; }
};

// Inputs of one (sequence, value head).
struct HeadInputs {
  Rows q, k, v, g, beta;
  ConvRows conv_q, conv_k, conv_v;  // width 0: no convolution
  GateHead gate;
  float scale;
};

struct Tile {
  int rows = 0;
  bool alone = false;  // one row whose own decay is out of range: e^-G is not used
  // [kTile][Kp]; rows past `rows` are zero in all but log_decay
  float *q, *k;              // as the recurrence sees them: normalised, q times scale
  float *log_decay;          // g
  float *grow;               // e^G 2^58
  float *q_grown, *k_grown;  // q~ 2^58, k~ 2^58
  float *k_shrunk;           // k e^-G 2^-58
  float *k_left;             // k^
  float *k_shrunk_t;         // [Kp][kTile]
  float *decay;              // [Kp] e^G_last
  float *A, *P;              // [kTile][kTile], zero outside the triangle
  float *v, *u, *o;          // [kTile][Vp]; u is U
  float beta[kTile], q_rnorm[kTile], k_rnorm[kTile];

  Tile(const TileShape& s, Scratch& scratch) {
    for (float** p : {&q, &k, &log_decay, &grow, &q_grown, &k_grown, &k_shrunk, &k_left}) {
      *p = scratch.floats(size_t(kTile) * s.Kp);
    }
    k_shrunk_t = scratch.floats(size_t(kTile) * s.Kp);
    decay = scratch.floats(s.Kp);
    A = scratch.floats(kTile * kTile);
    P = scratch.floats(kTile * kTile);
    for (float** p : {&v, &u, &o}) *p = scratch.floats(size_t(kTile) * s.Vp);
  }
};

// Rows whose range is checked at once: the sums behind the end of a tile are thrown away.
constexpr int kCheckRows = 4;

// Gates of up to `available` tokens from t0: fills log_decay, grow and decay, decides how many rows the tile has.
inline void tile_decay(Tile& tile, const HeadInputs& in, const TileShape& s, int64_t t0, int available) {
  tile.rows = 0;
  tile.alone = false;
  const float* sum = nullptr;
  while (tile.rows < available) {
    const int count = available - tile.rows < kCheckRows ? available - tile.rows : kCheckRows;
    vf lowest[kCheckRows] = {}, highest[kCheckRows] = {};
    for (int r = 0; r < count; ++r) {
      float* g = tile.log_decay + (tile.rows + r) * s.Kp;
      float* next = tile.grow + (tile.rows + r) * s.Kp;
      load_row(in.g, t0 + tile.rows + r, g, s.Kp);
      for (int c = 0; c < s.Kp; c += kLanes) {
        vf x = in.gate(load(g + c), c);
        if (s.K - c < kLanes) {  // the gate of padding is not 0
          float kept[kLanes] = {};
          store_n(kept, x, s.K > c ? s.K - c : 0);
          x = load(kept);
        }
        store(g + c, x);
        vf total = sum == nullptr ? x : load(sum + c) + x;
        store(next + c, total);
        lowest[r] = vmax(lowest[r], -total);
        highest[r] = vmax(highest[r], total);
      }
      sum = next;
    }
    float low[kCheckRows], high[kCheckRows];
    fold_lanes<kCheckRows, Max>(lowest, low);
    fold_lanes<kCheckRows, Max>(highest, high);
    int inside = 0;
    while (inside < count && low[inside] < kSpan && high[inside] <= kGrowth) ++inside;
    tile.rows += inside;
    if (inside == count) continue;
    if (tile.rows == 0) {
      tile.rows = 1;
      tile.alone = true;
    }
    break;
  }
  for (int i = 0; i < tile.rows * s.Kp; i += kLanes) {
    store(tile.grow + i, exp_shifted(load(tile.grow + i), kShift, kSpan));
  }
  const float* last = tile.grow + (tile.rows - 1) * s.Kp;
  for (int c = 0; c < s.Kp; c += kLanes) store(tile.decay + c, load(last + c) * kUnshift);
}

KIMI_INLINE void load_tile_rows(const Rows& rows, const ConvRows& conv, int64_t t0, int count, float* to, int padded) {
  if (conv.width > 0) {
    conv_silu(conv, rows, t0, count, to, padded);
  } else {
    for (int r = 0; r < count; ++r) load_row(rows, t0 + r, to + r * padded, padded);
  }
  std::memset(to + count * padded, 0, sizeof(float) * (kTile - count) * padded);
}

// 1 / sqrt(sum of squares + eps) of each row.
inline void reciprocal_norms(const float* x, int Kp, float* out) {
  vf sums[kTile];
  for (int r = 0; r < kTile; ++r) sums[r] = squares(x + r * Kp, Kp);
  for (int r = 0; r < kTile; r += kLanes) fold_lanes<kLanes>(sums + r, out + r);
  for (int r = 0; r < kTile; ++r) out[r] = 1.0f / std::sqrt(out[r] + kL2NormEps);
}

// out[i][j] = <left_i, k_shrunk_j> for j < i (or j <= i with the diagonal), 0 elsewhere.
template <bool kDiagonal>
inline void tile_scores(const Tile& tile, const TileShape& s, const float* left, float* out) {
  constexpr int columns = kTile < kPanel ? kTile : kPanel;
  constexpr int vecs = columns / kLanes;
  for (int c0 = 0; c0 < kTile; c0 += columns) {
    for_row_groups(tile.rows, [&](int r0, auto size) {
      constexpr int R = decltype(size)::value;
      vf acc[R][vecs] = {};
      if (r0 + R > c0) {
        multiply_add(acc, left + r0 * s.Kp, s.Kp, 1, tile.k_shrunk_t + c0, kTile, s.K);
      }
      for (int r = 0; r < R; ++r)
        for (int n = 0; n < vecs; ++n) store(out + (r0 + r) * kTile + c0 + n * kLanes, acc[r][n]);
    });
  }
  for (int i = 0; i < kTile; ++i)
    for (int j = i < tile.rows ? i + kDiagonal : 0; j < kTile; ++j) out[i * kTile + j] = 0.0f;
}

// Everything of the tile that does not involve the state. At least one token must be available.
inline void prepare_tile(Tile& tile, const HeadInputs& in, const KdaArgs& args, const TileShape& s, int64_t t0,
                         int available) {
  tile_decay(tile, in, s, t0, available);
  const int rows = tile.rows, Kp = s.Kp;
  load_tile_rows(in.q, in.conv_q, t0, rows, tile.q, Kp);
  load_tile_rows(in.k, in.conv_k, t0, rows, tile.k, Kp);
  if (args.l2norm) {
    reciprocal_norms(tile.q, Kp, tile.q_rnorm);
    reciprocal_norms(tile.k, Kp, tile.k_rnorm);
  } else {
    for (int r = 0; r < kTile; ++r) tile.q_rnorm[r] = tile.k_rnorm[r] = 1.0f;
  }
  for (int r = 0; r < kTile; ++r) tile.beta[r] = r < rows ? write_strength(args, load_scalar(in.beta, t0 + r)) : 0.0f;

  for (int r = 0; r < rows; ++r) {
    vf q_factor = splat(tile.q_rnorm[r] * in.scale), k_factor = splat(tile.k_rnorm[r]);
    for (int c = r * Kp; c < (r + 1) * Kp; c += kLanes) {
      vf q = load(tile.q + c) * q_factor, k = load(tile.k + c) * k_factor, grow = load(tile.grow + c);
      vf shrunk = tile.alone ? vf{} : k / grow;
      store(tile.q + c, q);
      store(tile.k + c, k);
      store(tile.q_grown + c, q * grow);
      store(tile.k_grown + c, k * grow);
      store(tile.k_shrunk + c, shrunk);
    }
  }
  const float* last = tile.grow + (rows - 1) * Kp;
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < Kp; c += kLanes) {
      vf left = tile.alone ? load(tile.k + c) : load(tile.k_shrunk + r * Kp + c) * load(last + c);
      store(tile.k_left + r * Kp + c, left);
    }
  for (float* x : {tile.q_grown, tile.k_grown, tile.k_shrunk, tile.k_left}) {
    std::memset(x + rows * Kp, 0, sizeof(float) * (kTile - rows) * Kp);
  }
  for (int r = 0; r < kTile; r += kLanes)
    for (int c = 0; c < Kp; c += kLanes)
      transpose_block(tile.k_shrunk + r * Kp + c, Kp, tile.k_shrunk_t + c * kTile + r, kTile);

  tile_scores<false>(tile, s, tile.k_grown, tile.A);
  tile_scores<true>(tile, s, tile.q_grown, tile.P);
  if (tile.alone) {
    vf sum{};
    for (int c = 0; c < Kp; c += kLanes) sum += load(tile.q + c) * load(tile.k + c);
    tile.P[0] = hsum(sum);
  }
}

// Rows that a substitution keeps in registers at once.
constexpr int kSolveRows = kLanes == 16 ? 16 : 8;

// Forward substitution on kTile rows of one vector each: u_i = beta_i (x_i - sum over j < i of A_ij u_j), in place.
// With kKeepResidual the brackets are kept instead: u_i is beta_i times them.
template <bool kKeepResidual>
KIMI_INLINE void solve_lower(const Tile& tile, float* u, int64_t stride) {
#pragma GCC unroll 2
  for (int base = 0; base < kTile; base += kSolveRows) {
    vf x[kSolveRows];
#pragma GCC unroll 16
    for (int i = 0; i < kSolveRows; ++i) x[i] = load(u + (base + i) * stride);
    for (int j = 0; j < base; ++j) {
      vf uj = load(u + j * stride);
      if constexpr (kKeepResidual) uj *= splat(tile.beta[j]);
#pragma GCC unroll 16
      for (int i = 0; i < kSolveRows; ++i) x[i] -= splat(tile.A[(base + i) * kTile + j]) * uj;
    }
#pragma GCC unroll 16
    for (int j = 0; j < kSolveRows; ++j) {
      vf uj = x[j] * splat(tile.beta[base + j]);
      if constexpr (!kKeepResidual) x[j] = uj;
#pragma GCC unroll 16
      for (int i = j + 1; i < kSolveRows; ++i) x[i] -= splat(tile.A[(base + i) * kTile + base + j]) * uj;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kSolveRows; ++i) store(u + (base + i) * stride, x[i]);
  }
}

// One panel of u from tile.v and the panel of the state, and of the outputs when asked for; without them, u is the
// residual V - k~ S - A u, which the gradient of beta needs.
template <bool kWithOutput>
inline void panel_solve(Tile& tile, const TileShape& s, const float* S, int panel) {
  const int column = panel * kPanel;
  for (int r = tile.rows; r < kTile; ++r) std::memset(tile.u + r * s.Vp + column, 0, sizeof(float) * kPanel);
  for_row_groups(tile.rows, [&](int r0, auto size) {
    constexpr int R = decltype(size)::value;
    vf acc[R][kPanelVecs] = {};
    multiply_add(acc, tile.k_grown + r0 * s.Kp, s.Kp, 1, S, kPanel, s.K);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int n = 0; n < kPanelVecs; ++n) {
        int64_t at = (r0 + r) * s.Vp + column + n * kLanes;
        store(tile.u + at, load(tile.v + at) - acc[r][n] * kUnshift);
      }
  });
  for (int n = 0; n < kPanelVecs; ++n) solve_lower<!kWithOutput>(tile, tile.u + column + n * kLanes, s.Vp);
  if constexpr (kWithOutput) {
    for_row_groups(tile.rows, [&](int r0, auto size) {
      constexpr int R = decltype(size)::value;
      vf acc[R][kPanelVecs] = {};
      multiply_add(acc, tile.q_grown + r0 * s.Kp, s.Kp, 1, S, kPanel, s.K);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int n = 0; n < kPanelVecs; ++n) acc[r][n] *= kUnshift;
      multiply_add(acc, tile.P + r0 * kTile, kTile, 1, tile.u + column, s.Vp, r0);
      // The triangle on the diagonal, without the products that are masked: 0 * inf from a later token must not enter.
#pragma GCC unroll 16
      for (int j = 0; j < R; ++j) {
        vf uj[kPanelVecs];
#pragma GCC unroll 4
        for (int n = 0; n < kPanelVecs; ++n) uj[n] = load(tile.u + (r0 + j) * s.Vp + column + n * kLanes);
#pragma GCC unroll 16
        for (int r = j; r < R; ++r)
#pragma GCC unroll 4
          for (int n = 0; n < kPanelVecs; ++n) acc[r][n] += splat(tile.P[(r0 + r) * kTile + r0 + j]) * uj[n];
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int n = 0; n < kPanelVecs; ++n) store(tile.o + (r0 + r) * s.Vp + column + n * kLanes, acc[r][n]);
    });
  }
}

// S = e^G_last S + k^^T u on one panel. kDepth: the rows of the tile where known, so that the loop over them unrolls.
template <int kDepth>
inline void panel_update_rows(const Tile& tile, const TileShape& s, float* S, int panel) {
  for (int k0 = 0; k0 < s.Kp; k0 += kRows) {
    vf acc[kRows][kPanelVecs];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int n = 0; n < kPanelVecs; ++n) {
        acc[r][n] = load(S + (k0 + r) * kPanel + n * kLanes) * splat(tile.decay[k0 + r]);
      }
    const int depth = kDepth > 0 ? kDepth : tile.rows;
    multiply_add(acc, tile.k_left + k0, 1, s.Kp, tile.u + panel * kPanel, s.Vp, depth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int n = 0; n < kPanelVecs; ++n) store(S + (k0 + r) * kPanel + n * kLanes, acc[r][n]);
  }
}

inline void panel_update(const Tile& tile, const TileShape& s, float* S, int panel) {
  if (tile.rows == kTile) {
    panel_update_rows<kTile>(tile, s, S, panel);
  } else {
    panel_update_rows<0>(tile, s, S, panel);
  }
}

}  // namespace kimi::KIMI_ISA
