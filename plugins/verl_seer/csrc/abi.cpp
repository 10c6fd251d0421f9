// The C ABI of the library. The Python side checks arguments; here only memory can run out.
#include <cstring>
#include <new>
#include <stdexcept>

#include "suffix_index.h"

#define KIMI_API extern "C" __attribute__((visibility("default")))

using kimi_seer::DraftOptions;
using kimi_seer::DraftToken;
using kimi_seer::SuffixIndex;

namespace {

constexpr int64_t kOutOfMemory = -1;

template <class F>
int64_t guarded(F&& body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return kOutOfMemory;
  } catch (const std::length_error&) {
    return kOutOfMemory;
  }
}

int64_t copy_out(const std::vector<DraftToken>& draft, int32_t* tokens, int32_t* parents, double* scores) {
  for (size_t i = 0; i < draft.size(); ++i) {
    tokens[i] = draft[i].token;
    parents[i] = draft[i].parent;
    scores[i] = draft[i].score;
  }
  return static_cast<int64_t>(draft.size());
}

thread_local std::vector<DraftToken> scratch;

}  // namespace

// Raised whenever a signature or DraftOptions changes; the Python side refuses any other number.
KIMI_API int kimi_seer_abi_version() { return 1; }

KIMI_API SuffixIndex* kimi_seer_new(int32_t max_depth) {
  try {
    return new SuffixIndex(max_depth);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

KIMI_API void kimi_seer_free(SuffixIndex* index) { delete index; }

KIMI_API int64_t kimi_seer_add_sequence(SuffixIndex* index) {
  return guarded([&] { return static_cast<int64_t>(index->add_sequence()); });
}

// Returns the sequence's length; -2 - i, and nothing is added, if token i is not in [0, vocabulary).
KIMI_API int64_t kimi_seer_append(SuffixIndex* index, int32_t sequence, const int32_t* tokens, int64_t count,
                                  int32_t vocabulary) {
  for (int64_t i = 0; i < count; ++i) {
    if (tokens[i] < 0 || tokens[i] >= vocabulary) return -2 - i;
  }
  return guarded([&] {
    index->append(sequence, tokens, count);
    return index->tokens(sequence);
  });
}

KIMI_API int64_t kimi_seer_trim(SuffixIndex* index, int64_t keep) {
  return guarded([&] {
    index->trim(keep);
    return int64_t{0};
  });
}

KIMI_API int64_t kimi_seer_occurrences(const SuffixIndex* index, const int32_t* pattern, int64_t count) {
  return index->occurrences(pattern, count);
}

KIMI_API int64_t kimi_seer_bytes(const SuffixIndex* index) { return index->bytes(); }

// Drafts for `count` requests at once. Request i writes at most options[i].max_tokens tokens from offset
// i * stride; lengths[i] and matches[i] are the draft's size and the length of the context it came from.
KIMI_API int64_t kimi_seer_draft(SuffixIndex* const* indices, const int32_t* sequences, int64_t count,
                                 const DraftOptions* options, int64_t stride, int32_t* tokens, int32_t* parents,
                                 double* scores, int32_t* lengths, int32_t* matches) {
  return guarded([&] {
    for (int64_t i = 0; i < count; ++i) {
      matches[i] = indices[i]->draft(sequences[i], options[i], scratch);
      const int64_t at = i * stride;
      lengths[i] = static_cast<int32_t>(copy_out(scratch, tokens + at, parents + at, scores + at));
    }
    return int64_t{0};
  });
}

KIMI_API int64_t kimi_seer_draft_context(SuffixIndex* index, const int32_t* context, int64_t count,
                                         const DraftOptions* options, int32_t* tokens, int32_t* parents,
                                         double* scores, int32_t* match) {
  return guarded([&] {
    *match = index->draft_context(context, count, *options, scratch);
    return copy_out(scratch, tokens, parents, scores);
  });
}
