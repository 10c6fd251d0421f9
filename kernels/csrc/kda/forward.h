// The forward pass over one (sequence, value head).
#pragma once

#include "tile.h"

namespace kimi::KIMI_ISA {

// Into how many parts the columns of each head are cut: only when there are fewer heads than threads, because every
// part repeats the work that does not involve the state.
inline int column_parts(int64_t heads, int64_t threads, int panels) {
  int64_t parts = heads == 0 ? 1 : threads / heads;
  return int(parts < 1 ? 1 : parts > panels ? panels : parts);
}

// The value channels of one part, first a whole number of panels.
struct Columns {
  int first_panel, end_panel, first, end;
};
inline Columns columns_of(const TileShape& s, int part, int parts) {
  Columns c;
  c.first_panel = part * s.panels() / parts;
  c.end_panel = (part + 1) * s.panels() / parts;
  c.first = c.first_panel * kPanel;
  c.end = c.end_panel * kPanel < s.V ? c.end_panel * kPanel : s.V;
  return c;
}

// The panels of `columns`, from a state in memory (null: zeros).
inline void load_state(const States& view, const float* from, const TileShape& s, const Columns& columns,
                       float* panels) {
  std::memset(panels, 0, sizeof(float) * (columns.end_panel - columns.first_panel) * s.Kp * kPanel);
  if (from == nullptr) return;
  for (int p = columns.first_panel; p < columns.end_panel; ++p, panels += s.Kp * kPanel) {
    const int width = s.V - p * kPanel < kPanel ? s.V - p * kPanel : kPanel;
    const float* block = from + p * kPanel * view.stride_v;
    if (view.stride_k == 1 && width % kLanes == 0 && s.K % kLanes == 0) {
      for (int v = 0; v < width; v += kLanes)
        for (int k = 0; k < s.K; k += kLanes)
          transpose_block(block + v * view.stride_v + k, view.stride_v, panels + k * kPanel + v, kPanel);
      continue;
    }
    for (int k = 0; k < s.K; ++k)
      for (int v = 0; v < width; ++v) panels[k * kPanel + v] = block[k * view.stride_k + v * view.stride_v];
  }
}

inline void store_state(const States& view, float* to, const TileShape& s, const Columns& columns,
                        const float* panels) {
  if (to == nullptr) return;
  for (int p = columns.first_panel; p < columns.end_panel; ++p, panels += s.Kp * kPanel) {
    const int width = s.V - p * kPanel < kPanel ? s.V - p * kPanel : kPanel;
    float* block = to + p * kPanel * view.stride_v;
    if (view.stride_k == 1 && width % kLanes == 0 && s.K % kLanes == 0) {
      for (int v = 0; v < width; v += kLanes)
        for (int k = 0; k < s.K; k += kLanes)
          transpose_block(panels + k * kPanel + v, kPanel, block + v * view.stride_v + k, view.stride_v);
      continue;
    }
    for (int k = 0; k < s.K; ++k)
      for (int v = 0; v < width; ++v) block[k * view.stride_k + v * view.stride_v] = panels[k * kPanel + v];
  }
}

// `bias` is room for Kp floats.
inline HeadInputs head_inputs(const KdaArgs& args, const Span& span, int64_t head, const TileShape& s, float* bias) {
  const int64_t qk_head = head / (args.HV / args.H);
  HeadInputs in;
  in.q = rows_of(args.q, span.batch, span.first, qk_head, s.K);
  in.k = rows_of(args.k, span.batch, span.first, qk_head, s.K);
  in.v = rows_of(args.v, span.batch, span.first, head, s.V);
  in.g = rows_of(args.g, span.batch, span.first, head, s.K);
  in.beta = rows_of(args.beta, span.batch, span.first, head, 1);
  in.gate = gate_head(args, head, s.K, s.Kp, bias);
  in.scale = static_cast<float>(args.scale);
  return in;
}

// Columns [first, end) of a row.
KIMI_INLINE void store_columns(Rows& rows, int64_t t, const float* from, int first, int end) {
  Rows part = rows;
  part.base += first * (rows.is_bf16 ? 2 : 4);
  part.count = end - first;
  store_row(part, t, from + first);
}

// Asks for the rows of the tile after the one in work, a share of them with each of its panels: a head's rows are short
// pieces far apart, which hardware prefetch does not follow.
KIMI_INLINE void prefetch_tile(const HeadInputs& in, const Rows& out, int64_t next, int64_t length, int share,
                               int shares) {
  for (int i = share * kTile / shares; i < (share + 1) * kTile / shares && next + i < length; ++i) {
    for (const Rows* rows : {&in.q, &in.k, &in.g, &in.v, &out}) prefetch_row(*rows, next + i);
  }
}

// Runs all tiles on a state S that holds the panels of `columns`; finish(t0, tile) is called with the
// outputs of each tile and writes the rows of `out`.
template <class Finish>
inline void run_tiles(const KdaArgs& args, const HeadInputs& in, const TileShape& s, int64_t length,
                      const Columns& columns, const Rows& out, float* S, Scratch& scratch,
                      Finish finish) {
  Tile tile(s, scratch);
  for (int64_t t0 = 0; t0 < length; t0 += tile.rows) {
    prepare_tile(tile, in, args, s, t0, int(length - t0 < kTile ? length - t0 : kTile));
    load_tile_rows(in.v, in.conv_v, t0, tile.rows, tile.v, s.Vp);
    for (int p = columns.first_panel; p < columns.end_panel; ++p) {
      prefetch_tile(in, out, t0 + tile.rows, length, p - columns.first_panel, columns.end_panel - columns.first_panel);
      float* panel = S + size_t(p - columns.first_panel) * s.Kp * kPanel;
      panel_solve<true>(tile, s, panel, p);
      panel_update(tile, s, panel, p);
    }
    finish(t0, tile);
  }
}

}  // namespace kimi::KIMI_ISA
