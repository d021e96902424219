// Walks of tiles from intervals: what is asked for, and the decisions about one tile, for the CPU and for CUDA alike.
// What walks are, and why they are right, says moda_kernels/tokens/walks.py, whose PyTorch twins give the same integers.
#pragma once

#include <climits>
#include <cstdint>

#include "intervals.h"

namespace moda {

constexpr int kNowhere = -2;     // the upper end of an empty interval
constexpr int kWorkLevels = 64;  // how finely work is told apart where the longest tiles come first
constexpr int kMaxChains = 8;
constexpr int kRuns = 8;         // numbers of a query tile

MODA_HD int at_least(int value, int least) { return value < least ? least : value; }
MODA_HD int at_most(int value, int most) { return value > most ? most : value; }

struct CutTile {
  int sequence, row, rows;  // row: the first, in the flattened queries or keys; rows = 0: a gap
};

// Queries or keys, cut into tiles.
struct Cut {
  const int32_t* cu_seqlens;  // [sequences + 1], non-decreasing, within the rows or keys
  int sequences;              // at least 1
  int length;                 // of each sequence; -1 where they differ
  int block;                  // tokens of a tile
  int tiles;                  // capacity

  // Number of a sequence's first tile. No sum over sequences is needed: numbers have gaps.
  MODA_HD int first(int sequence) const {
    if (sequence >= sequences) return tiles;
    if (length >= 0) return sequence * ((length + block - 1) / block);
    return cu_seqlens[sequence] / block + sequence;
  }
  MODA_HD int sequence_of(int tile) const {
    int low = 0, high = sequences - 1;
    while (low < high) {
      const int middle = low + (high - low + 1) / 2;
      if (first(middle) <= tile) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
  MODA_HD CutTile tile(int number) const {
    const int sequence = sequence_of(number);
    const int64_t offset = int64_t{number - first(sequence)} * block;
    const int64_t left = cu_seqlens[sequence + 1] - cu_seqlens[sequence] - offset;
    if (left <= 0) return {0, 0, 0};
    return {sequence, static_cast<int>(cu_seqlens[sequence] + offset), left < block ? static_cast<int>(left) : block};
  }
};

// What both walks are made from.
struct WalkInput {
  int passes, intervals;     // each at least 1; walk w = pass * intervals + interval
  int rows, tokens;          // of the queries, of the keys
  const int32_t* limits;     // as in intervals.h
  const int32_t* positions;  // [passes, tokens], -1 where a key is not in the pass
  const uint8_t* real;       // [rows], false for padding, which takes part in no intersection; null: all rows do
  Cut queries, keys;

  MODA_HD int walks() const { return passes * intervals; }
  MODA_HD const int32_t* lo(int walk) const {
    return limits + lower_limit(walk / intervals, walk % intervals, intervals) * rows;
  }
  MODA_HD const int32_t* hi(int walk) const {
    return limits + upper_limit(walk / intervals, walk % intervals, intervals) * rows;
  }
};

struct QueryWalk {
  WalkInput of;
  bool affine;
  int32_t* tiles;      // [Q, 3]
  int32_t* order;      // [Q]
  int32_t* runs;       // [W, Q, kRuns]
  int32_t* key_lists;  // [P, 2 K + 1]
};

struct KeyWalk {
  WalkInput of;
  int chains;            // 1 to kMaxChains
  int32_t* tiles;        // [K, 3]
  int32_t* order;        // [K]
  int32_t* runs;         // [W, K, 4 chains + 4]
  int32_t* query_lists;  // [W, Q + 1]

  MODA_HD int runs_of_tile() const { return 4 * chains + 4; }
};

// Of a key tile in a pass.
struct KeySpan {
  int low = kFar, high = -1;  // lowest and highest position
  bool whole = true;          // all keys that a tile can have are in the pass

  MODA_HD void add(int position) {
    if (position < 0) {
      whole = false;
      return;
    }
    low = at_most(position, low);
    high = at_least(position, high);
  }
};

// Of a query tile in a walk: the union of its rows' intervals, and their intersection.
struct RowSpan {
  int union_lo = kFar, union_hi = kNowhere, common_lo = -1, common_hi = kFar;
  bool all = true;  // every row that a tile can have sees something

  MODA_HD void add(int lo, int hi, bool counts) {
    const bool sees = lo < hi;
    lo = sees ? lo : kFar;
    hi = sees ? hi : kNowhere;
    all = all && sees;
    union_lo = at_most(lo, union_lo);
    union_hi = at_least(hi, union_hi);
    if (counts) {
      common_lo = at_least(lo, common_lo);
      common_hi = at_most(hi, common_hi);
    }
  }
};

// The first of [begin, end) whose rising bound exceeds a limit, else `end`.
MODA_HD int first_above(const int32_t* bounds, int begin, int end, int limit) {
  while (begin < end) {
    const int middle = begin + (end - begin) / 2;
    if (bounds[middle] > limit) {
      end = middle;
    } else {
      begin = middle + 1;
    }
  }
  return begin;
}

// Key tiles that a query tile meets, [u0, u1), and those among them all of whose keys are in the intersection, [f0, f1).
struct TileRanges {
  int u0, u1, f0, f1;
};

// low: lowest position from a tile on, high: highest one up to it, both within the sequence, whose tiles are [begin, end).
MODA_HD TileRanges ranges_of(const int32_t* low, const int32_t* high, int begin, int end, const RowSpan& rows) {
  TileRanges r;
  r.u0 = first_above(high, begin, end, rows.union_lo);
  r.u1 = at_least(first_above(low, begin, end, rows.union_hi), r.u0);
  r.f0 = at_most(at_least(first_above(low, begin, end, rows.common_lo), r.u0), r.u1);
  r.f1 = at_most(at_least(first_above(high, begin, end, rows.common_hi), r.f0), r.u1);
  return r;
}

// Prefix counts over the key tiles of a pass, [K + 1], and what an affine walk needs.
struct KeyRanks {
  const int32_t *some, *whole;            // tiles before this one with a key in the pass; with all keys
  const int32_t *next_whole, *next_other;  // the first tile from here on that is whole, that is not; K where there is none
};

MODA_HD void write_runs(const QueryWalk& a, const KeyRanks& ranks, TileRanges r, int first_tile, int32_t* runs) {
  const int tiles = a.of.keys.tiles;
  if (a.affine) {
    // The first unbroken stretch of whole tiles in the intersection.
    r.f0 = at_most(ranks.next_whole[r.f0], r.f1);
    r.f1 = at_most(ranks.next_other[r.f0], r.f1);
    runs[0] = r.f0 - first_tile;
    runs[1] = r.f1 - first_tile;
    runs[4] = runs[5] = 0;
  } else {
    const int others = tiles + ranks.whole[tiles];
    runs[0] = tiles + ranks.whole[r.f0];
    runs[1] = tiles + ranks.whole[r.f1];
    runs[4] = others + ranks.some[r.f0] - ranks.whole[r.f0];
    runs[5] = others + ranks.some[r.f1] - ranks.whole[r.f1];
  }
  runs[2] = ranks.some[r.u0];
  runs[3] = ranks.some[r.f0];
  runs[6] = ranks.some[r.f1];
  runs[7] = ranks.some[r.u1];
}

// Where the column of a key tile stands in the lists of a pass: once in N, once in C or I.
MODA_HD void write_column(const KeyRanks& ranks, int tiles, int tile, int column, int32_t* lists) {
  if (ranks.some[tile + 1] == ranks.some[tile]) return;
  const bool whole = ranks.whole[tile + 1] > ranks.whole[tile];
  lists[ranks.some[tile]] = column;
  const int others = tiles + ranks.whole[tiles] + ranks.some[tile] - ranks.whole[tile];
  lists[whole ? tiles + ranks.whole[tile] : others] = column;
}

MODA_HD int work_of_query_tile(const QueryWalk& a, int tile) {
  int work = 0;
  for (int w = 0; w < a.of.walks(); ++w) {
    const int32_t* runs = a.runs + (int64_t{w} * a.of.queries.tiles + tile) * kRuns;
    for (int i = 0; i < kRuns; i += 2) work += runs[i + 1] - runs[i];
  }
  return work;
}

// A walk's query tiles in the order of their chains. Chains 0 to `chains` - 1 hold tiles that may be met whole, the next
// one tiles that are met with masks only, then the rest, then tiles that see nothing.
struct Chains {
  const int32_t* begin;                                 // [chains + 3]
  const int32_t *union_end, *union_begin;               // [Q], rising along each chain: u1, u0
  const int32_t *intersection_end, *intersection_begin;  // [Q], rising along those that may be met whole: f1, f0
};

MODA_HD void write_key_runs(int chains, const Chains& of, int tile, bool some, bool whole, int32_t* runs) {
  for (int c = 0; c < chains + 2; ++c) {
    const int from = of.begin[c], to = of.begin[c + 1];
    const int begin = first_above(of.union_end, from, to, tile);
    const int end = some ? at_least(first_above(of.union_begin, from, to, tile), begin) : begin;
    if (c >= chains) {
      runs[2 * (chains + c)] = begin;
      runs[2 * (chains + c) + 1] = end;
      continue;
    }
    const int full_begin = at_most(at_least(first_above(of.intersection_end, from, to, tile), begin), end);
    const int full_end = at_most(at_least(first_above(of.intersection_begin, from, to, tile), full_begin), end);
    runs[4 * c] = begin;
    runs[4 * c + 1] = full_begin;
    runs[4 * c + 2] = whole ? full_end : full_begin;
    runs[4 * c + 3] = end;
  }
}

MODA_HD int work_of_key_tile(const KeyWalk& a, int tile) {
  int work = 0;
  for (int w = 0; w < a.of.walks(); ++w) {
    const int32_t* runs = a.runs + (int64_t{w} * a.of.keys.tiles + tile) * a.runs_of_tile();
    for (int c = 0; c < a.chains; ++c) work += runs[4 * c + 3] - runs[4 * c];
    for (int i = 4 * a.chains; i < a.runs_of_tile(); i += 2) work += runs[i + 1] - runs[i];
  }
  return work;
}

// 0 for the tiles with most work.
MODA_HD int work_level(int work, int most) {
  return kWorkLevels - 1 - static_cast<int>(int64_t{work} * (kWorkLevels - 1) / (most > 0 ? most : 1));
}

// Peeling takes a walk's limits one after the other: u1, u0, f1, f0. For the widest envelope ends may not fall and begins
// may not be undercut later; for the tightest it is the other way round.
constexpr int kLimits = 4;
MODA_HD bool rises_from_before(int limit, bool widest) { return (limit % 2 == 0) == widest; }

namespace cpu {
void query_walk(const QueryWalk&);
void key_walk(const KeyWalk&);
}  // namespace cpu

}  // namespace moda
