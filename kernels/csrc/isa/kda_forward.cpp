// kda_forward: the whole sequence, tile by tile; one task is a (sequence, value head) or some panels of its columns.
#include "isa.h"
#include "kda/forward.h"

namespace kimi::KIMI_ISA {

void kda_forward(const KdaArgs* args) {
  const TileShape s(args->K, args->V);
  const int64_t heads = args->N * args->HV;
  const int parts = column_parts(heads, args->num_threads, s.panels());
#pragma omp parallel for schedule(dynamic, 1) num_threads(int(args->num_threads))
  for (int64_t task = 0; task < heads * parts; ++task) {
    const int64_t n = task / parts / args->HV, head = task / parts % args->HV;
    const Columns columns = columns_of(s, int(task % parts), parts);
    Scratch& scratch = thread_scratch();
    scratch.reset();
    const Span span = span_of(*args, n);
    const HeadInputs in = head_inputs(*args, span, head, s, scratch.floats(s.Kp));
    Rows o = rows_of(args->o, span.batch, span.first, head, s.V);
    float* S = scratch.floats(size_t(s.Kp) * kPanel * (columns.end_panel - columns.first_panel));
    load_state(args->initial, state_of(args->initial, n, head), s, columns, S);
    run_tiles(*args, in, s, span.length, columns, o, S, scratch, [&](int64_t t0, const Tile& tile) {
      for (int r = 0; r < tile.rows; ++r) store_columns(o, t0 + r, tile.o + r * s.Vp, columns.first, columns.end);
    });
    store_state(args->final, state_of(args->final, n, head), s, columns, S);
  }
}
KIMI_EXPORT(kda_forward);

}  // namespace kimi::KIMI_ISA
