// Tile lists on CUDA, three launches:
//
//   cut_sequences     one block a side: the first tile of every sequence
//   summarise_tiles   one warp a tile: its rows and its summary
//   list_tiles        one block a tile: classify its candidates, and write its list in order
//
// The lists of the key tiles are not the transpose of stored lists: each pair is classified again from the other side,
// which costs less than the memory and the launch that a transpose would take.

#include <algorithm>

#include "cuda.h"
#include "cuda_common.cuh"

namespace moda::cuda {
namespace {

constexpr int kCutThreads = 1024;
constexpr int kTileWarps = 8;
constexpr int kListThreads = 128;

__global__ void __launch_bounds__(kCutThreads) cut_sequences(const __grid_constant__ TileLists a) {
  const bool is_query = blockIdx.x == 0;
  const Side side = is_query ? a.queries : a.keys;
  const int thread = threadIdx.x;
  // Consecutive sequences for each thread.
  const int64_t share = (int64_t{a.sequences} + kCutThreads - 1) / kCutThreads;
  const int begin = static_cast<int>(min(thread * share, int64_t{a.sequences}));
  const int end = static_cast<int>(min((thread + 1) * share, int64_t{a.sequences}));
  int tiles = 0, too_long = 0;
  for (int s = begin; s < end; ++s) {
    const int length = side.cu_seqlens[s + 1] - side.cu_seqlens[s];
    tiles += tiles_in(length, side.block);
    too_long += length > kMaxListedTokens;
  }
  int before = block_exclusive_sum(tiles);
  if (thread == 0) side.first[0] = 0;
  for (int s = begin; s < end; ++s) {
    before += tiles_in(side.cu_seqlens[s + 1] - side.cu_seqlens[s], side.block);
    side.first[s + 1] = before;
  }
  const int too_long_before = block_exclusive_sum(too_long);
  if (!is_query && thread == kCutThreads - 1) *a.overflow = too_long_before + too_long;
}

__device__ Span join_lanes(Span span) {
  span.low = __reduce_min_sync(kAllLanes, span.low);
  span.high = __reduce_max_sync(kAllLanes, span.high);
  span.first = __reduce_min_sync(kAllLanes, span.first);
  span.last = __reduce_max_sync(kAllLanes, span.last);
  return span;
}

__global__ void __launch_bounds__(kTileWarps* kWarp) summarise_tiles(const __grid_constant__ TileLists a) {
  const int64_t index = int64_t{blockIdx.x} * kTileWarps + warp_index();
  const int lane = lane_index();
  if (index >= int64_t{a.queries.tiles} + a.keys.tiles) return;
  const bool is_query = index < a.queries.tiles;
  const Side side = is_query ? a.queries : a.keys;
  const int64_t id = is_query ? index : index - a.queries.tiles;

  const Tile tile = tile_at(side, a.sequences, static_cast<int>(id));
  const Range tokens = tokens_of(a, is_query, tile);
  bool real = true;
  for (int t = tokens.begin + lane; t < tokens.end; t += kWarp) real = real && a.modality[t] >= 0;
  const bool complete = __all_sync(kAllLanes, real) && tokens.end - tokens.begin == side.block;
  uint32_t present = 0;
  for (int m = 0; m < a.mask.modalities; ++m) {
    Span span = Span::none();
    for (int t = tokens.begin + lane; t < tokens.end; t += kWarp) {
      if (a.modality[t] == m) span.add(a.position[t], a.segment[t]);
    }
    span = join_lanes(span);
    present |= span.is_none() ? 0u : 1u << m;
    if (lane == 0) side.spans[id * a.mask.modalities + m] = span;
  }
  if (lane == 0) {
    side.summaries[id] = Summary{tokens, present, complete};
    side.rows[3 * id] = tile.sequence;
    side.rows[3 * id + 1] = tile.row;
    side.rows[3 * id + 2] = tile.rows;
  }
}

__global__ void __launch_bounds__(kListThreads) list_tiles(const __grid_constant__ TileLists a) {
  // Of each 32 candidates: which are full and which partial, and how many of each stand before them.
  MODA_DYNAMIC_SHARED(uint32_t, shared);
  __shared__ Span my_spans[kMaxModalities];
  __shared__ int totals[2];  // full, partial

  const int thread = threadIdx.x, lane = lane_index(), warp = warp_index(), modalities = a.mask.modalities;
  const bool is_query = blockIdx.x < static_cast<unsigned>(a.queries.tiles);
  const Side side = is_query ? a.queries : a.keys;
  const Side other = is_query ? a.keys : a.queries;
  const int64_t id = is_query ? blockIdx.x : blockIdx.x - a.queries.tiles;

  const Tile tile{side.rows[3 * id], side.rows[3 * id + 1], side.rows[3 * id + 2]};
  const Range candidates = candidates_of(side, other, tile);
  const Summary mine = side.summaries[id];
  const int n = max(0, candidates.end - candidates.begin);
  const int words = (n + kWarp - 1) / kWarp, most_words = (side.width + kWarp - 1) / kWarp;
  uint32_t* const full = shared;
  uint32_t* const partial = full + most_words;
  uint32_t* const full_before = partial + most_words;
  uint32_t* const partial_before = full_before + most_words;
  if (thread < modalities) my_spans[thread] = side.spans[id * modalities + thread];
  __syncthreads();

  for (int word = warp; word < words; word += kListThreads / kWarp) {
    const int c = word * kWarp + lane;
    PairKind kind = PairKind::kEmpty;
    if (c < n) {
      const int64_t candidate = candidates.begin + c;
      const Summary theirs = other.summaries[candidate];
      const Span* const their_spans = other.spans + candidate * modalities;
      kind = is_query ? classify(a, mine, my_spans, theirs, their_spans)
                      : classify(a, theirs, their_spans, mine, my_spans);
    }
    const uint32_t is_full = __ballot_sync(kAllLanes, kind == PairKind::kFull);
    const uint32_t is_partial = __ballot_sync(kAllLanes, kind == PairKind::kPartial);
    if (lane == 0) {
      full[word] = is_full;
      partial[word] = is_partial;
    }
  }
  __syncthreads();

  if (warp < 2) {  // warp 0 adds up the full ones, warp 1 the partial ones
    const uint32_t* const bits = warp == 0 ? full : partial;
    uint32_t* const before = warp == 0 ? full_before : partial_before;
    int sum = 0;
    for (int base = 0; base < words; base += kWarp) {
      const int word = base + lane;
      const int count = word < words ? __popc(bits[word]) : 0;
      const int upto = warp_inclusive_sum(count);
      if (word < words) before[word] = sum + upto - count;
      sum += __shfl_sync(kAllLanes, upto, kWarp - 1);
    }
    if (lane == 0) totals[warp] = sum;
  }
  __syncthreads();

  int32_t* const list = side.lists + id * side.width;
  for (int c = thread; c < n; c += kListThreads) {
    const int word = c / kWarp;
    const uint32_t bit = 1u << (c % kWarp);
    if (full[word] & bit) list[full_before[word] + __popc(full[word] & (bit - 1))] = candidates.begin + c;
    if (partial[word] & bit) {
      list[totals[0] + partial_before[word] + __popc(partial[word] & (bit - 1))] = candidates.begin + c;
    }
  }
  for (int c = totals[0] + totals[1] + thread; c < side.width; c += kListThreads) list[c] = 0;
  if (thread < 2) side.counts[2 * id + thread] = thread == 0 ? totals[0] : totals[0] + totals[1];
}

}  // namespace

void tile_lists(const TileLists& arguments, const Queue& queue) {
  TileLists a = arguments;
  const DeviceGuard guard(queue.device);
  attach_workspace(a, queue.workspace);
  const auto stream = reinterpret_cast<cudaStream_t>(queue.stream);
  const int64_t tiles = int64_t{a.queries.tiles} + a.keys.tiles;
  if (tiles > INT_MAX) throw std::invalid_argument("tile_lists: expected fewer than 2^31 tiles");
  launch("cut_sequences", cut_sequences, 2, kCutThreads, 0, stream, a);
  const int blocks = static_cast<int>((tiles + kTileWarps - 1) / kTileWarps);
  launch("summarise_tiles", summarise_tiles, blocks, kTileWarps * kWarp, 0, stream, a);
  const size_t words = (std::max(a.queries.width, a.keys.width) + kWarp - 1) / kWarp;
  launch("list_tiles", list_tiles, static_cast<int>(tiles), kListThreads, 4 * words * sizeof(uint32_t), stream, a);
}

int load_tiles() {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncGetAttributes(&attributes, cut_sequences);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, summarise_tiles);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, list_tiles);
  return error;
}

}  // namespace moda::cuda
