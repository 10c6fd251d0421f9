// Gradients of one tile (tile.h has the forward equations), tiles taken from the last to the first.
//
// With dO given and dS the gradient of the state after the tile:
//   dU = P^T dO + k^ dS            (I + D A)^T dY = dU            dX = D dY = dV
//   dP = tril(dO U^T)              dA = -tril(dX U^T, -1)         d(beta_i) = <dY_i, (X - A U)_i>
//   dq~ = dO S^T + dP k-           dk~ = dA k- - dX S^T           dk- = dP^T q~ + dA^T k~          dk^ = U dS^T
//   dG_r = q~ dq~ + k~ dk~ - k- dk- - k^ dk^, to the last row added: sum_r k^ dk^ + e^G_last sum_v S dS
//   (terms without decay, P_rr and k^ of the last row, cancel in dG: they are left out of it, not subtracted)
//   dS <- e^G_last dS + q~^T dO - k~^T dX
// where k- = k e^-G. Held with the same powers of two as in the forward pass, so that no factor leaves the fp32 range.
#pragma once

#include "forward.h"

namespace kimi::KIMI_ISA {

struct TileGrads {
  float *d_o, *d_u, *d_x, *u_t;                // [kTile][Vp]; u_t [Vp][kTile]
  float *dP, *dA;                              // [kTile][kTile]
  float *dq_grown, *dk_grown, *dk_shrunk, *dk_left;  // [kTile][Kp]; dq_grown and dk_grown end as gradients of q and k
  float *dg;                                   // [kTile][Kp]
  float *d_decay;                              // [Kp]
  float d_beta[kTile];
  float dP_diagonal[kTile];  // <q, k> has no decay: kept out of the products that cancel in dG

  TileGrads(const TileShape& s, Scratch& scratch) {
    for (float** p : {&d_o, &d_u, &d_x, &u_t}) *p = scratch.floats(size_t(kTile) * s.Vp);
    for (float** p : {&dP, &dA}) *p = scratch.floats(kTile * kTile);
    for (float** p : {&dq_grown, &dk_grown, &dk_shrunk, &dk_left, &dg}) *p = scratch.floats(size_t(kTile) * s.Kp);
    d_decay = scratch.floats(s.Kp);
  }
};

// From panels of V columns ([Vp / kPanel][Kp][kPanel]) to panels of K columns ([Kp / kPanel][Vp][kPanel]), and back.
inline void transpose_panels(const float* from, int rows, int columns, float* to) {
  for (int c = 0; c < columns; c += kLanes)
    for (int r = 0; r < rows; r += kLanes)
      transpose_block(from + (c / kPanel * rows + r) * kPanel + c % kPanel, kPanel,
                      to + (r / kPanel * columns + c) * kPanel + r % kPanel, kPanel);
}

// out[i][j] = sign <left_i, u_j> on the lower triangle (with the diagonal or not), 0 elsewhere.
template <bool kDiagonal>
inline void triangle_products(const float* left, const float* u_t, float sign, int rows, const TileShape& s,
                              float* out) {
  constexpr int columns = kTile < kPanel ? kTile : kPanel;
  constexpr int vecs = columns / kLanes;
  for (int c0 = 0; c0 < kTile; c0 += columns) {
    for_row_groups(rows, [&](int r0, auto size) {
      constexpr int R = decltype(size)::value;
      vf acc[R][vecs] = {};
      multiply_add(acc, left + r0 * s.Vp, s.Vp, 1, u_t + c0, kTile, s.V);
      for (int r = 0; r < R; ++r)
        for (int n = 0; n < vecs; ++n) store(out + (r0 + r) * kTile + c0 + n * kLanes, acc[r][n] * splat(sign));
    });
  }
  for (int i = 0; i < kTile; ++i)
    for (int j = i < rows ? i + kDiagonal : 0; j < kTile; ++j) out[i * kTile + j] = 0.0f;
}

// dU = P^T dO + k^ dS, then dY in its place by back substitution, and dX = D dY.
inline void backward_solve(const Tile& tile, TileGrads& d, const TileShape& s, const float* dS) {
  for (int column = 0; column < s.Vp; column += kPanel) {
    for_row_groups(tile.rows, [&](int r0, auto size) {
      constexpr int R = decltype(size)::value;
      vf acc[R][kPanelVecs] = {};
      multiply_add(acc, tile.k_left + r0 * s.Kp, s.Kp, 1, dS + column * s.Kp, kPanel, s.K);
      multiply_add(acc, tile.P + r0, 1, kTile, d.d_o + column, s.Vp, tile.rows);
      for (int r = 0; r < R; ++r)
        for (int n = 0; n < kPanelVecs; ++n) store(d.d_u + (r0 + r) * s.Vp + column + n * kLanes, acc[r][n]);
    });
  }
  for (int i = tile.rows - 1; i >= 0; --i) {
    vf beta = splat(tile.beta[i]);
    for (int c = 0; c < s.Vp; c += kLanes) {
      vf dy = load(d.d_u + i * s.Vp + c);
      for (int j = i + 1; j < tile.rows; ++j) dy -= splat(tile.A[j * kTile + i]) * load(d.d_x + j * s.Vp + c);
      store(d.d_u + i * s.Vp + c, dy);
      store(d.d_x + i * s.Vp + c, dy * beta);
    }
  }
}

// Gradients of the four scaled copies of q and k; St and dSt are the state before the tile and dS, transposed.
inline void backward_rows(const Tile& tile, TileGrads& d, const TileShape& s, const float* St, const float* dSt) {
  for (int column = 0; column < s.Kp; column += kPanel) {
    const float* S_panel = St + column * s.Vp;
    const float* dS_panel = dSt + column * s.Vp;
    for_row_groups(tile.rows, [&](int r0, auto size) {
      constexpr int R = decltype(size)::value;
      auto put = [&](const vf(&acc)[R][kPanelVecs], float* out) {
        for (int r = 0; r < R; ++r)
          for (int n = 0; n < kPanelVecs; ++n) store(out + (r0 + r) * s.Kp + column + n * kLanes, acc[r][n]);
      };
      auto scale = [](vf(&acc)[R][kPanelVecs], float factor) {
        for (int r = 0; r < R; ++r)
          for (int n = 0; n < kPanelVecs; ++n) acc[r][n] *= splat(factor);
      };
      {
        vf acc[R][kPanelVecs] = {};
        multiply_add(acc, d.d_o + r0 * s.Vp, s.Vp, 1, S_panel, kPanel, s.V);
        scale(acc, kUnshift);
        multiply_add(acc, d.dP + r0 * kTile, kTile, 1, tile.k_shrunk + column, s.Kp, tile.rows);
        put(acc, d.dq_grown);
      }
      {
        vf acc[R][kPanelVecs] = {};
        multiply_add(acc, d.d_x + r0 * s.Vp, s.Vp, 1, S_panel, kPanel, s.V);
        scale(acc, -kUnshift);
        multiply_add(acc, d.dA + r0 * kTile, kTile, 1, tile.k_shrunk + column, s.Kp, tile.rows);
        put(acc, d.dk_grown);
      }
      {
        vf acc[R][kPanelVecs] = {};
        multiply_add(acc, tile.u + r0 * s.Vp, s.Vp, 1, dS_panel, kPanel, s.V);
        put(acc, d.dk_left);
      }
      {
        vf acc[R][kPanelVecs] = {};
        multiply_add(acc, d.dP + r0, 1, kTile, tile.q_grown + column, s.Kp, tile.rows);
        multiply_add(acc, d.dA + r0, 1, kTile, tile.k_grown + column, s.Kp, tile.rows);
        put(acc, d.dk_shrunk);
      }
    });
    for (int n = 0; n < kPanel; n += kLanes) {
      vf sum{};
      for (int v = 0; v < s.V; ++v) sum += load(S_panel + v * kPanel + n) * load(dS_panel + v * kPanel + n);
      store(d.d_decay + column + n, sum);
    }
  }
}

// From the gradients of the scaled copies to those of q, k and the log decay.
inline void backward_decay(const Tile& tile, TileGrads& d, const TileShape& s) {
  for (int c = 0; c < s.Kp; c += kLanes) {
    const vf last = load(tile.grow + (tile.rows - 1) * s.Kp + c);
    const int end = tile.rows - 1;  // k^ of the last row is k: no decay
    vf total = load(tile.decay + c) * load(d.d_decay + c);  // gradient of G_last through e^G_last and k^
    for (int r = 0; r < end; ++r) total += load(tile.k_left + r * s.Kp + c) * load(d.dk_left + r * s.Kp + c);
    for (int r = end; r >= 0; --r) {
      const int at = r * s.Kp + c;
      const vf grow = load(tile.grow + at), dq_grown = load(d.dq_grown + at), dk_grown = load(d.dk_grown + at);
      const vf dk_left = load(d.dk_left + at);
      const vf diagonal = splat(d.dP_diagonal[r]);
      vf dq = dq_grown * grow + diagonal * load(tile.k + at);
      vf dk = dk_grown * grow + diagonal * load(tile.q + at);
      total += load(tile.q_grown + at) * dq_grown + load(tile.k_grown + at) * dk_grown;
      if (r == end) {
        dk += dk_left;
      } else {
        const vf dk_shrunk = load(d.dk_shrunk + at);
        total -= load(tile.k_left + at) * dk_left + load(tile.k_shrunk + at) * dk_shrunk;
        dk += (dk_shrunk + dk_left * last) / grow;
      }
      store(d.dq_grown + at, dq);
      store(d.dk_grown + at, dk);
      store(d.dg + at, total);
    }
  }
}

// dS <- e^G_last dS + q~^T dO - k~^T dX.
inline void backward_state(const Tile& tile, const TileGrads& d, const TileShape& s, float* dS) {
  for (int column = 0; column < s.Vp; column += kPanel) {
    float* panel = dS + column * s.Kp;
    for (int k0 = 0; k0 < s.Kp; k0 += kRows) {
      vf from_o[kRows][kPanelVecs] = {}, from_x[kRows][kPanelVecs] = {};
      multiply_add(from_o, tile.q_grown + k0, 1, s.Kp, d.d_o + column, s.Vp, tile.rows);
      multiply_add(from_x, tile.k_grown + k0, 1, s.Kp, d.d_x + column, s.Vp, tile.rows);
      for (int r = 0; r < kRows; ++r)
        for (int n = 0; n < kPanelVecs; ++n) {
          float* at = panel + (k0 + r) * kPanel + n * kLanes;
          store(at, load(at) * splat(tile.decay[k0 + r]) + (from_o[r][n] - from_x[r][n]) * kUnshift);
        }
    }
  }
}

// `tile` is prepared, tile.u holds the residuals and d.d_o the gradient of the outputs, rows past the end zero.
inline void backward_tile(Tile& tile, TileGrads& d, const TileShape& s, const float* St, float* dS, float* dSt) {
  std::memset(d.d_u, 0, sizeof(float) * kTile * s.Vp);
  std::memset(d.d_x, 0, sizeof(float) * kTile * s.Vp);
  transpose_panels(dS, s.Kp, s.Vp, dSt);
  backward_solve(tile, d, s, dS);
  for (int r = 0; r < tile.rows; ++r) {
    vf sum{};
    for (int c = r * s.Vp; c < (r + 1) * s.Vp; c += kLanes) {
      vf residual = load(tile.u + c);
      sum += load(d.d_u + c) * residual;
      store(tile.u + c, residual * splat(tile.beta[r]));
    }
    d.d_beta[r] = hsum(sum);
  }
  for (int r = 0; r < kTile; r += kLanes)
    for (int c = 0; c < s.Vp; c += kLanes) transpose_block(tile.u + r * s.Vp + c, s.Vp, d.u_t + c * kTile + r, kTile);
  triangle_products<true>(d.d_o, d.u_t, 1.0f, tile.rows, s, d.dP);
  for (int r = 0; r < tile.rows; ++r) {
    d.dP_diagonal[r] = d.dP[r * kTile + r];
    d.dP[r * kTile + r] = 0.0f;
  }
  triangle_products<false>(d.d_x, d.u_t, -1.0f, tile.rows, s, d.dA);
  backward_rows(tile, d, s, St, dSt);
  backward_decay(tile, d, s);
  backward_state(tile, d, s, dS);
}

}  // namespace kimi::KIMI_ISA
