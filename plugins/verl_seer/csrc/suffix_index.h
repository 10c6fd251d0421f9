// An index of all substrings of a group's responses: for any recent context, what came after it and how often.
//
// It is a compressed suffix trie in its smallest form, the suffix automaton: substrings with the same set of end
// positions share a state, so N tokens make at most 2N states. It grows online, token by token, for several
// sequences in any interleaving, and no substring crosses from one sequence into another.
#pragma once

#include <cstdint>
#include <vector>

namespace kimi_seer {

struct DraftOptions {
  int32_t max_length;  // longest path of the draft
  int32_t max_tokens;  // tokens of the draft in all
  int32_t max_paths;   // leaves of the draft
  int32_t min_match;   // shortest context that is trusted
  int32_t levels;      // contexts of falling length that are blended, and asked for candidates until there are max_paths
  int32_t reserved;
  double smoothing;    // weight of the next shorter context's estimate
  double min_score;    // least path probability of a drafted token
};

struct DraftToken {
  int32_t token;
  int32_t parent;  // index in the draft, -1 for the first tokens
  double score;    // estimated probability that this token and all before it are accepted
};

class SuffixIndex {
 public:
  // Occurrences are counted for substrings of up to `max_depth` tokens.
  explicit SuffixIndex(int32_t max_depth);

  int32_t add_sequence();
  int32_t sequences() const { return static_cast<int32_t>(sequences_.size()); }
  // Token ids must not be negative.
  void append(int32_t sequence, const int32_t* tokens, int64_t count);
  int64_t tokens(int32_t sequence) const { return static_cast<int64_t>(sequences_[sequence].tokens.size()); }

  // Keeps the last `keep` tokens of every sequence and forgets the rest.
  void trim(int64_t keep);

  // What may follow the sequence's last tokens. Returns the length of the longest context used, 0 if none was.
  int32_t draft(int32_t sequence, const DraftOptions& options, std::vector<DraftToken>& out);
  // The same for any context, of which the last max_depth - 1 tokens count.
  int32_t draft_context(const int32_t* context, int64_t count, const DraftOptions& options,
                        std::vector<DraftToken>& out);

  // How often the substring occurs; count <= max_depth.
  int64_t occurrences(const int32_t* pattern, int64_t count) const;
  int64_t bytes() const;

 private:
  struct State {
    int32_t length = 0;  // of the state's longest substring
    int32_t link = -1;   // the state of the longest suffix with more end positions
    int32_t count = 0;   // end positions, right where a substring of at most max_depth tokens is in the state
    int32_t first_edge = -1;
    int32_t edges = 0;
  };
  struct Edge {
    int32_t token, target, next;
  };
  struct Sequence {
    int32_t last = 0;    // state of the whole sequence
    int32_t match = 0;   // state of its last match_length tokens
    int32_t match_length = 0;
    std::vector<int32_t> tokens;
  };
  struct Context {
    int32_t state, length;
  };
  struct Candidate {
    double score;
    int32_t parent, depth, token;
    Context context;
  };

  int32_t find_edge(int32_t state, int32_t token) const;
  int32_t target(int32_t state, int32_t token) const;
  void add_edge(int32_t state, int32_t token, int32_t target);
  int32_t clone(int32_t parent, int32_t token, int32_t original);
  int32_t extend(int32_t last, int32_t token);
  void step(Sequence& sequence, int32_t token);
  void shrink(Context& context) const;
  double probability(Context context, int32_t token, int32_t levels, double smoothing) const;
  double blend(Context context, int32_t next, int32_t token, int32_t levels, double smoothing) const;
  void expand(Context context, double score, int32_t parent, int32_t depth, const DraftOptions& options);
  int32_t draft_from(Context context, const DraftOptions& options, std::vector<DraftToken>& out);
  uint64_t slot(int32_t state, int32_t token) const;
  void hash_edge(int32_t state, int32_t edge);
  void grow_hash();

  int32_t max_depth_;
  std::vector<State> states_;
  std::vector<Edge> edges_;
  std::vector<Sequence> sequences_;
  // Open addressing: (state, token) -> edge, for the states with more than a few edges.
  struct Slot {
    int32_t state = -1, edge = -1;
  };
  std::vector<Slot> hash_;
  uint64_t hashed_ = 0;
  // Scratch of draft_from, kept to save allocations.
  std::vector<Candidate> candidates_;
  std::vector<char> has_child_;
};

}  // namespace kimi_seer
