// kda_backward: per (sequence, value head), the states at the tile starts are computed again and kept, then the tiles
// are taken from the last to the first.
#include "isa.h"
#include "kda/tile_backward.h"

namespace kimi::KIMI_ISA {
namespace {

struct Checkpoint {
  int64_t first_token;
  int rows;
  const float* St;         // state before the tile, transposed panels
  const float* residuals;  // [rows][Vp]
};

// Runs the forward pass without outputs. Checkpoints live in `memory`, which is freed with the task: they are as large
// as a state per tile.
std::vector<Checkpoint> forward_again(const KdaArgs& args, const HeadInputs& in, const TileShape& s, int64_t length,
                                      float* S, Tile& tile, Scratch& memory) {
  std::vector<Checkpoint> checkpoints;
  for (int64_t t0 = 0; t0 < length; t0 += tile.rows) {
    prepare_tile(tile, in, args, s, t0, int(length - t0 < kTile ? length - t0 : kTile));
    load_tile_rows(in.v, in.conv_v, t0, tile.rows, tile.v, s.Vp);
    float* St = memory.floats(s.state_floats());
    transpose_panels(S, s.Kp, s.Vp, St);
    float* residuals = memory.floats(size_t(tile.rows) * s.Vp);
    for (int p = 0; p < s.panels(); ++p) panel_solve<false>(tile, s, S + size_t(p) * s.Kp * kPanel, p);
    std::memcpy(residuals, tile.u, sizeof(float) * tile.rows * s.Vp);
    for (int r = 0; r < tile.rows; ++r)
      for (int c = r * s.Vp; c < (r + 1) * s.Vp; c += kLanes) store(tile.u + c, load(tile.u + c) * splat(tile.beta[r]));
    for (int p = 0; p < s.panels(); ++p) panel_update(tile, s, S + size_t(p) * s.Kp * kPanel, p);
    checkpoints.push_back({t0, tile.rows, St, residuals});
  }
  return checkpoints;
}

// Gradient of the raw rows from that of the normalised ones, in place: x -> factor x / |x|.
void backward_norm(const KdaArgs& args, const float* normalised, const float* reciprocal_norms, float factor, int rows,
                   const TileShape& s, float* d) {
  const float unscale = factor != 0.0f ? 1.0f / factor : 0.0f;
  for (int r = 0; r < rows; ++r) {
    const float *y = normalised + r * s.Kp;
    float* dy = d + r * s.Kp;
    float along = 0.0f;
    if (args.l2norm) {
      vf sum{};
      for (int c = 0; c < s.Kp; c += kLanes) sum += load(y + c) * load(dy + c);
      along = hsum(sum) * unscale;
    }
    for (int c = 0; c < s.Kp; c += kLanes) {
      store(dy + c, (load(dy + c) * factor - load(y + c) * along) * reciprocal_norms[r]);
    }
  }
}

// Rows of a contiguous fp32 gradient [B, T, HV, count].
Rows grad_rows(float* data, const KdaArgs& args, const Span& span, int64_t head, int count) {
  const int64_t first = (span.batch * args.T + span.first) * args.HV + head;
  return {reinterpret_cast<char*>(data + first * count), args.HV * count * int64_t(sizeof(float)), count, false};
}

}  // namespace

void kda_backward(const KdaArgs* args, const KdaGrads* grads) {
  const TileShape s(args->K, args->V);
#pragma omp parallel for schedule(dynamic, 1) num_threads(int(args->num_threads))
  for (int64_t task = 0; task < args->N * args->HV; ++task) {
    const int64_t n = task / args->HV, head = task % args->HV;
    const Span span = span_of(*args, n);
    Scratch& scratch = thread_scratch();
    scratch.reset();
    Scratch memory;
    const HeadInputs in = head_inputs(*args, span, head, s, scratch.floats(s.Kp));
    const Columns all = columns_of(s, 0, 1);
    const Rows d_o = rows_of(grads->d_o, span.batch, span.first, head, s.V);
    Rows dq = grad_rows(grads->dq, *args, span, head, s.K), dk = grad_rows(grads->dk, *args, span, head, s.K);
    Rows dv = grad_rows(grads->dv, *args, span, head, s.V), dg = grad_rows(grads->dg, *args, span, head, s.K);
    Rows dbeta = grad_rows(grads->dbeta, *args, span, head, 1);

    float* S = scratch.floats(s.state_floats());
    load_state(args->initial, state_of(args->initial, n, head), s, all, S);
    Tile tile(s, scratch);
    const std::vector<Checkpoint> checkpoints = forward_again(*args, in, s, span.length, S, tile, memory);

    TileGrads d(s, scratch);
    float* dSt = scratch.floats(s.state_floats());
    float* dS = S;
    load_state(grads->d_final, state_of(grads->d_final, n, head), s, all, dS);
    vf d_log_rate{};
    float* d_bias = scratch.floats(s.Kp);
    float* raw = scratch.floats(s.Kp);
    std::memset(d_bias, 0, sizeof(float) * s.Kp);
    for (auto c = checkpoints.rbegin(); c != checkpoints.rend(); ++c) {
      prepare_tile(tile, in, *args, s, c->first_token, c->rows);
      std::memcpy(tile.u, c->residuals, sizeof(float) * c->rows * s.Vp);
      std::memset(tile.u + c->rows * s.Vp, 0, sizeof(float) * (kTile - c->rows) * s.Vp);
      load_tile_rows(d_o, ConvRows{}, c->first_token, c->rows, d.d_o, s.Vp);
      backward_tile(tile, d, s, c->St, dS, dSt);
      backward_norm(*args, tile.q, tile.q_rnorm, in.scale, c->rows, s, d.dq_grown);
      backward_norm(*args, tile.k, tile.k_rnorm, 1.0f, c->rows, s, d.dk_grown);
      for (int r = 0; r < c->rows; ++r) {
        const int64_t t = c->first_token + r;
        if (args->gate != kGateNone) {
          load_row(in.g, t, raw, s.Kp);
          float* row = d.dg + r * s.Kp;
          for (int i = 0; i < s.Kp; i += kLanes) {
            vf x = in.gate.backward(load(raw + i), i, load(tile.log_decay + r * s.Kp + i), load(row + i), &d_log_rate);
            store(row + i, x);
            store(d_bias + i, load(d_bias + i) + x);
          }
        }
        store_row(dq, t, d.dq_grown + r * s.Kp);
        store_row(dk, t, d.dk_grown + r * s.Kp);
        store_row(dv, t, d.d_x + r * s.Vp);
        store_row(dg, t, d.dg + r * s.Kp);
        *static_cast<float*>(dbeta.at(t)) = d.d_beta[r] * write_strength_slope(*args, load_scalar(in.beta, t));
      }
    }
    store_state(grads->d_initial, state_of(grads->d_initial, n, head), s, all, dS);
    if (grads->dA_log != nullptr) grads->dA_log[task] = hsum(d_log_rate);
    if (grads->ddt_bias != nullptr) std::memcpy(grads->ddt_bias + task * s.K, d_bias, sizeof(float) * s.K);
  }
}
KIMI_EXPORT(kda_backward);

}  // namespace kimi::KIMI_ISA
