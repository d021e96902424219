// Walks of tiles on CUDA. Queries over keys in two launches, keys over queries in three:
//
//   look_at_tiles     one warp a tile and walk (or pass): the span of its rows' intervals, of its keys' positions
//   walk_of_queries   one block a walk: scans over the key tiles, then each query tile's ranges by search
//   chains_of_walk    one block a walk: the same, then query tiles are peeled into chains, and listed
//   walk_of_keys      one thread a key tile and walk: its ranges in the chains by search
//
// The last block of the last launch puts the tiles in the order of their work.

#include <algorithm>

#include "cuda.h"
#include "cuda_common.cuh"

namespace moda::cuda {
namespace {

constexpr int kLookThreads = 256;
constexpr int kWalkThreads = 1024;
constexpr int kWalkWarps = kWalkThreads / kWarp;
constexpr int kKeyThreads = 1024;  // the last block sorts

static_assert(kKeyThreads == kWalkThreads, "functions of a block know its size");

// What the launches of one call pass on.
struct Workspace {
  int32_t* done;                           // [1], blocks of the last launch that are through
  int32_t *key_low, *key_high, *key_whole;  // [P, K]
  int32_t* rows;                           // [W, Q, 5]: a RowSpan
  int32_t *low, *high;                     // [W, K], of a tile and all after it, of a tile and all before it
  int32_t *some, *whole, *next_whole, *next_other;  // [W, K + 1]
  int32_t* limits;                         // [W, 4, Q]: u1, u0, f1, f0
  int32_t* sorted;                         // [W, 4, Q], in the order of the chains
  int32_t *chain, *kept, *tight, *listed;  // [W, Q]
  int32_t* begin;                          // [W, kMaxChains + 3]
  int32_t* level;                          // [max(Q, K)]

  static Workspace in(int32_t* memory, int64_t passes, int64_t walks, int64_t q, int64_t k, bool of_keys,
                      int64_t* size) {
    Workspace made{};
    int64_t used = 0;
    auto take = [&](int64_t count) {
      int32_t* const at = memory + used;
      used += count;
      return at;
    };
    made.done = take(4);
    made.key_low = take(passes * k);
    made.key_high = take(passes * k);
    made.key_whole = take(passes * k);
    made.rows = take(walks * q * 5);
    made.low = take(walks * k);
    made.high = take(walks * k);
    made.level = take(q > k ? q : k);
    if (of_keys) {
      made.limits = take(walks * kLimits * q);
      made.sorted = take(walks * kLimits * q);
      made.chain = take(walks * q);
      made.kept = take(walks * q);
      made.tight = take(walks * q);
      made.listed = take(walks * q);
      made.begin = take(walks * (kMaxChains + 3));
    } else {
      made.some = take(walks * (k + 1));
      made.whole = take(walks * (k + 1));
      made.next_whole = take(walks * (k + 1));
      made.next_other = take(walks * (k + 1));
    }
    if (size != nullptr) *size = used;
    return made;
  }
};

struct LookAtTiles {
  WalkInput of;
  Workspace workspace;
  Cut cut;         // the side whose tiles are told
  int32_t* tiles;  // [cut.tiles, 3]
};

struct OfQueries {
  QueryWalk walk;
  Workspace workspace;
};

struct OfKeys {
  KeyWalk walk;
  Workspace workspace;
};

__device__ void look_at_key_tile(const LookAtTiles& a, int64_t index) {
  const WalkInput& of = a.of;
  const int number = static_cast<int>(index % of.keys.tiles);
  const CutTile tile = of.keys.tile(number);
  const int32_t* const positions = of.positions + index / of.keys.tiles * of.tokens;
  KeySpan span;
  span.whole = tile.rows == of.keys.block;
  for (int i = lane_index(); i < tile.rows; i += kWarp) span.add(positions[tile.row + i]);
  const int low = __reduce_min_sync(kAllLanes, span.low), high = __reduce_max_sync(kAllLanes, span.high);
  const bool whole = __all_sync(kAllLanes, span.whole);
  if (lane_index() != 0) return;
  a.workspace.key_low[index] = low;
  a.workspace.key_high[index] = high;
  a.workspace.key_whole[index] = whole;
}

__device__ void look_at_query_tile(const LookAtTiles& a, int64_t index) {
  const WalkInput& of = a.of;
  const CutTile tile = of.queries.tile(static_cast<int>(index % of.queries.tiles));
  const int walk = static_cast<int>(index / of.queries.tiles);
  const int32_t *const lo = of.lo(walk), *const hi = of.hi(walk);
  RowSpan span;
  for (int i = lane_index(); i < tile.rows; i += kWarp) {
    const int row = tile.row + i;
    span.add(lo[row], hi[row], of.real == nullptr || of.real[row] != 0);
  }
  if (tile.rows < of.queries.block) span.add(kFar, kNowhere, of.real == nullptr);
  const int union_lo = __reduce_min_sync(kAllLanes, span.union_lo);
  const int union_hi = __reduce_max_sync(kAllLanes, span.union_hi);
  const int common_lo = __reduce_max_sync(kAllLanes, span.common_lo);
  const int common_hi = __reduce_min_sync(kAllLanes, span.common_hi);
  const bool all = __all_sync(kAllLanes, span.all);
  if (lane_index() != 0) return;
  int32_t* const out = a.workspace.rows + index * 5;
  out[0] = union_lo;
  out[1] = union_hi;
  out[2] = common_lo;
  out[3] = common_hi;
  out[4] = all;
}

__device__ RowSpan rows_of(const Workspace& workspace, int64_t index) {
  const int32_t* const in = workspace.rows + index * 5;
  RowSpan span;
  span.union_lo = in[0];
  span.union_hi = in[1];
  span.common_lo = in[2];
  span.common_hi = in[3];
  span.all = in[4] != 0;
  return span;
}

__global__ void __launch_bounds__(kLookThreads) look_at_tiles(const __grid_constant__ LookAtTiles a) {
  const int64_t thread = int64_t{blockIdx.x} * kLookThreads + threadIdx.x;
  if (thread == 0) *a.workspace.done = 0;
  if (thread < a.cut.tiles) {
    const CutTile tile = a.cut.tile(static_cast<int>(thread));
    a.tiles[3 * thread] = tile.sequence;
    a.tiles[3 * thread + 1] = tile.row;
    a.tiles[3 * thread + 2] = tile.rows;
  }
  const int64_t of_keys = int64_t{a.of.passes} * a.of.keys.tiles;
  const int64_t warp = thread / kWarp;
  if (warp < of_keys) {
    look_at_key_tile(a, warp);
  } else if (warp - of_keys < int64_t{a.of.walks()} * a.of.queries.tiles) {
    look_at_query_tile(a, warp - of_keys);
  }
}

struct Least {
  __device__ int operator()(int a, int b) const { return a < b ? a : b; }
};
struct Greatest {
  __device__ int operator()(int a, int b) const { return a > b ? a : b; }
};
struct Sum {
  __device__ int operator()(int a, int b) const { return a + b; }
};

// `store(i, all up to i, put together)` for each i of [0, n), from the first on or from the last, anew where the segment
// of i changes (segments of neighbours differ where they are others). All threads of a block of kWalkThreads call it.
template <class Join, class Load, class Segment, class Store>
__device__ void scan(int n, bool backwards, Join join, Load load, Segment segment_of, Store store) {
  __shared__ int values[kWalkWarps], segments[kWalkWarps];
  int carried = 0, carried_segment = -1;
  for (int base = 0; base < n; base += kWalkThreads) {
    const int place = base + static_cast<int>(threadIdx.x);
    const bool inside = place < n;
    const int i = backwards ? n - 1 - place : place;
    int value = inside ? load(i) : 0;
    const int segment = inside ? segment_of(i) : -2;
    for (int step = 1; step < kWarp; step *= 2) {
      const int before = __shfl_up_sync(kAllLanes, value, step);
      const int segment_before = __shfl_up_sync(kAllLanes, segment, step);
      if (lane_index() >= step && segment_before == segment) value = join(before, value);
    }
    __syncthreads();  // an earlier round may still be reading
    if (lane_index() == kWarp - 1) {
      values[warp_index()] = value;
      segments[warp_index()] = segment;
    }
    __syncthreads();
    for (int w = 0; w < kWalkWarps; ++w) {
      if (w == warp_index() && carried_segment == segment) value = join(carried, value);
      carried = segments[w] == carried_segment ? join(carried, values[w]) : values[w];
      carried_segment = segments[w];
    }
    if (inside) store(i, value);
  }
  __syncthreads();  // what was stored is there
}

__device__ int block_greatest(int value) {
  __shared__ int greatest[kWalkWarps];
  value = __reduce_max_sync(kAllLanes, value);
  __syncthreads();
  if (lane_index() == 0) greatest[warp_index()] = value;
  __syncthreads();
  value = greatest[0];
  for (int w = 1; w < kWalkWarps; ++w) value = max(value, greatest[w]);
  return value;
}

// [0, n) in the order of their keys, which are less than kWorkLevels, by number where these are alike; and where each
// of `keys` keys begins. By the whole block: each warp has a stretch, counts the keys in it, and later places it.
template <class Key>
__device__ void stable_order(int n, int keys, Key key_of, int32_t* order, int32_t* begin) {
  __shared__ int places[kWorkLevels * kWalkWarps];
  const int share = (n + kWalkThreads - 1) / kWalkThreads * kWarp;
  const int from = min(n, warp_index() * share), to = min(n, from + share), lane = lane_index();
  for (int i = threadIdx.x; i < kWorkLevels * kWalkWarps; i += kWalkThreads) places[i] = 0;
  __syncthreads();
  for (int placing = 0; placing < 2; ++placing) {
    for (int base = from; base < to; base += kWarp) {
      const int i = base + lane, key = i < to ? key_of(i) : 0;
      uint32_t alike = __ballot_sync(kAllLanes, i < to);
      for (int bit = 1; bit < kWorkLevels; bit *= 2) {
        const uint32_t set = __ballot_sync(kAllLanes, (key & bit) != 0);
        alike &= (key & bit) != 0 ? set : ~set;
      }
      const int before = __popc(alike & ((1u << lane) - 1));
      int* const place = &places[key * kWalkWarps + warp_index()];
      if (i < to && placing == 1) order[*place + before] = i;
      __syncwarp();
      if (i < to && before == 0) *place += __popc(alike);
      __syncwarp();
    }
    __syncthreads();
    if (placing == 0) {
      scan(kWorkLevels * kWalkWarps, false, Sum(), [&](int i) { return places[i]; }, [](int) { return 0; },
           [&](int i, int upto) { places[i] = upto - places[i]; });
      if (begin != nullptr && static_cast<int>(threadIdx.x) < keys) begin[threadIdx.x] = places[threadIdx.x * kWalkWarps];
      __syncthreads();
    }
  }
}

// Whether this block is the last of the grid to come here; then all that the others have written before is there.
__device__ bool is_last_block(int32_t* done) {
  __shared__ int before;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) before = atomicAdd(done, 1);
  __syncthreads();
  __threadfence();
  return before == static_cast<int>(gridDim.x) - 1;
}

template <class Work>
__device__ void longest_first(int tiles, Work work_of, int32_t* level, int32_t* order) {
  int most = 0;
  for (int i = threadIdx.x; i < tiles; i += kWalkThreads) {
    level[i] = work_of(i);
    most = max(most, level[i]);
  }
  most = block_greatest(most);
  for (int i = threadIdx.x; i < tiles; i += kWalkThreads) level[i] = work_level(level[i], most);
  __syncthreads();
  stable_order(tiles, kWorkLevels, [&](int i) { return level[i]; }, order, nullptr);
}

// The bounds of key tiles that searches need, for the walk of this block.
__device__ void bound_key_tiles(const WalkInput& of, const Workspace& workspace, int w) {
  const int64_t pass = w / of.intervals, tiles = of.keys.tiles;
  const int32_t* const key_low = workspace.key_low + pass * tiles;
  const int32_t* const key_high = workspace.key_high + pass * tiles;
  int32_t* const low = workspace.low + w * tiles;
  int32_t* const high = workspace.high + w * tiles;
  auto sequence = [&](int i) { return of.keys.sequence_of(i); };
  scan(of.keys.tiles, true, Least(), [&](int i) { return key_low[i]; }, sequence, [&](int i, int v) { low[i] = v; });
  scan(of.keys.tiles, false, Greatest(), [&](int i) { return key_high[i]; }, sequence,
       [&](int i, int v) { high[i] = v; });
}

__device__ TileRanges ranges_in(const WalkInput& of, const Workspace& workspace, int w, int q_tile, int sequence) {
  const int64_t at = int64_t{w} * of.keys.tiles;
  return ranges_of(workspace.low + at, workspace.high + at, of.keys.first(sequence), of.keys.first(sequence + 1),
                   rows_of(workspace, int64_t{w} * of.queries.tiles + q_tile));
}

__global__ void __launch_bounds__(kWalkThreads) walk_of_queries(const __grid_constant__ OfQueries a) {
  const QueryWalk& walk = a.walk;
  const WalkInput& of = walk.of;
  const Workspace& workspace = a.workspace;
  const int w = blockIdx.x, thread = threadIdx.x, tiles = of.keys.tiles;
  const int64_t pass = w / of.intervals;
  bound_key_tiles(of, workspace, w);

  const int64_t at = w * (int64_t{tiles} + 1);
  int32_t *const some = workspace.some + at, *const whole = workspace.whole + at;
  int32_t *const next_whole = workspace.next_whole + at, *const next_other = workspace.next_other + at;
  const int32_t* const key_high = workspace.key_high + pass * tiles;
  const int32_t* const key_whole = workspace.key_whole + pass * tiles;
  auto together = [](int) { return 0; };
  if (thread == 0) {
    some[0] = whole[0] = 0;
    next_whole[tiles] = next_other[tiles] = tiles;
  }
  scan(tiles, false, Sum(), [&](int i) { return int{key_high[i] >= 0}; }, together, [&](int i, int v) { some[i + 1] = v; });
  scan(tiles, false, Sum(), [&](int i) { return key_whole[i]; }, together, [&](int i, int v) { whole[i + 1] = v; });
  if (walk.affine) {
    scan(tiles, true, Least(), [&](int i) { return key_whole[i] != 0 ? i : tiles; }, together,
         [&](int i, int v) { next_whole[i] = v; });
    scan(tiles, true, Least(), [&](int i) { return key_whole[i] != 0 ? tiles : i; }, together,
         [&](int i, int v) { next_other[i] = v; });
  }
  const KeyRanks ranks{some, whole, next_whole, next_other};
  if (w % of.intervals == 0) {
    int32_t* const lists = walk.key_lists + pass * (2 * int64_t{tiles} + 1);
    for (int i = thread; i < 2 * tiles + 1; i += kWalkThreads) lists[i] = 0;
    __syncthreads();
    for (int i = thread; i < tiles; i += kWalkThreads) {
      write_column(ranks, tiles, i, (i - of.keys.first(of.keys.sequence_of(i))) * of.keys.block, lists);
    }
  }
  for (int i = thread; i < of.queries.tiles; i += kWalkThreads) {
    int32_t* const runs = walk.runs + (int64_t{w} * of.queries.tiles + i) * kRuns;
    const CutTile tile = of.queries.tile(i);
    if (tile.rows == 0) {
      for (int r = 0; r < kRuns; ++r) runs[r] = 0;
    } else {
      write_runs(walk, ranks, ranges_in(of, workspace, w, i, tile.sequence), of.keys.first(tile.sequence), runs);
    }
  }
  if (!is_last_block(workspace.done)) return;
  longest_first(of.queries.tiles, [&](int i) { return work_of_query_tile(walk, i); }, workspace.level, walk.order);
}

// Marks in `kept` the tiles, of those for which `candidate` holds, along which all limits rise, and counts them.
template <class Candidate>
__device__ int envelope(int tiles, const int32_t* limits, int count, bool widest, Candidate candidate, int32_t* kept) {
  for (int i = threadIdx.x; i < tiles; i += kWalkThreads) kept[i] = candidate(i);
  __syncthreads();
  auto together = [](int) { return 0; };
  for (int l = 0; l < count; ++l) {
    const int32_t* const limit = limits + int64_t{l} * tiles;
    if (rises_from_before(l, widest)) {
      scan(tiles, false, Greatest(), [&](int i) { return kept[i] != 0 ? limit[i] : -1; }, together,
           [&](int i, int v) { kept[i] = kept[i] != 0 && limit[i] >= v; });
    } else {
      scan(tiles, true, Least(), [&](int i) { return kept[i] != 0 ? limit[i] : kFar; }, together,
           [&](int i, int v) { kept[i] = kept[i] != 0 && limit[i] <= v; });
    }
  }
  int sum = 0;
  for (int i = threadIdx.x; i < tiles; i += kWalkThreads) sum += kept[i];
  __shared__ int total;
  const int before = block_exclusive_sum(sum);
  if (threadIdx.x == kWalkThreads - 1) total = before + sum;
  __syncthreads();
  const int all = total;
  __syncthreads();  // it may be written again
  return all;
}

__global__ void __launch_bounds__(kWalkThreads) chains_of_walk(const __grid_constant__ OfKeys a) {
  const KeyWalk& walk = a.walk;
  const WalkInput& of = walk.of;
  const Workspace& workspace = a.workspace;
  const int w = blockIdx.x, thread = threadIdx.x, tiles = of.queries.tiles, chains = walk.chains;
  bound_key_tiles(of, workspace, w);

  const int64_t at = int64_t{w} * tiles;
  int32_t *const limits = workspace.limits + kLimits * at, *const sorted = workspace.sorted + kLimits * at;
  int32_t *const chain = workspace.chain + at, *const kept = workspace.kept + at, *const tight = workspace.tight + at;
  int32_t *const listed = workspace.listed + at, *const begin = workspace.begin + int64_t{w} * (kMaxChains + 3);
  // Until a tile has its chain: -1 where it may be met whole, -2 where only with masks.
  for (int i = thread; i < tiles; i += kWalkThreads) {
    const CutTile tile = of.queries.tile(i);
    chain[i] = chains + 2;
    for (int l = 0; l < kLimits; ++l) limits[int64_t{l} * tiles + i] = 0;
    if (tile.rows == 0) continue;
    const TileRanges r = ranges_in(of, workspace, w, i, tile.sequence);
    if (r.u0 >= r.u1) continue;
    limits[i] = r.u1;
    limits[int64_t{1} * tiles + i] = r.u0;
    limits[int64_t{2} * tiles + i] = r.f1;
    limits[int64_t{3} * tiles + i] = r.f0;
    chain[i] = rows_of(workspace, at + i).all && r.f0 < r.f1 ? -1 : -2;
  }
  __syncthreads();
  for (int c = 0; c <= chains; ++c) {
    const int count = c < chains ? kLimits : 2, least = c < chains ? -1 : -2;
    auto candidate = [&](int i) { return int{chain[i] < 0 && chain[i] >= least}; };
    const int of_widest = envelope(tiles, limits, count, true, candidate, kept);
    const int of_tightest = envelope(tiles, limits, count, false, candidate, tight);
    const int32_t* const chosen = of_tightest > of_widest ? tight : kept;
    for (int i = thread; i < tiles; i += kWalkThreads) {
      if (chosen[i] != 0) chain[i] = c;
    }
    __syncthreads();
  }
  auto key = [&](int i) { return chain[i] < 0 ? chains + 1 : chain[i]; };
  stable_order(tiles, chains + 3, key, listed, begin);

  int32_t* const list = walk.query_lists + int64_t{w} * (int64_t{tiles} + 1);
  if (thread == 0) list[tiles] = 0;
  for (int n = thread; n < tiles; n += kWalkThreads) {
    const CutTile tile = of.queries.tile(listed[n]);
    list[n] = tile.rows == 0 ? 0 : tile.row - of.queries.cu_seqlens[tile.sequence];
    for (int l = 0; l < kLimits; ++l) sorted[int64_t{l} * tiles + n] = limits[int64_t{l} * tiles + listed[n]];
  }
  __syncthreads();
  // In the rest nothing rises by itself. In chains this changes nothing.
  auto chain_of = [&](int n) { return key(listed[n]); };
  int32_t *const union_end = sorted, *const union_begin = sorted + tiles;
  scan(tiles, false, Greatest(), [&](int n) { return union_end[n]; }, chain_of, [&](int n, int v) { union_end[n] = v; });
  scan(tiles, true, Least(), [&](int n) { return union_begin[n]; }, chain_of,
       [&](int n, int v) { union_begin[n] = v; });
}

__global__ void __launch_bounds__(kKeyThreads) walk_of_keys(const __grid_constant__ OfKeys a) {
  const KeyWalk& walk = a.walk;
  const WalkInput& of = walk.of;
  const Workspace& workspace = a.workspace;
  const int64_t index = int64_t{blockIdx.x} * kKeyThreads + threadIdx.x;
  const int64_t q_tiles = of.queries.tiles, k_tiles = of.keys.tiles;
  const int64_t w = index / k_tiles, tile = index % k_tiles;
  if (w < of.walks()) {
    const int32_t* const sorted = workspace.sorted + kLimits * w * q_tiles;
    const Chains chains{workspace.begin + w * (kMaxChains + 3), sorted, sorted + q_tiles, sorted + 2 * q_tiles,
                        sorted + 3 * q_tiles};
    const int64_t key = w / of.intervals * k_tiles + tile;
    write_key_runs(walk.chains, chains, static_cast<int>(tile), workspace.key_high[key] >= 0,
                   workspace.key_whole[key] != 0, walk.runs + index * walk.runs_of_tile());
  }
  if (!is_last_block(workspace.done)) return;
  longest_first(of.keys.tiles, [&](int i) { return work_of_key_tile(walk, i); }, workspace.level, walk.order);
}

void look(const WalkInput& of, const Workspace& workspace, const Cut& cut, int32_t* tiles, cudaStream_t stream) {
  const int64_t warps = int64_t{of.passes} * of.keys.tiles + int64_t{of.walks()} * of.queries.tiles;
  const int64_t threads = std::max<int64_t>(warps * kWarp, cut.tiles);
  const int64_t blocks = (threads + kLookThreads - 1) / kLookThreads;
  if (blocks > INT_MAX) throw std::invalid_argument("walks: expected fewer tiles");
  launch("look_at_tiles", look_at_tiles, static_cast<unsigned>(blocks), kLookThreads, 0, stream,
         LookAtTiles{of, workspace, cut, tiles});
}

}  // namespace

int64_t walk_workspace(int passes, int walks, int q_tiles, int k_tiles, bool of_keys) {
  int64_t size = 0;
  Workspace::in(nullptr, passes, walks, q_tiles, k_tiles, of_keys, &size);
  return size;
}

void query_walk(const QueryWalk& a, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  const WalkInput& of = a.of;
  const auto stream = reinterpret_cast<cudaStream_t>(queue.stream);
  const Workspace workspace = Workspace::in(queue.workspace, of.passes, of.walks(), of.queries.tiles, of.keys.tiles,
                                            false, nullptr);
  look(of, workspace, of.queries, a.tiles, stream);
  launch("walk_of_queries", walk_of_queries, static_cast<unsigned>(of.walks()), kWalkThreads, 0, stream,
         OfQueries{a, workspace});
}

void key_walk(const KeyWalk& a, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  const WalkInput& of = a.of;
  const auto stream = reinterpret_cast<cudaStream_t>(queue.stream);
  const Workspace workspace = Workspace::in(queue.workspace, of.passes, of.walks(), of.queries.tiles, of.keys.tiles,
                                            true, nullptr);
  look(of, workspace, of.keys, a.tiles, stream);
  launch("chains_of_walk", chains_of_walk, static_cast<unsigned>(of.walks()), kWalkThreads, 0, stream,
         OfKeys{a, workspace});
  const int64_t blocks = (int64_t{of.walks()} * of.keys.tiles + kKeyThreads - 1) / kKeyThreads;
  launch("walk_of_keys", walk_of_keys, static_cast<unsigned>(blocks), kKeyThreads, 0, stream, OfKeys{a, workspace});
}

int load_walks() {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncGetAttributes(&attributes, look_at_tiles);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, walk_of_queries);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, chains_of_walk);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, walk_of_keys);
  return error;
}

}  // namespace moda::cuda
