// Multi-query attention over a paged latent cache (MLA in its absorbed form): all heads and query tokens of a sequence
// are rows against one shared row a key; the values are the leading columns of the keys. Blocked online softmax.
//
// A row's result does not depend on the other rows: keys are visited in tiles at fixed positions of the sequence, and
// sums over more than kSplit keys are put together from splits of kSplit keys in order, whether one thread or many
// computed them.
#include <cstdlib>

#include "dots.h"
#include "isa.h"
#include "kernels.h"
#include "simd.h"

namespace kimi::KIMI_ISA {
namespace {

constexpr int kRows = 32;     // query rows that share a packed tile of keys
constexpr int kKeys = 32;     // keys in a tile: with D = 576 the tile takes 72 KiB of the second-level cache
constexpr int kSplit = 1024;  // keys in a split, the unit of parallel work within one row tile

struct Problem {
  const void* query;
  int64_t query_dtype;
  const void* cache;
  int64_t cache_dtype, block_size, block_stride, row_stride;
  const int32_t* block_table;
  int64_t table_stride;
  const int32_t *seq_lens, *cu_query;
  void* out;
  int64_t N, H, D, V, T;
  float scale;
  int64_t padded;  // D rounded up to whole vectors
};

// A tile of query rows of one sequence.
struct Tile {
  int64_t sequence, first_row, rows;
};

// Sums of one row tile over some keys.
struct Sums {
  float top[kRows], total[kRows];
  float* value;  // [rows, padded]
};

struct Scratch {
  float *query, *keys, *scores, *value, *more;
};

int64_t scratch_floats(int64_t padded) { return (3 * kRows + kKeys) * padded + kRows * kKeys; }

Scratch carve(float* memory, int64_t padded) {
  Scratch s;
  s.query = memory;
  s.value = s.query + kRows * padded;
  s.more = s.value + kRows * padded;
  s.keys = s.more + kRows * padded;
  s.scores = s.keys + kKeys * padded;
  return s;
}

float* aligned_floats(int64_t count) {
  return static_cast<float*>(std::aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64));
}

template <class T>
void pack_row(const T* from, int64_t D, int64_t padded, float factor, float* to) {
  int64_t d = 0;
  for (; d + kLanes <= D; d += kLanes) store(to + d, load(from + d) * factor);
  if (d < padded) store(to + d, load_n(from + d, int(D - d)) * factor);
}

int64_t query_length(const Problem& p, int64_t n) { return p.cu_query[n + 1] - p.cu_query[n]; }

// Keys that row `row` of sequence n may see.
int64_t visible_keys(const Problem& p, int64_t n, int64_t row) {
  int64_t keys = p.seq_lens[n] - query_length(p, n) + row / p.H + 1;
  return keys > 0 ? keys : 0;
}

void pack_queries(const Problem& p, const Tile& t, float* to) {
  const int64_t start = (p.cu_query[t.sequence] * p.H + t.first_row) * p.D;
  for (int64_t r = 0; r < t.rows; ++r) {
    if (p.query_dtype == 0) {
      pack_row(static_cast<const float*>(p.query) + start + r * p.D, p.D, p.padded, p.scale, to + r * p.padded);
    } else {
      pack_row(static_cast<const bf16*>(p.query) + start + r * p.D, p.D, p.padded, p.scale, to + r * p.padded);
    }
  }
}

void pack_keys(const Problem& p, int64_t sequence, int64_t first, int64_t count, float* to) {
  const int32_t* table = p.block_table + sequence * p.table_stride;
  for (int64_t j = 0; j < count; ++j) {
    const int64_t key = first + j;
    const int64_t at = table[key / p.block_size] * p.block_stride + key % p.block_size * p.row_stride;
    if (p.cache_dtype == 0) {
      pack_row(static_cast<const float*>(p.cache) + at, p.D, p.padded, 1.0f, to + j * p.padded);
    } else {
      pack_row(static_cast<const bf16*>(p.cache) + at, p.D, p.padded, 1.0f, to + j * p.padded);
    }
  }
  const int64_t filled = (count + kColBlock - 1) / kColBlock * kColBlock;
  for (int64_t c = count * p.padded; c < filled * p.padded; c += kLanes) store(to + c, vf{});
}

// One row's scores become weights e^(score - top), zero from `visible` on; returns the factor for the sums so far.
float soften(float* score, int64_t visible, float* top, float* total) {
  if (visible <= 0) {
    for (int j = 0; j < kKeys; j += kLanes) store(score + j, vf{});
    return 1.0f;
  }
  for (int64_t j = visible; j < kKeys; ++j) score[j] = -INFINITY;
  vf most = load(score);
  for (int j = kLanes; j < kKeys; j += kLanes) most = vmax(most, load(score + j));
  const float highest = hmax(most);
  const float now = highest > *top ? highest : *top;
  const float factor = std::exp(*top - now);
  vf sum{};
  for (int j = 0; j < kKeys; j += kLanes) {
    vf w = vexp(load(score + j) - now);
    store(score + j, w);
    sum += w;
  }
  *top = now;
  *total = *total * factor + hsum(sum);
  return factor;
}

// value[r] = value[r] * factor[r] + sum_j weight[r, j] * key_j for R rows.
template <int R>
void add_values(float* value, const float* factor, const float* weight, const float* keys, int64_t count,
                int64_t padded, int64_t V) {
  constexpr int C = kColBlock;  // vectors of a row held in registers
  int64_t v = 0;
  for (; v + C * kLanes <= V; v += C * kLanes) {
    vf acc[R * C];
#pragma GCC unroll 16
    for (int i = 0; i < R * C; ++i) acc[i] = load(value + i / C * padded + v + i % C * kLanes) * factor[i / C];
    for (int64_t j = 0; j < count; ++j) {
      vf key[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) key[c] = load(keys + j * padded + v + c * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        vf w = splat(weight[r * kKeys + j]);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) acc[r * C + c] += w * key[c];
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < R * C; ++i) store(value + i / C * padded + v + i % C * kLanes, acc[i]);
  }
  for (; v < V; v += kLanes) {
    for (int r = 0; r < R; ++r) {
      vf acc = load(value + r * padded + v) * factor[r];
      for (int64_t j = 0; j < count; ++j) acc += load(keys + j * padded + v) * weight[r * kKeys + j];
      store(value + r * padded + v, acc);
    }
  }
}

// Sums of a row tile over keys [first, last) of its sequence.
void attend(const Problem& p, const Tile& t, int64_t first, int64_t last, const Scratch& s, Sums& sums) {
  for (int64_t r = 0; r < t.rows; ++r) {
    sums.top[r] = -INFINITY;
    sums.total[r] = 0;
  }
  std::memset(sums.value, 0, t.rows * p.padded * sizeof(float));
  for (int64_t key = first; key < last; key += kKeys) {
    const int64_t count = last - key < kKeys ? last - key : kKeys;
    pack_keys(p, t.sequence, key, count, s.keys);
    const int64_t filled = (count + kColBlock - 1) / kColBlock * kColBlock;
    dots(s.query, p.padded, t.rows, s.keys, p.padded, filled, p.padded, s.scores, kKeys);
    float factor[kRows];
    for (int64_t r = 0; r < t.rows; ++r) {
      int64_t visible = visible_keys(p, t.sequence, t.first_row + r) - key;
      visible = visible < count ? visible : count;
      factor[r] = soften(s.scores + r * kKeys, visible, sums.top + r, sums.total + r);
    }
    int64_t r = 0;
    for (; r + 4 <= t.rows; r += 4)
      add_values<4>(sums.value + r * p.padded, factor + r, s.scores + r * kKeys, s.keys, count, p.padded, p.V);
    for (; r < t.rows; ++r)
      add_values<1>(sums.value + r * p.padded, factor + r, s.scores + r * kKeys, s.keys, count, p.padded, p.V);
  }
}

// sums <- sums over the keys of both.
void join(const Problem& p, int64_t rows, const Sums& other, Sums& sums) {
  for (int64_t r = 0; r < rows; ++r) {
    if (other.total[r] == 0) continue;
    const float top = other.top[r] > sums.top[r] ? other.top[r] : sums.top[r];
    const float mine = std::exp(sums.top[r] - top), theirs = std::exp(other.top[r] - top);
    sums.top[r] = top;
    sums.total[r] = sums.total[r] * mine + other.total[r] * theirs;
    for (int64_t v = 0; v < p.V; v += kLanes) {
      float* to = sums.value + r * p.padded + v;
      store(to, load(to) * mine + load(other.value + r * p.padded + v) * theirs);
    }
  }
}

void finish(const Problem& p, const Tile& t, const Sums& sums) {
  const int64_t start = (p.cu_query[t.sequence] * p.H + t.first_row) * p.V;
  for (int64_t r = 0; r < t.rows; ++r) {
    const float inverse = sums.total[r] > 0 ? 1.0f / sums.total[r] : 0.0f;
    for (int64_t v = 0; v < p.V; v += kLanes) {
      const int m = p.V - v < kLanes ? int(p.V - v) : kLanes;
      vf x = load(sums.value + r * p.padded + v) * inverse;
      if (p.query_dtype == 0) {
        store_n(static_cast<float*>(p.out) + start + r * p.V + v, x, m);
      } else {
        store_n(static_cast<bf16*>(p.out) + start + r * p.V + v, x, m);
      }
    }
  }
}

int64_t tile_keys(const Problem& p, const Tile& t) { return visible_keys(p, t.sequence, t.first_row + t.rows - 1); }

// One thread takes a row tile from its first key to its last.
void whole_tiles(const Problem& p, const Tile* tiles, int64_t count, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float* memory = aligned_floats(scratch_floats(p.padded));
    const Scratch s = carve(memory, p.padded);
    Sums sums, split;
    sums.value = s.value;
    split.value = s.more;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < count; ++i) {
      const Tile& t = tiles[i];
      const int64_t keys = tile_keys(p, t);
      pack_queries(p, t, s.query);
      attend(p, t, 0, keys < kSplit ? keys : kSplit, s, sums);
      for (int64_t key = kSplit; key < keys; key += kSplit) {
        attend(p, t, key, keys < key + kSplit ? keys : key + kSplit, s, split);
        join(p, t.rows, split, sums);
      }
      finish(p, t, sums);
    }
    std::free(memory);
  }
}

// Few row tiles over long contexts: the splits of a tile are shared out, then joined in order.
void split_tiles(const Problem& p, const Tile* tiles, int64_t count, int threads) {
  int64_t parts = 0;
  int64_t* start = static_cast<int64_t*>(std::malloc((count + 1) * sizeof(int64_t)));
  for (int64_t i = 0; i < count; ++i) {
    start[i] = parts;
    parts += (tile_keys(p, tiles[i]) + kSplit - 1) / kSplit;
  }
  start[count] = parts;
  Sums* sums = static_cast<Sums*>(std::malloc((parts + 1) * sizeof(Sums)));
  float* values = aligned_floats(parts * kRows * p.padded + 1);
  for (int64_t i = 0; i < parts; ++i) sums[i].value = values + i * kRows * p.padded;
#pragma omp parallel num_threads(threads)
  {
    float* memory = aligned_floats(scratch_floats(p.padded));
    const Scratch s = carve(memory, p.padded);
#pragma omp for schedule(dynamic)
    for (int64_t part = 0; part < parts; ++part) {
      int64_t i = 0;
      while (start[i + 1] <= part) ++i;
      const int64_t keys = tile_keys(p, tiles[i]), key = (part - start[i]) * kSplit;
      pack_queries(p, tiles[i], s.query);
      attend(p, tiles[i], key, keys < key + kSplit ? keys : key + kSplit, s, sums[part]);
    }
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < count; ++i) {
      if (start[i + 1] == start[i]) {  // no keys at all
        Sums none;
        none.value = s.value;
        attend(p, tiles[i], 0, 0, s, none);
        finish(p, tiles[i], none);
        continue;
      }
      for (int64_t part = start[i] + 1; part < start[i + 1]; ++part)
        join(p, tiles[i].rows, sums[part], sums[start[i]]);
      finish(p, tiles[i], sums[start[i]]);
    }
    std::free(memory);
  }
  std::free(values);
  std::free(sums);
  std::free(start);
}

}  // namespace

// query [T, H, D] and out [T, H, V] contiguous; cache rows of D contiguous elements.
void mla_paged_attention(const void* query, int64_t query_dtype, const void* cache, int64_t cache_dtype,
                         int64_t block_size, int64_t block_stride, int64_t row_stride, const int32_t* block_table,
                         int64_t table_stride, const int32_t* seq_lens, const int32_t* cu_query, void* out, int64_t N,
                         int64_t T, int64_t H, int64_t D, int64_t V, float scale, int64_t threads) {
  Problem p{query,    query_dtype, cache, cache_dtype, block_size, block_stride, row_stride, block_table, table_stride,
            seq_lens, cu_query,    out,   N,           H,          D,            V,          T,           scale,
            (D + kLanes - 1) / kLanes * kLanes};
  const int64_t element = query_dtype == 0 ? 4 : 2, used = cu_query[N];
  if (used < T) std::memset(static_cast<char*>(out) + used * H * V * element, 0, (T - used) * H * V * element);
  int64_t count = 0;
  for (int64_t n = 0; n < N; ++n) count += (query_length(p, n) * H + kRows - 1) / kRows;
  if (count == 0) return;
  Tile* tiles = static_cast<Tile*>(std::malloc(count * sizeof(Tile)));
  int64_t at = 0, parts = 0, work = 0;
  for (int64_t n = 0; n < N; ++n) {
    const int64_t rows = query_length(p, n) * H;
    for (int64_t row = 0; row < rows; row += kRows) {
      tiles[at] = {n, row, rows - row < kRows ? rows - row : kRows};
      const int64_t keys = tile_keys(p, tiles[at]);
      parts += (keys + kSplit - 1) / kSplit;
      work += tiles[at++].rows * keys * (D + V);
    }
  }
  const int team = work < 1 << 16 ? 1 : int(threads);
  if (team > 1 && count < 2 * threads && parts > count) {
    split_tiles(p, tiles, count, team);
  } else {
    whole_tiles(p, tiles, count, team);
  }
  std::free(tiles);
}
KIMI_EXPORT(mla_paged_attention);

}  // namespace kimi::KIMI_ISA
