// kda_recurrent: token by token; one task is a (sequence, value head) or some of its value channels.
#include "isa.h"
#include "kda/recurrent.h"

namespace kimi::KIMI_ISA {

void kda_recurrent(const KdaArgs* args) {
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
    run_steps(*args, in, s, span.length, columns.first, columns.end, state_of(args->initial, n, head),
              state_of(args->final, n, head), scratch,
              [&](int64_t t, const Step& step) { store_columns(o, t, step.o, columns.first, columns.end); });
  }
}
KIMI_EXPORT(kda_recurrent);

}  // namespace kimi::KIMI_ISA
