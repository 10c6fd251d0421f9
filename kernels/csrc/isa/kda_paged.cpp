// kda_prefill and kda_decode: a whole KDA layer between its projections, on pools of states that are updated in place.
#include <memory>

#include "isa.h"
#include "kda/layer.h"
#include "kernels.h"

namespace kimi::KIMI_ISA {
namespace {

// Filters and histories of one (q/k head, value head), as the convolutions of HeadInputs want them.
struct HeadConv {
  int width;
  float *filter_q, *filter_k, *filter_v;
  float *history_q, *history_k, *history_v;

  HeadConv(const KdaLayer& layer, const TileShape& s, Scratch& scratch) : width(int(layer.conv_width)) {
    for (float** p : {&filter_q, &filter_k, &history_q, &history_k}) *p = scratch.floats(size_t(width) * s.Kp);
    for (float** p : {&filter_v, &history_v}) *p = scratch.floats(size_t(width) * s.Vp);
  }
  void load_filters(const KdaLayer& layer, const LayerChannels& at, const TileShape& s) {
    load_filter(layer, at.q, s.K, s.Kp, filter_q);
    load_filter(layer, at.k, s.K, s.Kp, filter_k);
    load_filter(layer, at.v, s.V, s.Vp, filter_v);
  }
  void load_histories(const KdaLayer& layer, const LayerChannels& at, const TileShape& s, int64_t slot, int64_t entry) {
    load_history(layer, slot, entry, at.q, s.K, s.Kp, history_q);
    load_history(layer, slot, entry, at.k, s.K, s.Kp, history_k);
    load_history(layer, slot, entry, at.v, s.V, s.Vp, history_v);
  }
  void attach(HeadInputs& in) const {
    in.conv_q = {width, filter_q, history_q};
    in.conv_k = {width, filter_k, history_k};
    in.conv_v = {width, filter_v, history_v};
  }
};

Span packed_span(const KdaLayer& layer, int64_t n) {
  if (layer.cu_seqlens == nullptr) return {0, n, 1};
  return {0, layer.cu_seqlens[n], layer.cu_seqlens[n + 1] - layer.cu_seqlens[n]};
}

const int32_t* slots_of(const KdaLayer& layer, int64_t n) {
  return layer.state_indices + n * layer.indices_per_sequence;
}

LayerProblem problem_of(const KdaArgs& args, const KdaLayer& layer, int64_t n, const Span& span) {
  const int32_t* slots = slots_of(layer, n);
  if (span.first < 0 || span.length < 0 || span.first + span.length > args.T || (n == 0 && span.first != 0)) {
    return kBadOffsets;
  }
  for (int64_t i = 0; i < layer.indices_per_sequence; ++i) {
    if (slots[i] < -1 || slots[i] >= layer.slots) return kBadIndex;
  }
  if (layer.num_accepted == nullptr || slots[0] < 0) return kNoProblem;
  if (span.length > layer.indices_per_sequence) return kBadLength;
  const int32_t accepted = layer.num_accepted[n];
  if (accepted < 1 || accepted > layer.indices_per_sequence || slots[accepted - 1] < 0) return kBadAccepted;
  return kNoProblem;
}

// Nothing is written unless every sequence's offsets, slots and counts are in range.
bool check(const KdaArgs& args, KdaLayer& layer) {
  for (int64_t n = 0; n < args.N; ++n) {
    const Span span = packed_span(layer, n);
    const LayerProblem problem = problem_of(args, layer, n, span);
    if (problem != kNoProblem) {
      layer.problem = problem;
      layer.problem_at = n;
      return false;
    }
  }
  return true;
}

void zero_rows(Rows& rows, int64_t length) {
  for (int64_t t = 0; t < length; ++t) std::memset(rows.at(t), 0, size_t(rows.count) * (rows.is_bf16 ? 2 : 4));
}

// Outputs of tokens behind the last sequence are zero.
void zero_padding(const KdaArgs& args, const KdaLayer& layer) {
  const Span last = args.N == 0 ? Span{0, 0, 0} : packed_span(layer, args.N - 1);
  const int64_t end = last.first + last.length;
  Rows rows = rows_of(args.o, 0, end, 0, int(args.HV * args.V));
  zero_rows(rows, args.T - end);
}

// The last width - 1 inputs of a sequence become its conv state.
void keep_last_inputs(const KdaArgs& args, const KdaLayer& layer, const Span& span, int64_t slot, bool has_initial) {
  const int64_t past = layer.conv_width - 1;
  const int64_t channels = 2 * args.H * args.K + args.HV * args.V;
  alignas(64) float row[kMaxHead];
  for (int64_t c = 0; c < channels; c += kMaxHead) {
    const int count = int(channels - c < kMaxHead ? channels - c : kMaxHead);
    const int padded = round_up(count, kLanes);
    Rows x = rows_of(args.q, 0, span.first, 0, count);  // q starts the packed projection
    x.base += c * (x.is_bf16 ? 2 : 4);
    for (int64_t i = 0; i < past; ++i) {
      const int64_t t = span.length - past + i;
      if (t >= 0) {
        load_row(x, t, row, padded);
      } else if (has_initial) {
        ConvEntry(layer, slot, past + t, c).read(row, count, padded);
      } else {
        std::memset(row, 0, sizeof row);
      }
      ConvEntry(layer, slot, i, c).write(row, count);
    }
  }
}

}  // namespace

void kda_prefill(const KdaArgs* args, KdaLayer* layer) {
  if (!check(*args, *layer)) return;
  zero_padding(*args, *layer);
  const TileShape s(args->K, args->V);
  const int64_t heads = args->N * args->HV;
  const int threads = int(args->num_threads);
  const int parts = column_parts(heads, threads, s.panels());
  // The norm needs whole heads: with split heads it runs after them, on outputs kept in fp32.
  std::unique_ptr<float[]> unnormed(parts > 1 ? new float[size_t(args->T) * args->HV * s.Vp] : nullptr);

#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t task = 0; task < heads * parts; ++task) {
    const int64_t n = task / parts / args->HV, head = task / parts % args->HV;
    const Columns columns = columns_of(s, int(task % parts), parts);
    const Span span = packed_span(*layer, n);
    const int64_t slot = slots_of(*layer, n)[0];
    Rows out = rows_of(args->o, 0, span.first, head, s.V);
    if (slot < 0) {
      if (columns.first == 0) zero_rows(out, span.length);
      continue;
    }
    if (span.length == 0) continue;
    Scratch& scratch = thread_scratch();
    scratch.reset();
    const bool resumed = layer->has_initial[n];
    HeadInputs in = head_inputs(*args, span, head, s, scratch.floats(s.Kp));
    const LayerChannels at(*args, head / (args->HV / args->H), head);
    HeadConv conv(*layer, s, scratch);
    conv.load_filters(*layer, at, s);
    conv.load_histories(*layer, at, s, resumed ? slot : -1, 0);
    conv.attach(in);
    const Rows gate = rows_of(layer->gate, 0, span.first, head, s.V);
    auto finish_row = [&](int64_t t, const float* o) {
      if (parts == 1) {
        gated_norm(*layer, o, gate, t, s, out);
      } else {
        float* to = unnormed.get() + ((span.first + t) * args->HV + head) * s.Vp + columns.first;
        std::memcpy(to, o + columns.first, sizeof(float) * (columns.end_panel - columns.first_panel) * kPanel);
      }
    };
    const float* initial = resumed ? state_of(args->initial, slot, head) : nullptr;
    float* final = state_of(args->final, slot, head);
    if (span.length == 1) {
      run_steps(*args, in, s, 1, columns.first, columns.end, initial, final, scratch,
                [&](int64_t t, const Step& step) { finish_row(t, step.o); });
      continue;
    }
    float* S = scratch.floats(size_t(s.Kp) * kPanel * (columns.end_panel - columns.first_panel));
    load_state(args->initial, initial, s, columns, S);
    run_tiles(*args, in, s, span.length, columns, out, S, scratch, [&](int64_t t0, const Tile& tile) {
      for (int r = 0; r < tile.rows; ++r) {
        if (t0 + kTile + r < span.length) prefetch_row(gate, t0 + kTile + r);
        finish_row(t0 + r, tile.o + r * s.Vp);
      }
    });
    store_state(args->final, final, s, columns, S);
  }

#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t n = 0; n < args->N; ++n) {
    const Span span = packed_span(*layer, n);
    const int64_t slot = slots_of(*layer, n)[0];
    if (slot < 0 || span.length == 0) continue;
    keep_last_inputs(*args, *layer, span, slot, layer->has_initial[n]);
  }
  if (parts == 1) return;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t task = 0; task < heads; ++task) {
    const int64_t n = task / args->HV, head = task % args->HV;
    const Span span = packed_span(*layer, n);
    if (slots_of(*layer, n)[0] < 0) continue;
    Rows out = rows_of(args->o, 0, span.first, head, s.V);
    const Rows gate = rows_of(layer->gate, 0, span.first, head, s.V);
    for (int64_t t = 0; t < span.length; ++t) {
      gated_norm(*layer, unnormed.get() + ((span.first + t) * args->HV + head) * s.Vp, gate, t, s, out);
    }
  }
}
KIMI_EXPORT(kda_prefill);

namespace {

constexpr int64_t kBlockHeads = 16;  // value heads of a decode task

// Keeps the inputs that the next step may need: the history without its oldest entry, then this step's tokens.
void keep_inputs(const KdaLayer& layer, int64_t slot, int64_t channel, const Rows& x, const float* history, int padded,
                 int64_t length) {
  alignas(64) float row[kMaxHead + kPanel];
  const int64_t past = layer.conv_width - 1;
  for (int64_t i = 1; i < past + length; ++i) {
    if (i < past) {
      ConvEntry(layer, slot, i - 1, channel).write(history + i * padded, x.count);
    } else {
      load_row(x, i - past, row, padded);
      ConvEntry(layer, slot, i - 1, channel).write(row, x.count);
    }
  }
}

// Steps of all tokens of one sequence on one value head, in place of its state. Every state row is independent of the
// others, so that with several tokens kStepRows rows at a time go through all of them, and each token's state is written
// to its own slot. `next`: the state that is read after this one, or null.
void decode_head(const KdaArgs& args, const TileShape& s, int64_t length, const int32_t* slots, int64_t start_slot,
                 int64_t head, Step* steps, const float* next) {
  const float* from = state_of(args.initial, start_slot, head);
  if (length == 1 && slots[0] >= 0) {
    step_state(steps[0], from, args.initial.stride_v, state_of(args.final, slots[0], head), args.final.stride_v, s.K, 0,
               s.V, next);
    return;
  }
  alignas(64) float group[kStepRows * kMaxHead];
  for (int row = 0; row < s.V; row += kStepRows) {
    const int count = s.V - row < kStepRows ? s.V - row : kStepRows;
    std::memset(group, 0, sizeof group);
    for (int r = 0; r < count; ++r) {
      std::memcpy(group + r * s.K, from + (row + r) * args.initial.stride_v, sizeof(float) * s.K);
    }
    for (int64_t t = 0; t < length; ++t) {
      step_rows(steps[t], group, s.K, group, s.K, s.K, row, nullptr);
      if (slots[t] < 0) continue;
      float* to = state_of(args.final, slots[t], head);
      for (int r = 0; r < count; ++r) {
        std::memcpy(to + (row + r) * args.final.stride_v, group + r * s.K, sizeof(float) * s.K);
      }
    }
  }
}

// Working memory of a thread in kda_decode: filters of a block of q/k heads, histories of one, steps of all.
struct DecodeBlock {
  int64_t width, group;  // conv width; value heads a q/k head
  float *bias, *filters, *history_q, *history_k, *history_v;
  std::vector<Step> steps;  // [value head of the block][token]
  int64_t loaded = -1;      // the q/k head that the filters start with

  DecodeBlock(const KdaArgs& args, const KdaLayer& layer, const TileShape& s, int64_t heads, Scratch& scratch)
      : width(layer.conv_width), group(args.HV / args.H) {
    bias = scratch.floats(s.Kp);
    filters = scratch.floats(heads * filters_of_head(s));
    history_q = scratch.floats(width * s.Kp);
    history_k = scratch.floats(width * s.Kp);
    history_v = scratch.floats(width * s.Vp);
    for (int64_t i = 0; i < heads * group * layer.indices_per_sequence; ++i) steps.emplace_back(s, scratch);
  }
  int64_t filters_of_head(const TileShape& s) const { return width * (2 * s.Kp + group * s.Vp); }

  void load_filters(const KdaArgs& args, const KdaLayer& layer, const TileShape& s, int64_t first, int64_t count) {
    if (loaded == first) return;
    loaded = first;
    for (int64_t i = 0; i < count; ++i) {
      const LayerChannels at(args, first + i, (first + i) * group);
      float* to = filters + i * filters_of_head(s);
      load_filter(layer, at.q, s.K, s.Kp, to);
      load_filter(layer, at.k, s.K, s.Kp, to + width * s.Kp);
      for (int64_t j = 0; j < group; ++j) {
        load_filter(layer, at.v + j * s.V, s.V, s.Vp, to + width * (2 * s.Kp + j * s.Vp));
      }
    }
  }

  // Steps of all tokens of a sequence on the value heads of the block's q/k head i; its conv state moves on.
  void prepare(const KdaArgs& args, const KdaLayer& layer, const TileShape& s, const Span& span, int64_t slot,
               int64_t accepted, int64_t qk_head, int64_t i) {
    const float* filter = filters + i * filters_of_head(s);
    const LayerChannels at(args, qk_head, qk_head * group);
    load_history(layer, slot, accepted - 1, at.q, s.K, s.Kp, history_q);
    load_history(layer, slot, accepted - 1, at.k, s.K, s.Kp, history_k);
    for (int64_t j = 0; j < group; ++j) {
      const int64_t head = qk_head * group + j, channel = at.v + j * s.V;
      load_history(layer, slot, accepted - 1, channel, s.V, s.Vp, history_v);
      HeadInputs in = head_inputs(args, span, head, s, bias);
      in.conv_q = {int(width), filter, history_q};
      in.conv_k = {int(width), filter + width * s.Kp, history_k};
      in.conv_v = {int(width), filter + width * (2 * s.Kp + j * s.Vp), history_v};
      for (int64_t t = 0; t < span.length; ++t) prepare_step(at_head(layer, i * group + j)[t], in, args, s, t);
      keep_inputs(layer, slot, channel, in.v, history_v, s.Vp, span.length);
      if (j + 1 == group) {
        keep_inputs(layer, slot, at.q, in.q, history_q, s.Kp, span.length);
        keep_inputs(layer, slot, at.k, in.k, history_k, s.Kp, span.length);
      }
    }
  }

  Step* at_head(const KdaLayer& layer, int64_t value_head) {
    return steps.data() + value_head * layer.indices_per_sequence;
  }
};

}  // namespace

// A task is a sequence with a block of q/k heads and the value heads that share them, so that it owns its conv channels.
// First everything small is computed for the whole block, then the states stream through without a pause, then come
// the norms. Blocks are the outer loop: their filters are laid out once for many sequences.
void kda_decode(const KdaArgs* args, KdaLayer* layer) {
  if (!check(*args, *layer)) return;
  zero_padding(*args, *layer);
  const TileShape s(args->K, args->V);
  const int64_t group = args->HV / args->H;
  // Waking a thread costs more than a few small states.
  const int team = args->N * args->HV * args->K * args->V < 1 << 16 ? 1 : int(args->num_threads);
  int64_t block = kBlockHeads / group < 1 ? 1 : kBlockHeads / group;
  while (block > 1 && (args->H + block - 1) / block * args->N < 2 * team) block /= 2;
  const int64_t blocks = (args->H + block - 1) / block;
#pragma omp parallel num_threads(team) if (team > 1)
  {
    Scratch& scratch = thread_scratch();
    scratch.reset();
    DecodeBlock work(*args, *layer, s, block, scratch);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < blocks * args->N; ++task) {
      const int64_t n = task % args->N, first = task / args->N * block;
      const int64_t count = args->H - first < block ? args->H - first : block;
      const Span span = packed_span(*layer, n);
      const int32_t* slots = slots_of(*layer, n);
      if (slots[0] < 0) {
        for (int64_t head = first * group; head < (first + count) * group; ++head) {
          Rows out = rows_of(args->o, 0, span.first, head, s.V);
          zero_rows(out, span.length);
        }
        continue;
      }
      if (span.length == 0) continue;
      const int64_t accepted = layer->num_accepted == nullptr ? 1 : layer->num_accepted[n];
      work.load_filters(*args, *layer, s, first, count);
      for (int64_t i = 0; i < count; ++i) {
        work.prepare(*args, *layer, s, span, slots[0], accepted, first + i, i);
      }
      const int64_t start = slots[accepted - 1];
      for (int64_t i = 0; i < count * group; ++i) {
        const int64_t head = first * group + i;
        const float* next = i + 1 < count * group ? state_of(args->initial, start, head + 1) : nullptr;
        decode_head(*args, s, span.length, slots, start, head, work.at_head(*layer, i), next);
      }
      for (int64_t i = 0; i < count * group; ++i) {
        const int64_t head = first * group + i;
        const Rows gate = rows_of(layer->gate, 0, span.first, head, s.V);
        Rows out = rows_of(args->o, 0, span.first, head, s.V);
        for (int64_t t = 0; t < span.length; ++t) gated_norm(*layer, work.at_head(*layer, i)[t].o, gate, t, s, out);
      }
    }
  }
}
KIMI_EXPORT(kda_decode);

}  // namespace kimi::KIMI_ISA
