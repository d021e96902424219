// Tile lists: which key tiles a query tile has to visit, decided from summaries of the tiles, for the CPU and for CUDA
// alike.
//
// A tile is a stretch of consecutive key tokens of one sequence (a query tile: the tokens that its rows stand in). It
// is summed up by the smallest and largest position and segment of each modality in it. Positions and segments rise
// along a sequence, so for each pair of modalities those four numbers decide whether any, and whether all, of the
// tile's queries see the other tile's keys. One question needs a look at the tokens: with a window and common columns,
// whether any key is near enough (`any_in_window`).
#pragma once

#include <climits>
#include <cstdint>

#include "intervals.h"

namespace moda {

constexpr int kMaxModalities = 16;
constexpr int kMaxListedTokens = 65536;  // of one sequence; longer ones overflow
constexpr int kNoWindow = INT_MAX;       // farther than any distance of int32 positions


// Passed to kernels by value.
struct Mask {
  int modalities;
  int window;
  uint8_t rules[kMaxModalities * kMaxModalities];  // [query modality, key modality], as written by Python

  MODA_HD uint8_t rule(int query, int key) const { return rules[query * modalities + key]; }
};

struct Tile {
  int sequence, row, rows;  // row: the first, in the flattened queries or keys; rows = 0: an unused tile
};

struct Range {
  int begin, end;
};

// Of one modality in one tile: smallest and largest position, smallest and largest segment.
struct alignas(16) Span {
  int low, high, first, last;

  static MODA_HD Span none() { return {INT_MAX, INT_MIN, INT_MAX, INT_MIN}; }
  MODA_HD bool is_none() const { return high < low; }
  MODA_HD void add(int position, int segment) {
    low = position < low ? position : low;
    high = position > high ? position : high;
    first = segment < first ? segment : first;
    last = segment > last ? segment : last;
  }
};

struct alignas(16) Summary {
  Range tokens;
  uint32_t present;   // one bit for each modality that occurs
  uint32_t complete;  // as many tokens as a whole tile has rows, none of them padding
};

// The queries or the keys: their tiles, and their lists of tiles of the other side.
struct Side {
  const int32_t* cu_seqlens;  // [sequences + 1]
  int block;                  // rows of a tile
  int tiles;                  // capacity, from sizes known on the host; what is not used is zero
  int width;                  // columns of `lists`
  int32_t* rows;              // out [tiles, 3]: sequence, first row, rows
  int32_t* lists;             // out [tiles, width]: full tiles, then partial ones, each ascending
  int32_t* counts;            // out [tiles, 2]: full ones, all
  int32_t* first;             // workspace [sequences + 1]: first tile of each sequence
  Summary* summaries;         // workspace [tiles]
  Span* spans;                // workspace [tiles, modalities]
};

struct TileLists {
  int sequences;
  const int32_t *modality, *segment, *position;  // [tokens]
  const int32_t* first_column;                   // [sequences]: the token that query 0 of a sequence stands in
  Mask mask;
  Side queries, keys;
  int32_t* overflow;  // out [1]: sequences longer than kMaxListedTokens
};

// Workspace in int32, aligned to 16 bytes, and its division among the sides.
inline int64_t workspace_of(const Side& side, int sequences, int modalities) {
  const int64_t first = (int64_t{sequences} + 1 + 3) / 4 * 4;
  return first + int64_t{4} * side.tiles * (1 + modalities);
}

inline void attach_workspace(TileLists& a, int32_t* workspace) {
  for (Side* side : {&a.queries, &a.keys}) {
    side->summaries = reinterpret_cast<Summary*>(workspace);
    side->spans = reinterpret_cast<Span*>(side->summaries + side->tiles);
    side->first = reinterpret_cast<int32_t*>(side->spans + int64_t{side->tiles} * a.mask.modalities);
    workspace += workspace_of(*side, a.sequences, a.mask.modalities);
  }
}

MODA_HD int tiles_in(int length, int block) { return length > 0 ? (length - 1) / block + 1 : 0; }

// Needs side.first.
MODA_HD Tile tile_at(const Side& side, int sequences, int id) {
  if (id >= side.first[sequences]) return {0, 0, 0};
  const int s = interval_of(side.first, sequences, id);
  const int start = side.cu_seqlens[s];
  const int offset = (id - side.first[s]) * side.block;
  const int left = side.cu_seqlens[s + 1] - start - offset;
  return {s, start + offset, left < side.block ? left : side.block};
}

// The key tokens that a tile's rows stand in. Query rows before or after the keys stand nowhere, as if padding.
MODA_HD Range tokens_of(const TileLists& a, bool is_query, const Tile& tile) {
  if (tile.rows == 0) return {0, 0};
  if (!is_query) return {tile.row, tile.row + tile.rows};
  const int s = tile.sequence;
  // 64 bits: first_column has not been looked at on CUDA.
  const int64_t begin = int64_t{a.first_column[s]} + tile.row - a.queries.cu_seqlens[s], end = begin + tile.rows;
  const int64_t low = a.keys.cu_seqlens[s], high = a.keys.cu_seqlens[s + 1];
  const int64_t from = begin < low ? low : (begin > high ? high : begin);
  const int64_t to = end < low ? low : (end > high ? high : end);
  return {static_cast<int>(from), static_cast<int>(to)};
}

// The tiles of the other side in a tile's sequence: the candidates for its list.
MODA_HD Range candidates_of(const Side& side, const Side& other, const Tile& tile) {
  if (tile.rows == 0) return {0, 0};
  const int begin = other.first[tile.sequence];
  int end = other.first[tile.sequence + 1];
  end = end - begin > side.width ? begin + side.width : end;
  return {begin, end < other.tiles ? end : other.tiles};
}

// Whether a query of modality `query` in q sees a key of modality `key` in k under PAST and a window. Linear in the
// tokens: of the keys before a query only the latest matters.
MODA_HD bool any_in_window(const TileLists& a, const Range& q, int query, const Range& k, int key) {
  int latest = -1;
  for (int t = k.begin; t < q.end; ++t) {
    const int modality = a.modality[t];
    if (modality == key && t < k.end) latest = a.position[t];
    if (modality == query && t >= q.begin && latest >= 0 && a.position[t] - latest < a.mask.window) return true;
  }
  return false;
}

enum class Seen : uint8_t { kUnsure, kNone, kSome, kAll };

// How much the queries of one modality in a tile see of the keys of one modality in another. kUnsure, possible with
// `common` columns and a window only: not all, but perhaps some.
MODA_HD Seen decide(uint8_t rule, bool same_modality, int window, bool common, const Span& q, const Span& k) {
  if (rule & kAll) return Seen::kAll;
  const bool past = rule & kPast, segment = same_modality && (rule & kSegment);
  const bool inside = q.high - k.low < window;  // even the farthest pair is
  if (past && q.low >= k.high && inside) return Seen::kAll;
  if (segment) {
    const bool one = q.first == q.last && k.first == k.last && q.first == k.first;
    // Hidden are later segments, and earlier ones outside the window.
    if (one || (past && k.last <= q.first && inside)) return Seen::kAll;
    if (q.first <= k.last && k.first <= q.last) return Seen::kSome;
  }
  // Without common columns the closest pair is the first query and the last key.
  if (past && q.high >= k.low && q.low - k.high < window) {
    return common && window != kNoWindow ? Seen::kUnsure : Seen::kSome;
  }
  return Seen::kNone;
}

// Full: all rows of both tiles are tokens, and every query sees every key, so that a kernel needs no masks at all.
// Empty: no query sees any key.
enum class PairKind : uint8_t { kEmpty, kPartial, kFull };

MODA_HD PairKind classify(const TileLists& a, const Summary& q, const Span* q_spans, const Summary& k,
                          const Span* k_spans) {
  const bool common = q.tokens.begin < k.tokens.end && k.tokens.begin < q.tokens.end;
  bool some = false, all = q.complete != 0 && k.complete != 0;
  for (int query = 0; query < a.mask.modalities; ++query) {
    if (!(q.present >> query & 1)) continue;
    for (int key = 0; key < a.mask.modalities; ++key) {
      if (!(k.present >> key & 1)) continue;
      const Seen seen =
          decide(a.mask.rule(query, key), query == key, a.mask.window, common, q_spans[query], k_spans[key]);
      all = all && seen == Seen::kAll;
      some = some || seen == Seen::kAll || seen == Seen::kSome ||
             (seen == Seen::kUnsure && any_in_window(a, q.tokens, query, k.tokens, key));
      if (some && !all) return PairKind::kPartial;
    }
  }
  return !some ? PairKind::kEmpty : all ? PairKind::kFull : PairKind::kPartial;
}

namespace cpu {
void tile_lists(const TileLists&);
}  // namespace cpu

}  // namespace moda
