// Segmentation and tile lists on the CPU: one thread, one pass over the tokens, one over the tile pairs.

#include <algorithm>
#include <vector>

#include "segmentation.h"
#include "tiles.h"

namespace moda::cpu {

void segment_tokens(const SegmentTokens& a) {
  std::fill_n(a.prefix, a.modalities, 0);
  int sequence = 0, segments = 0, position = 0;
  for (int t = 0; t < a.tokens; ++t) {
    while (sequence + 1 < a.sequences && a.cu_seqlens[sequence + 1] <= t) ++sequence;
    const Token token = token_at(a, t, sequence);
    if (token.begins_sequence) position = 0;
    segments += token.begins_segment;
    a.sequence[t] = sequence;
    a.segment[t] = token.real ? segments - 1 : -1;
    a.position[t] = token.real ? position : -1;
    position += token.real;
    const int32_t* before = a.prefix + int64_t{a.modalities} * t;
    int32_t* after = a.prefix + int64_t{a.modalities} * (t + 1);
    for (int m = 0; m < a.modalities; ++m) after[m] = before[m] + counts(token, kFirstModality + m);
  }
  *a.num_segments = segments;
}

void segment_table(const SegmentTable& a) {
  std::fill_n(a.table, int64_t{4} * a.max_segments, 0);
  for (int t = 0; t < a.tokens; ++t) {
    int32_t* row = row_of(a, t);
    if (row == nullptr) continue;
    if (begins_run(a, t)) {
      row[0] = a.sequence[t];
      row[1] = t;
      row[3] = a.modality[t];
    }
    ++row[2];
  }
}

void token_facts(const TokenFacts& a) {
  std::vector<int> last_sequence(a.roles, -1);
  std::vector<int32_t> last_step(a.roles, 0);
  int before = -1;  // the last token that is no padding
  *a.falls = 0;
  for (int t = 0; t < a.tokens; ++t) {
    a.step[t] = 0;
    a.chunk[t] = -1;
    if (a.modality[t] < 0) continue;
    const int role = a.role[t], sequence = a.sequence[t];
    if (a.steps != nullptr && role >= 0 && role < a.roles) {
      const int64_t step = std::clamp<int64_t>(a.steps[t], INT32_MIN, INT32_MAX);
      a.step[t] = static_cast<int32_t>(step);
      *a.falls += step != a.steps[t];
      *a.falls += last_sequence[role] == sequence && a.step[t] < last_step[role];
      last_sequence[role] = sequence;
      last_step[role] = a.step[t];
    }
    if (a.chunks != nullptr) {
      const bool goes_on = before >= 0 && a.sequence[before] == sequence && a.chunks[before] == a.chunks[t];
      if (a.chunks[t] >= 0) a.chunk[t] = goes_on ? a.chunk[before] : t;
      before = t;
    }
  }
}

namespace {

void cut(const TileLists& a, const Side& side) {
  side.first[0] = 0;
  for (int s = 0; s < a.sequences; ++s) {
    side.first[s + 1] = side.first[s] + tiles_in(side.cu_seqlens[s + 1] - side.cu_seqlens[s], side.block);
  }
}

void summarise(const TileLists& a, const Side& side, bool is_query) {
  const int modalities = a.mask.modalities;
  for (int id = 0; id < side.tiles; ++id) {
    const Tile tile = tile_at(side, a.sequences, id);
    const Range tokens = tokens_of(a, is_query, tile);
    Span* spans = side.spans + int64_t{id} * modalities;
    std::fill_n(spans, modalities, Span::none());
    Summary summary{tokens, 0, tokens.end - tokens.begin == side.block};
    for (int t = tokens.begin; t < tokens.end; ++t) {
      const int m = a.modality[t];
      if (m < 0) summary.complete = 0;
      if (m < 0 || m >= modalities) continue;
      summary.present |= 1u << m;
      spans[m].add(a.position[t], a.segment[t]);
    }
    side.summaries[id] = summary;
    std::copy_n(&tile.sequence, 3, side.rows + int64_t{3} * id);
  }
}

// Lists of `side`: for each of its tiles the tiles of `other` that it sees, or is seen by.
void list(const TileLists& a, const Side& side, const Side& other, bool is_query) {
  const int modalities = a.mask.modalities;
  std::vector<int32_t> partial;
  for (int id = 0; id < side.tiles; ++id) {
    const Tile tile{side.rows[3 * int64_t{id}], side.rows[3 * int64_t{id} + 1], side.rows[3 * int64_t{id} + 2]};
    const Range candidates = candidates_of(side, other, tile);
    const Summary& mine = side.summaries[id];
    const Span* my_spans = side.spans + int64_t{id} * modalities;
    int32_t* const begin = side.lists + int64_t{id} * side.width;
    int32_t* end = begin;
    partial.clear();
    for (int c = candidates.begin; c < candidates.end; ++c) {
      const Summary& theirs = other.summaries[c];
      const Span* their_spans = other.spans + int64_t{c} * modalities;
      const PairKind kind = is_query ? classify(a, mine, my_spans, theirs, their_spans)
                                     : classify(a, theirs, their_spans, mine, my_spans);
      if (kind == PairKind::kFull) *end++ = c;
      if (kind == PairKind::kPartial) partial.push_back(c);
    }
    side.counts[2 * int64_t{id}] = static_cast<int32_t>(end - begin);
    end = std::copy(partial.begin(), partial.end(), end);
    side.counts[2 * int64_t{id} + 1] = static_cast<int32_t>(end - begin);
    std::fill(end, begin + side.width, 0);
  }
}

}  // namespace

void tile_lists(const TileLists& arguments) {
  TileLists a = arguments;
  const int modalities = a.mask.modalities;
  const int64_t size = workspace_of(a.queries, a.sequences, modalities) + workspace_of(a.keys, a.sequences, modalities);
  std::vector<Span> workspace(static_cast<size_t>((size + 3) / 4));  // Spans, for their alignment
  attach_workspace(a, reinterpret_cast<int32_t*>(workspace.data()));

  *a.overflow = 0;
  for (int s = 0; s < a.sequences; ++s) {
    *a.overflow += a.keys.cu_seqlens[s + 1] - a.keys.cu_seqlens[s] > kMaxListedTokens;
  }
  cut(a, a.queries);
  cut(a, a.keys);
  summarise(a, a.queries, true);
  summarise(a, a.keys, false);
  list(a, a.queries, a.keys, true);
  list(a, a.keys, a.queries, false);
}

}  // namespace moda::cpu
