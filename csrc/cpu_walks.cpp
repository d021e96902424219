// Walks of tiles on the CPU: one pass over the tokens, then a few over the tiles.

#include <algorithm>
#include <array>
#include <numeric>
#include <vector>

#include "walks.h"

namespace moda::cpu {
namespace {

using Ints = std::vector<int32_t>;

// The key tiles of one pass.
struct Keys {
  Ints low, high;
  std::vector<uint8_t> some, whole;

  explicit Keys(int tiles) : low(tiles), high(tiles), some(tiles), whole(tiles) {}

  void look(const WalkInput& a, int pass) {
    const int32_t* const positions = a.positions + int64_t{pass} * a.tokens;
    for (int s = 0; s < a.keys.sequences; ++s) {
      const int begin = a.keys.first(s), end = a.keys.first(s + 1);
      const int last = a.keys.cu_seqlens[s + 1];
      int64_t token = a.keys.cu_seqlens[s];
      int highest = -1;
      for (int tile = begin; tile < end; ++tile) {
        KeySpan span;
        const int64_t stop = std::min<int64_t>(token + a.keys.block, last);
        span.whole = stop - token == a.keys.block;
        for (; token < stop; ++token) span.add(positions[token]);
        low[tile] = span.low;
        high[tile] = highest = std::max(highest, span.high);
        some[tile] = span.high >= 0;
        whole[tile] = span.whole;
      }
      for (int tile = end - 2; tile >= begin; --tile) low[tile] = std::min(low[tile], low[tile + 1]);
    }
  }
};

RowSpan look_at_rows(const WalkInput& a, int walk, const CutTile& tile) {
  const int32_t *const lo = a.lo(walk), *const hi = a.hi(walk);
  RowSpan span;
  for (int row = tile.row; row < tile.row + tile.rows; ++row) {
    span.add(lo[row], hi[row], a.real == nullptr || a.real[row] != 0);
  }
  if (tile.rows < a.queries.block) span.add(kFar, kNowhere, a.real == nullptr);
  return span;
}

void write_tiles(const Cut& cut, int32_t* tiles) {
  for (int i = 0; i < cut.tiles; ++i) {
    const CutTile tile = cut.tile(i);
    const int32_t row[] = {tile.sequence, tile.row, tile.rows};
    std::copy_n(row, 3, tiles + int64_t{3} * i);
  }
}

CutTile tile_at(const int32_t* tiles, int i) {
  return {tiles[3 * int64_t{i}], tiles[3 * int64_t{i} + 1], tiles[3 * int64_t{i} + 2]};
}

template <class Key>
void stable_order(int count, int keys, Key key, int32_t* order, int32_t* begin = nullptr) {
  Ints place(keys + 1, 0);
  for (int i = 0; i < count; ++i) ++place[key(i) + 1];
  std::partial_sum(place.begin(), place.end(), place.begin());
  if (begin != nullptr) std::copy(place.begin(), place.end() - 1, begin);
  for (int i = 0; i < count; ++i) order[place[key(i)]++] = i;
}

template <class Work>
void longest_first(int tiles, Work work_of, int32_t* order) {
  Ints work(tiles);
  int most = 0;
  for (int i = 0; i < tiles; ++i) most = std::max(most, work[i] = work_of(i));
  stable_order(tiles, kWorkLevels, [&](int i) { return work_level(work[i], most); }, order);
}

// The tiles of `candidates`, in order, along which all limits rise.
Ints envelope(const std::array<Ints, kLimits>& limits, int count, bool widest, const Ints& candidates) {
  Ints kept = candidates;
  for (int l = 0; l < count; ++l) {
    const Ints& limit = limits[l];
    size_t n = 0;
    if (rises_from_before(l, widest)) {
      int highest = -1;
      for (const int i : kept) {
        if (limit[i] >= highest) kept[n++] = i, highest = limit[i];
      }
      kept.resize(n);
    } else {
      int lowest = kFar;
      n = kept.size();
      for (size_t k = kept.size(); k-- > 0;) {
        const int i = kept[k];
        if (limit[i] <= lowest) kept[--n] = i, lowest = limit[i];
      }
      kept.erase(kept.begin(), kept.begin() + static_cast<int64_t>(n));
    }
  }
  return kept;
}

}  // namespace

void query_walk(const QueryWalk& a) {
  const WalkInput& of = a.of;
  const int q_tiles = of.queries.tiles, k_tiles = of.keys.tiles;
  write_tiles(of.queries, a.tiles);
  Keys keys(k_tiles);
  Ints some(k_tiles + 1), whole(k_tiles + 1), next_whole(k_tiles + 1), next_other(k_tiles + 1);
  const KeyRanks ranks{some.data(), whole.data(), next_whole.data(), next_other.data()};
  for (int pass = 0; pass < of.passes; ++pass) {
    keys.look(of, pass);
    for (int i = 0; i < k_tiles; ++i) {
      some[i + 1] = some[i] + keys.some[i];
      whole[i + 1] = whole[i] + keys.whole[i];
    }
    next_whole[k_tiles] = next_other[k_tiles] = k_tiles;
    for (int i = k_tiles - 1; i >= 0; --i) {
      next_whole[i] = keys.whole[i] ? i : next_whole[i + 1];
      next_other[i] = keys.whole[i] ? next_other[i + 1] : i;
    }
    next_other[k_tiles] = k_tiles;
    int32_t* const lists = a.key_lists + int64_t{pass} * (2 * int64_t{k_tiles} + 1);
    std::fill_n(lists, 2 * int64_t{k_tiles} + 1, 0);
    for (int s = 0; s < of.keys.sequences; ++s) {
      const int begin = of.keys.first(s), end = of.keys.first(s + 1);
      for (int i = begin; i < end; ++i) write_column(ranks, k_tiles, i, (i - begin) * of.keys.block, lists);
    }
    for (int interval = 0; interval < of.intervals; ++interval) {
      const int w = pass * of.intervals + interval;
      for (int i = 0; i < q_tiles; ++i) {
        const CutTile tile = tile_at(a.tiles, i);
        int32_t* const runs = a.runs + (int64_t{w} * q_tiles + i) * kRuns;
        if (tile.rows == 0) {
          std::fill_n(runs, kRuns, 0);
          continue;
        }
        const int first = of.keys.first(tile.sequence), end = of.keys.first(tile.sequence + 1);
        const RowSpan rows = look_at_rows(of, w, tile);
        write_runs(a, ranks, ranges_of(keys.low.data(), keys.high.data(), first, end, rows), first, runs);
      }
    }
  }
  longest_first(q_tiles, [&](int i) { return work_of_query_tile(a, i); }, a.order);
}

void key_walk(const KeyWalk& a) {
  const WalkInput& of = a.of;
  const int q_tiles = of.queries.tiles, k_tiles = of.keys.tiles, chains = a.chains;
  write_tiles(of.keys, a.tiles);
  Ints rows(3 * static_cast<size_t>(q_tiles));
  write_tiles(of.queries, rows.data());
  Keys keys(k_tiles);
  std::array<Ints, kLimits> limits, sorted;
  for (Ints& limit : limits) limit.resize(q_tiles);
  for (Ints& limit : sorted) limit.resize(q_tiles);
  Ints chain(q_tiles), order(q_tiles), begin(chains + 3);
  const Chains found{begin.data(), sorted[0].data(), sorted[1].data(), sorted[2].data(), sorted[3].data()};
  for (int w = 0; w < of.walks(); ++w) {
    if (w % of.intervals == 0) keys.look(of, w / of.intervals);
    Ints left;
    std::vector<uint8_t> whole(q_tiles);
    for (int i = 0; i < q_tiles; ++i) {
      const CutTile tile = tile_at(rows.data(), i);
      chain[i] = chains + 2;
      if (tile.rows == 0) continue;
      const int first = of.keys.first(tile.sequence), end = of.keys.first(tile.sequence + 1);
      const RowSpan span = look_at_rows(of, w, tile);
      const TileRanges r = ranges_of(keys.low.data(), keys.high.data(), first, end, span);
      if (r.u0 >= r.u1) continue;
      const int ends[] = {r.u1, r.u0, r.f1, r.f0};
      for (int l = 0; l < kLimits; ++l) limits[l][i] = ends[l];
      whole[i] = span.all && r.f0 < r.f1;
      chain[i] = chains + 1;
      left.push_back(i);
    }
    for (int c = 0; c <= chains; ++c) {
      Ints candidates;
      std::copy_if(left.begin(), left.end(), std::back_inserter(candidates), [&](int i) {
        return chain[i] == chains + 1 && (c == chains || whole[i]);
      });
      const int count = c < chains ? kLimits : 2;
      const Ints widest = envelope(limits, count, true, candidates);
      const Ints tightest = envelope(limits, count, false, candidates);
      for (const int i : tightest.size() > widest.size() ? tightest : widest) chain[i] = c;
    }

    stable_order(q_tiles, chains + 3, [&](int i) { return chain[i]; }, order.data(), begin.data());
    int32_t* const list = a.query_lists + int64_t{w} * (q_tiles + 1);
    list[q_tiles] = 0;
    for (int n = 0; n < q_tiles; ++n) {
      const CutTile tile = tile_at(rows.data(), order[n]);
      list[n] = tile.row - of.queries.cu_seqlens[tile.sequence];
      for (int l = 0; l < kLimits; ++l) sorted[l][n] = limits[l][order[n]];
    }
    // In the rest nothing rises by itself.
    for (int n = begin[chains + 1] + 1; n < begin[chains + 2]; ++n) {
      sorted[0][n] = std::max(sorted[0][n], sorted[0][n - 1]);
    }
    for (int n = begin[chains + 2] - 2; n >= begin[chains + 1]; --n) {
      sorted[1][n] = std::min(sorted[1][n], sorted[1][n + 1]);
    }
    for (int j = 0; j < k_tiles; ++j) {
      write_key_runs(chains, found, j, keys.some[j], keys.whole[j],
                     a.runs + (int64_t{w} * k_tiles + j) * a.runs_of_tile());
    }
  }
  longest_first(k_tiles, [&](int j) { return work_of_key_tile(a, j); }, a.order);
}

}  // namespace moda::cpu
