// A mask over a layout as intervals of positions: what is asked for, and the decision about one row and one pass, for
// the CPU and for CUDA alike. The meaning of the rules is that of tokens/intervals.py, which also says which passes
// there are; here they only become numbers.
#pragma once

#include <cstdint>

#include "segmentation.h"

namespace moda {

enum Rule : int { kPast = 1, kSegment = 2, kAll = 4, kBefore = 8, kUpto = 16, kChunk = 32 };
constexpr int kMember = 64;  // beside a role's rule: keys of this role are in the pass
constexpr int kFar = 2147483647;
constexpr int kEmptyLow = kFar, kEmptyHigh = -2;

// Some passes of a mask, by value: what does not fit into one batch is done in several.
constexpr int kPassesAtOnce = 64;
constexpr int kRulesAtOnce = 2048;

struct PassBatch {
  int first, count;           // passes first ... first + count - 1
  int32_t modality[kPassesAtOnce];  // of the keys, -1 for any
  int8_t own[kPassesAtOnce];        // rows of that modality (1), of others (0), all (-1)
  int32_t prefix[kPassesAtOnce];    // role of the keys if a rule is kBefore or kUpto (there is one role then), else -1
  int32_t slot[kPassesAtOnce];      // ... and the row of `last` for it
  uint8_t rules[kRulesAtOnce];      // [count, roles]
};

struct MaskIntervals {
  int tokens, rows, sequences, roles, max_segments, passes, intervals;
  int window;       // kFar: none
  bool window_all;  // of everything, not of kPast and kChunk alone
  const int32_t *modality, *role, *position, *segment, *step, *chunk, *sequence;  // [tokens]
  const int32_t* cu_seqlens;                                                      // [sequences + 1]
  const int32_t* table;                                                           // [max_segments, 4]
  const int64_t* columns;                                                         // [rows], -1 for none
  int32_t* limits;                                                                // [2 passes or 1 + 3 passes, rows], see below
  int32_t* positions;                                                             // [passes, tokens]
};

// What a row has of its own, for all passes.
struct Row {
  int token = -1, modality = -1, role = -1, position = -1;
  int segment_begin = 0, segment_end = 0;  // positions, both inclusive
  int chunk_begin = 0;
  bool in_segment = false, in_chunk = false;
};

MODA_HD Row row_at(const MaskIntervals& a, int64_t i) {
  Row row;
  const int64_t t = a.columns[i];
  if (t < 0 || t >= a.tokens || a.modality[t] < 0 || a.role[t] < 0) return row;
  row.token = static_cast<int>(t);
  row.modality = a.modality[t];
  row.role = a.role[t];
  row.position = a.position[t];
  const int segment = a.segment[t];
  row.in_segment = segment >= 0 && segment < a.max_segments;
  if (row.in_segment) {
    row.segment_begin = a.position[a.table[int64_t{4} * segment + 1]];
    row.segment_end = row.segment_begin + a.table[int64_t{4} * segment + 2] - 1;
  }
  const int chunk = a.chunk[t];
  row.in_chunk = chunk >= 0 && chunk < a.tokens;
  if (row.in_chunk) row.chunk_begin = a.position[chunk];
  return row;
}

// The rule of a row in pass p of a batch, 0 where it sees nothing.
MODA_HD int rule_of(const MaskIntervals& a, const PassBatch& batch, int p, const Row& row) {
  if (row.token < 0 || row.role >= a.roles) return 0;
  if (batch.own[p] >= 0 && (row.modality == batch.modality[p]) != (batch.own[p] != 0)) return 0;
  return batch.rules[p * a.roles + row.role] & ~kMember;
}

MODA_HD int position_in(const MaskIntervals& a, const PassBatch& batch, int p, int t) {
  const int role = a.role[t], modality = a.modality[t];
  if (modality < 0 || role < 0 || role >= a.roles) return -1;
  if ((batch.rules[p * a.roles + role] & kMember) == 0) return -1;
  return batch.modality[p] < 0 || batch.modality[p] == modality ? a.position[t] : -1;
}

struct Interval {
  int low, high;
};

MODA_HD Interval nearer(Interval x, int nearest) {
  if (x.low < nearest) x.low = nearest;
  return x.low < x.high ? x : Interval{kEmptyLow, kEmptyHigh};
}

// Where the limits of an interval stand among those of all: with one interval lo and hi of each pass; with two lo of all
// second ones, then of each pass lo and hi of the first and hi of the second (moda_kernels/tokens/intervals.py).
MODA_HD int64_t lower_limit(int64_t pass, int interval, int intervals) {
  return interval == 0 ? pass * (1 + intervals) + intervals - 1 : 0;
}
MODA_HD int64_t upper_limit(int64_t pass, int interval, int intervals) {
  return pass * (1 + intervals) + intervals + interval;
}

// The intervals of a row. prefix: the last position that kBefore or kUpto shows, -1 for none.
MODA_HD void write_limits(const MaskIntervals& a, int64_t pass, int64_t i, int rule, const Row& row, int prefix) {
  int nearest = -1;
  if (a.window != kFar && row.position >= a.window) nearest = row.position - a.window;
  const int past = a.window_all ? -1 : nearest;
  Interval near{kEmptyLow, kEmptyHigh};
  if ((rule & kPast) != 0) near = {past, row.position};
  if ((rule & kChunk) != 0 && row.in_chunk) {
    const int begin = row.chunk_begin - 1 > past ? row.chunk_begin - 1 : past;
    near = {begin < near.low ? begin : near.low, row.position};
  }
  if ((rule & kSegment) != 0 && row.in_segment) {
    if (row.segment_begin - 1 < near.low) near.low = row.segment_begin - 1;
    if (row.segment_end > near.high) near.high = row.segment_end;
  }
  if ((rule & kAll) != 0) near = {-1, kFar};
  int second = kEmptyHigh;
  if (prefix >= 0) {
    if (prefix >= near.low) {  // they touch
      near = {-1, prefix > near.high ? prefix : near.high};
    } else if (near.low >= near.high) {  // there is nothing else
      near = {-1, prefix};
    } else {
      second = prefix;
    }
  }
  const int window = a.window_all ? nearest : -1;
  near = nearer(near, window);
  a.limits[lower_limit(pass, 0, a.intervals) * a.rows + i] = near.low;
  a.limits[upper_limit(pass, 0, a.intervals) * a.rows + i] = near.high;
  if (a.intervals == 2) {
    a.limits[i] = window;
    a.limits[upper_limit(pass, 1, a.intervals) * a.rows + i] = second > window ? second : kEmptyHigh;
  }
}

namespace cpu {
void mask_intervals(const MaskIntervals&, const PassBatch&);
}  // namespace cpu

}  // namespace moda
