// Segmentation on CUDA: two launches for the tokens, a memset and a launch for the table.
//
// A warp takes a stretch of tokens, 32 at a time, one a lane. Each column (segmentation.h) is then a vote: the ballot
// of the lanes that count, of which a lane needs the bits up to its own. Lane c keeps the running count of column c.
//
//   sum_stretches    counts of every stretch, put together for every block
//   write_tokens     every block adds up the blocks before it, then goes through its tokens once more and writes
//
// There are at most kMaxBlocks blocks, so adding up those before is a short loop and needs no third launch.

#include <algorithm>

#include "cuda.h"
#include "cuda_common.cuh"

namespace moda::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kMaxBlocks = 1024;

// A count over some consecutive tokens: how many since it last began anew, and (top bit) whether it did. Counts of
// neighbours can be put together in any grouping, though not in any order. Tokens are fewer than 2^31.
struct Count {
  uint32_t bits;

  static constexpr uint32_t kAnew = 1u << 31;
  __device__ int value() const { return static_cast<int>(bits & ~kAnew); }
  __device__ Count then(Count next) const { return {next.bits & kAnew ? next.bits : bits + next.bits}; }
  // ... and the lanes up to `lane`: who counts, and who counts anew, as ballots.
  __device__ Count then(uint32_t who, uint32_t anew, int lane) const {
    uint32_t mask = kAllLanes >> (kWarp - 1 - lane);
    uint32_t start = bits;
    if (anew & mask) {
      mask &= kAllLanes << (kWarp - 1 - __clz(static_cast<int>(anew & mask)));
      start = kAnew;
    }
    return {start + static_cast<uint32_t>(__popc(who & mask))};
  }
};

struct Stretches {
  SegmentTokens a;
  int columns;  // of all; a block handles 32 of them, from 32 * blockIdx.y on
  int chunks;   // of 32 tokens in a stretch
  // Workspace: column by column
  uint32_t* block_counts;   // [columns, blocks]: Count of each block
  uint32_t* before_counts;  // [columns, blocks * kWarps]: Count of the stretches before one in its block
};

// Put together in order what the lanes hold; lane 0 gets all.
__device__ Count join_lanes(Count mine) {
  for (int step = 1; step < kWarp; step *= 2) {
    const Count next{__shfl_down_sync(kAllLanes, mine.bits, step)};
    if (lane_index() + step < kWarp) mine = mine.then(next);
  }
  return mine;
}

__global__ void __launch_bounds__(kThreads) sum_stretches(const __grid_constant__ Stretches p) {
  __shared__ uint32_t counts_of[kWarps][kWarp];
  const int lane = lane_index(), warp = warp_index();
  const int first_column = blockIdx.y * kWarp;
  const int columns = min(kWarp, p.columns - first_column);
  const int64_t stretch = int64_t{blockIdx.x} * kWarps + warp;

  Count mine{0};
  for (int chunk = 0; chunk < p.chunks; ++chunk) {
    const int64_t t = (stretch * p.chunks + chunk) * kWarp + lane;
    Token token{-1, false, false, false};
    if (t < p.a.tokens) {
      const int sequence = sequence_of(p.a, static_cast<int>(t));
      token = token_at(p.a, static_cast<int>(t), sequence);
      if (blockIdx.y == 0) p.a.sequence[t] = sequence;
    }
    const uint32_t anew = __ballot_sync(kAllLanes, token.begins_sequence);
    for (int c = 0; c < columns; ++c) {
      const uint32_t who = __ballot_sync(kAllLanes, counts(token, first_column + c));
      if (c == lane) mine = mine.then(who, first_column + c == kPositions ? anew : 0, kWarp - 1);
    }
  }
  counts_of[warp][lane] = mine.bits;
  __syncthreads();

  if (warp == 0 && lane < columns) {
    const int64_t column = first_column + lane, blocks = gridDim.x;
    Count sum{0};
    for (int w = 0; w < kWarps; ++w) {
      p.before_counts[(column * blocks + blockIdx.x) * kWarps + w] = sum.bits;
      sum = sum.then(Count{counts_of[w][lane]});
    }
    p.block_counts[column * blocks + blockIdx.x] = sum.bits;
  }
}

__global__ void __launch_bounds__(kThreads) write_tokens(const __grid_constant__ Stretches p) {
  __shared__ uint32_t before_block[kWarp];
  const int lane = lane_index(), warp = warp_index();
  const int first_column = blockIdx.y * kWarp;
  const int columns = min(kWarp, p.columns - first_column);
  const int64_t blocks = gridDim.x, stretch = int64_t{blockIdx.x} * kWarps + warp;

  // The blocks before this one: a column a warp, consecutive blocks a lane.
  const int share = (blockIdx.x + kWarp - 1) / kWarp;
  for (int c = warp; c < columns; c += kWarps) {
    const uint32_t* const counts_of = p.block_counts + (first_column + c) * blocks;
    Count sum{0};
    for (int b = lane * share; b < min((lane + 1) * share, static_cast<int>(blockIdx.x)); ++b) {
      sum = sum.then(Count{counts_of[b]});
    }
    sum = join_lanes(sum);
    if (lane == 0) before_block[c] = sum.bits;
  }
  __syncthreads();

  Count mine{0};
  if (lane < columns) {
    mine = Count{before_block[lane]}.then(Count{p.before_counts[(first_column + lane) * blocks * kWarps + stretch]});
  }
  for (int chunk = 0; chunk < p.chunks; ++chunk) {
    const int64_t t = (stretch * p.chunks + chunk) * kWarp + lane;
    const bool exists = t < p.a.tokens;
    Token token{-1, false, false, false};
    if (exists) token = token_at(p.a, static_cast<int>(t), p.a.sequence[t]);
    const uint32_t anew = __ballot_sync(kAllLanes, token.begins_sequence);
    for (int c = 0; c < columns; ++c) {
      const int column = first_column + c;
      const uint32_t who = __ballot_sync(kAllLanes, counts(token, column));
      const Count before{__shfl_sync(kAllLanes, mine.bits, c)};
      const Count upto = before.then(who, column == kPositions ? anew : 0, lane);
      const uint32_t last = __shfl_sync(kAllLanes, upto.bits, kWarp - 1);
      if (c == lane) mine.bits = last;
      if (!exists) continue;
      // Both ids count from 0, so the token itself is taken off.
      if (column == kSegments) {
        p.a.segment[t] = token.real ? upto.value() - 1 : -1;
      } else if (column == kPositions) {
        p.a.position[t] = token.real ? upto.value() - 1 : -1;
      } else {
        p.a.prefix[(t + 1) * p.a.modalities + column - kFirstModality] = upto.value();
      }
    }
  }

  const int column = first_column + lane;
  if (blockIdx.x == 0 && warp == 0 && lane < columns && column >= kFirstModality) {
    p.a.prefix[column - kFirstModality] = 0;
  }
  if (stretch == blocks * kWarps - 1 && column == kSegments) *p.a.num_segments = mine.value();
}

__global__ void __launch_bounds__(kThreads) write_table(const __grid_constant__ SegmentTable p) {
  const int64_t t = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (t >= p.tokens) return;
  const int token = static_cast<int>(t);
  int32_t* const row = row_of(p, token);
  if (row == nullptr) return;
  if (begins_run(p, token)) {
    row[0] = p.sequence[t];
    row[1] = token;
    row[3] = p.modality[t];
    atomicAdd(row + 2, -token);  // end - begin, from two threads; the row was 0
  }
  if (ends_run(p, token)) atomicAdd(row + 2, token + 1);
}

int chunks_of(int tokens) {
  constexpr int64_t most = int64_t{kMaxBlocks} * kThreads;
  return static_cast<int>(std::max<int64_t>(1, (tokens + most - 1) / most));
}

int blocks_of(int tokens) {
  const int64_t of_block = int64_t{chunks_of(tokens)} * kThreads;
  return static_cast<int>(std::max<int64_t>(1, (tokens + of_block - 1) / of_block));
}

}  // namespace

int64_t segment_tokens_workspace(int tokens, int modalities) {
  return (int64_t{modalities} + kFirstModality) * blocks_of(tokens) * (1 + kWarps);
}

void segment_tokens(const SegmentTokens& a, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  const int columns = a.modalities + kFirstModality, blocks = blocks_of(a.tokens);
  auto* const workspace = reinterpret_cast<uint32_t*>(queue.workspace);
  const Stretches p{a, columns, chunks_of(a.tokens), workspace, workspace + int64_t{columns} * blocks};
  const dim3 grid(blocks, (columns + kWarp - 1) / kWarp);
  const auto stream = reinterpret_cast<cudaStream_t>(queue.stream);
  launch("sum_stretches", sum_stretches, grid, kThreads, 0, stream, p);
  launch("write_tokens", write_tokens, grid, kThreads, 0, stream, p);
}

void segment_table(const SegmentTable& a, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  const auto stream = reinterpret_cast<cudaStream_t>(queue.stream);
  if (a.max_segments == 0) return;
  check(cudaMemsetAsync(a.table, 0, size_t{16} * a.max_segments, stream), "cudaMemsetAsync");
  const int blocks = static_cast<int>((int64_t{a.tokens} + kThreads - 1) / kThreads);
  launch("write_table", write_table, blocks, kThreads, 0, stream, a);
}

int load_segmentation() {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncGetAttributes(&attributes, sum_stretches);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, write_tokens);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, write_table);
  return error;
}

int runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

std::string probe(int device) {
  // A plain error code, never a throw: a driver older than the runtime is an ordinary finding.
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) error = static_cast<cudaError_t>(load_segmentation());
  if (error == cudaSuccess) error = static_cast<cudaError_t>(load_intervals());
  if (error == cudaSuccess) error = static_cast<cudaError_t>(load_walks());
  const std::string why = error == cudaSuccess ? "" : cudaGetErrorString(error);
  if (error == cudaSuccess && before != device) cudaSetDevice(before);
  cudaGetLastError();  // forget what was found here: the next launch must not be blamed for it
  return why;
}

}  // namespace moda::cuda
