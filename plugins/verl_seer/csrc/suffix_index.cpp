#include "suffix_index.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace kimi_seer {

namespace {
// Up to this many edges a list is searched, beyond it the hash table is asked.
constexpr int32_t kListedEdges = 4;
}  // namespace

SuffixIndex::SuffixIndex(int32_t max_depth) : max_depth_(max_depth) { states_.emplace_back(); }

int32_t SuffixIndex::add_sequence() {
  sequences_.emplace_back();
  return sequences() - 1;
}

uint64_t SuffixIndex::slot(int32_t state, int32_t token) const {
  uint64_t key = (static_cast<uint64_t>(static_cast<uint32_t>(state)) << 32) | static_cast<uint32_t>(token);
  key ^= key >> 31;
  key *= 0x9E3779B97F4A7C15ull;
  key ^= key >> 29;
  return key & (hash_.size() - 1);
}

int32_t SuffixIndex::find_edge(int32_t state, int32_t token) const {
  const State& s = states_[state];
  if (s.edges > kListedEdges) {
    for (uint64_t i = slot(state, token);; i = (i + 1) & (hash_.size() - 1)) {
      const Slot& entry = hash_[i];
      if (entry.edge < 0) return -1;
      if (entry.state == state && edges_[entry.edge].token == token) return entry.edge;
    }
  }
  for (int32_t e = s.first_edge; e >= 0; e = edges_[e].next) {
    if (edges_[e].token == token) return e;
  }
  return -1;
}

int32_t SuffixIndex::target(int32_t state, int32_t token) const {
  const int32_t e = find_edge(state, token);
  return e < 0 ? -1 : edges_[e].target;
}

void SuffixIndex::grow_hash() {
  std::vector<Slot> old(std::max<size_t>(64, hash_.size() * 2));
  old.swap(hash_);
  hashed_ = 0;
  for (const Slot& entry : old) {
    if (entry.edge >= 0) hash_edge(entry.state, entry.edge);
  }
}

void SuffixIndex::hash_edge(int32_t state, int32_t edge) {
  if (hash_.empty() || (hashed_ + 1) * 3 > hash_.size() * 2) grow_hash();
  uint64_t i = slot(state, edges_[edge].token);
  while (hash_[i].edge >= 0) i = (i + 1) & (hash_.size() - 1);
  hash_[i] = {state, edge};
  ++hashed_;
}

void SuffixIndex::add_edge(int32_t state, int32_t token, int32_t target) {
  const int32_t edge = static_cast<int32_t>(edges_.size());
  edges_.push_back({token, target, states_[state].first_edge});
  State& s = states_[state];
  s.first_edge = edge;
  ++s.edges;
  if (s.edges == kListedEdges + 1) {
    for (int32_t e = s.first_edge; e >= 0; e = edges_[e].next) hash_edge(state, e);
  } else if (s.edges > kListedEdges) {
    hash_edge(state, edge);
  }
}

// Splits off from `original` the substrings that are no longer than parent's longest and one token.
int32_t SuffixIndex::clone(int32_t parent, int32_t token, int32_t original) {
  const int32_t copy = static_cast<int32_t>(states_.size());
  const State source = states_[original];
  State state;
  state.length = states_[parent].length + 1;
  state.link = source.link;
  state.count = source.count;
  states_.push_back(state);
  for (int32_t e = source.first_edge; e >= 0; e = edges_[e].next) {
    add_edge(copy, edges_[e].token, edges_[e].target);
  }
  states_[original].link = copy;
  for (int32_t p = parent; p >= 0; p = states_[p].link) {
    const int32_t e = find_edge(p, token);
    if (e < 0 || edges_[e].target != original) break;
    edges_[e].target = copy;
  }
  return copy;
}

// The state of (sequence of `last`) + token, made where there is none.
int32_t SuffixIndex::extend(int32_t last, int32_t token) {
  const int32_t next = target(last, token);
  if (next >= 0) {
    return states_[next].length == states_[last].length + 1 ? next : clone(last, token, next);
  }
  const int32_t made = static_cast<int32_t>(states_.size());
  State state;
  state.length = states_[last].length + 1;
  states_.push_back(state);
  int32_t p = last;
  int32_t q = -1;
  for (; p >= 0 && (q = target(p, token)) < 0; p = states_[p].link) add_edge(p, token, made);
  int32_t link = 0;
  if (p >= 0) link = states_[q].length == states_[p].length + 1 ? q : clone(p, token, q);
  states_[made].link = link;
  return made;
}

// Moves to the state that has the context's substring: a later clone may have taken it over.
void SuffixIndex::shrink(Context& context) const {
  while (context.state > 0 && states_[states_[context.state].link].length >= context.length) {
    context.state = states_[context.state].link;
  }
}

void SuffixIndex::step(Sequence& sequence, int32_t token) {
  sequence.last = extend(sequence.last, token);
  Context match{sequence.match, sequence.match_length};
  if (match.length == max_depth_) --match.length;
  shrink(match);
  // The whole sequence is in the index, so its suffix has this edge.
  match = {target(match.state, token), match.length + 1};
  shrink(match);
  sequence.match = match.state;
  sequence.match_length = match.length;
  for (int32_t s = match.state; s > 0; s = states_[s].link) ++states_[s].count;
}

void SuffixIndex::append(int32_t sequence, const int32_t* tokens, int64_t count) {
  // Two states a token at most, with 32-bit indices.
  if (states_.size() + 2 * static_cast<uint64_t>(count) > std::numeric_limits<int32_t>::max() / 2) {
    throw std::length_error("the index is full");
  }
  Sequence& s = sequences_[sequence];
  s.tokens.insert(s.tokens.end(), tokens, tokens + count);
  for (int64_t i = 0; i < count; ++i) step(s, tokens[i]);
}

void SuffixIndex::trim(int64_t keep) {
  std::vector<Sequence> old;
  old.swap(sequences_);
  states_ = std::vector<State>(1);
  // Assigning {} would keep the memory.
  std::vector<Edge>().swap(edges_);
  std::vector<Slot>().swap(hash_);
  hashed_ = 0;
  for (const Sequence& s : old) {
    const int64_t length = static_cast<int64_t>(s.tokens.size());
    const int64_t kept = std::min(keep, length);
    append(add_sequence(), s.tokens.data() + (length - kept), kept);
  }
}

int64_t SuffixIndex::occurrences(const int32_t* pattern, int64_t count) const {
  int32_t state = 0;
  for (int64_t i = 0; i < count; ++i) {
    state = target(state, pattern[i]);
    if (state < 0) return 0;
  }
  return states_[state].count;
}

double SuffixIndex::probability(Context context, int32_t token, int32_t levels, double smoothing) const {
  return blend(context, target(context.state, token), token, levels, smoothing);
}

// Estimate of P(token | context), blended with the shorter contexts of up to `levels` states; `next` is the state that
// the token leads to, -1 for none.
double SuffixIndex::blend(Context context, int32_t next, int32_t token, int32_t levels, double smoothing) const {
  const double seen = next < 0 ? 0.0 : states_[next].count;
  const double total = states_[context.state].count;
  const int32_t link = states_[context.state].link;
  if (levels <= 1 || link <= 0 || smoothing == 0) return seen / total;
  const double shorter = probability({link, states_[link].length}, token, levels - 1, smoothing);
  return (seen + smoothing * shorter) / (total + smoothing);
}

// Adds the best continuations of a context to the candidates.
void SuffixIndex::expand(Context context, double score, int32_t parent, int32_t depth,
                         const DraftOptions& options) {
  const size_t first = candidates_.size();
  Context at = context;
  const size_t enough = first + static_cast<size_t>(options.max_paths);
  for (int32_t level = 0; level < options.levels && candidates_.size() < enough; ++level) {
    while (at.state > 0 && states_[at.state].first_edge < 0) {
      at.state = states_[at.state].link;
      at.length = states_[at.state].length;
    }
    if (at.state <= 0 || at.length < options.min_match) break;
    if (level == 0) context = at;
    for (int32_t e = states_[at.state].first_edge; e >= 0; e = edges_[e].next) {
      const Edge& edge = edges_[e];
      bool there = false;
      for (size_t i = first; i < candidates_.size() && !there; ++i) there = candidates_[i].token == edge.token;
      if (there) continue;
      const double p = score * (level == 0 ? blend(context, edge.target, edge.token, options.levels, options.smoothing)
                                           : probability(context, edge.token, options.levels, options.smoothing));
      if (p < options.min_score) continue;
      Context next{edge.target, at.length + 1};
      if (next.length >= max_depth_) next.length = max_depth_ - 1;
      shrink(next);
      candidates_.push_back({p, parent, depth, edge.token, next});
    }
    at.state = states_[at.state].link;
    if (at.state > 0) at.length = states_[at.state].length;
  }
  // The best max_paths of them; equals in the order of their tokens.
  const auto better = [](const Candidate& a, const Candidate& b) {
    return a.score != b.score ? a.score > b.score : a.token < b.token;
  };
  const size_t most = static_cast<size_t>(options.max_paths);
  if (candidates_.size() - first > most) {
    std::partial_sort(candidates_.begin() + first, candidates_.begin() + first + most, candidates_.end(), better);
    candidates_.resize(first + most);
  } else {
    std::sort(candidates_.begin() + first, candidates_.end(), better);
  }
}

// Best first: the likeliest candidate joins the draft, until a limit is met.
int32_t SuffixIndex::draft_from(Context context, const DraftOptions& options, std::vector<DraftToken>& out) {
  out.clear();
  candidates_.clear();
  has_child_.clear();
  while (context.state > 0 && states_[context.state].first_edge < 0) {
    context.state = states_[context.state].link;
    context.length = states_[context.state].length;
  }
  if (context.state <= 0 || context.length < options.min_match) return 0;
  expand(context, 1.0, -1, 1, options);
  int32_t paths = 0;
  bool root_has_child = false;
  while (!candidates_.empty() && static_cast<int32_t>(out.size()) < options.max_tokens) {
    // A handful of candidates: a scan is cheaper than a heap, and keeps the order of equals.
    const auto best = std::max_element(
        candidates_.begin(), candidates_.end(),
        [](const Candidate& a, const Candidate& b) { return a.score < b.score; });
    const Candidate chosen = *best;
    candidates_.erase(best);
    const bool branches = chosen.parent < 0 ? root_has_child : has_child_[chosen.parent];
    // A first child goes on with its parent's path; the draft's first token and each further child make one more.
    if (branches || chosen.parent < 0) {
      if (paths == options.max_paths) continue;
      ++paths;
    }
    if (chosen.parent < 0) root_has_child = true;
    else has_child_[chosen.parent] = 1;
    const int32_t index = static_cast<int32_t>(out.size());
    out.push_back({chosen.token, chosen.parent, chosen.score});
    has_child_.push_back(0);
    if (chosen.depth < options.max_length) {
      expand(chosen.context, chosen.score, index, chosen.depth + 1, options);
    }
  }
  return context.length;
}

int32_t SuffixIndex::draft(int32_t sequence, const DraftOptions& options, std::vector<DraftToken>& out) {
  const Sequence& s = sequences_[sequence];
  Context context{s.match, s.match_length};
  if (context.length >= max_depth_) context.length = max_depth_ - 1;
  shrink(context);
  return draft_from(context, options, out);
}

int32_t SuffixIndex::draft_context(const int32_t* context, int64_t count, const DraftOptions& options,
                                   std::vector<DraftToken>& out) {
  const int64_t most = max_depth_ - 1;
  if (count > most) {
    context += count - most;
    count = most;
  }
  Context match{0, 0};
  for (int64_t i = 0; i < count; ++i) {
    int32_t next;
    while ((next = target(match.state, context[i])) < 0 && match.state > 0) {
      match.state = states_[match.state].link;
      match.length = states_[match.state].length;
    }
    if (next >= 0) {
      match = {next, match.length + 1};
      shrink(match);
    }
  }
  return draft_from(match, options, out);
}

int64_t SuffixIndex::bytes() const {
  int64_t total = sizeof(*this) + states_.capacity() * sizeof(State) + edges_.capacity() * sizeof(Edge) +
                  hash_.capacity() * sizeof(Slot) + sequences_.capacity() * sizeof(Sequence);
  for (const Sequence& s : sequences_) total += s.tokens.capacity() * sizeof(int32_t);
  return total;
}

}  // namespace kimi_seer
