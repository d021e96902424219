// Intervals of a mask on CUDA: one launch, a thread for each row and each key; two more before it where rules speak of
// steps:
//
//   last_of_block    of each role that a step is looked for in: its last token in every block
//   last_of_token    ... its last token up to every token
//   write_intervals  each row searches these for the step where what it sees ends
//
// All of a role's tokens stand in memory order and steps never fall along them, so "the step of the last token of the
// role up to t" rises with t within a sequence, and halving finds its place.

#include <algorithm>

#include "cuda.h"
#include "cuda_common.cuh"

namespace moda::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 8;
constexpr int kPerBlock = kThreads * kPerThread;

struct Lasts {
  MaskIntervals a;
  int blocks;
  int32_t role[kPassesAtOnce];  // of each slot
  int32_t* of_block;            // [slots, blocks]
  int32_t* of_token;            // [slots, tokens]
};

struct Work {
  MaskIntervals a;
  PassBatch batch;
  const int32_t* of_token;
};

// The largest value of the threads up to and including this one; every thread of the block calls it.
__device__ int block_inclusive_max(int value) {
  __shared__ int warp_max[kThreads / kWarp];
  for (int step = 1; step < kWarp; step *= 2) {
    const int below = __shfl_up_sync(kAllLanes, value, step);
    if (lane_index() >= step) value = max(value, below);
  }
  __syncthreads();  // an earlier call may still be reading
  if (lane_index() == kWarp - 1) warp_max[warp_index()] = value;
  __syncthreads();
  for (int w = 0; w < warp_index(); ++w) value = max(value, warp_max[w]);
  return value;
}

__device__ bool is_member(const MaskIntervals& a, int64_t t, int role) {
  return t < a.tokens && a.modality[t] >= 0 && a.role[t] == role;
}

__global__ void __launch_bounds__(kThreads) last_of_block(const __grid_constant__ Lasts p) {
  const int slot = blockIdx.y;
  const int64_t first = int64_t{blockIdx.x} * kPerBlock;
  int mine = -1;
  for (int k = 0; k < kPerThread; ++k) {
    const int64_t t = first + int64_t{k} * kThreads + threadIdx.x;
    if (is_member(p.a, t, p.role[slot])) mine = static_cast<int>(t);
  }
  const int last = block_inclusive_max(mine);
  if (threadIdx.x == kThreads - 1) p.of_block[int64_t{slot} * p.blocks + blockIdx.x] = last;
}

__global__ void __launch_bounds__(kThreads) last_of_token(const __grid_constant__ Lasts p) {
  __shared__ int shared_last;
  const int slot = blockIdx.y;
  // The blocks before this one.
  int mine = -1;
  for (int b = threadIdx.x; b < static_cast<int>(blockIdx.x); b += kThreads) {
    mine = max(mine, p.of_block[int64_t{slot} * p.blocks + b]);
  }
  mine = block_inclusive_max(mine);
  if (threadIdx.x == kThreads - 1) shared_last = mine;
  __syncthreads();
  int last = shared_last;
  for (int k = 0; k < kPerThread; ++k) {
    const int64_t t = int64_t{blockIdx.x} * kPerBlock + int64_t{k} * kThreads + threadIdx.x;
    const int upto = max(last, block_inclusive_max(is_member(p.a, t, p.role[slot]) ? static_cast<int>(t) : -1));
    if (t < p.a.tokens) p.of_token[int64_t{slot} * p.a.tokens + t] = upto;
    __syncthreads();
    if (threadIdx.x == kThreads - 1) shared_last = upto;
    __syncthreads();
    last = shared_last;
  }
}

// The last position of the row's sequence whose step is before the row's own (or, with_own, its own).
__device__ int last_position(const MaskIntervals& a, const int32_t* last, const Row& row, bool with_own) {
  const int sequence = a.sequence[row.token], step = a.step[row.token];
  const int begin = a.cu_seqlens[sequence];
  int low = begin, high = a.cu_seqlens[sequence + 1];
  // How many tokens of the sequence have nothing too late up to them.
  while (low < high) {
    const int middle = low + (high - low) / 2;
    const int t = last[middle];
    if (t < begin || a.step[t] < step || (with_own && a.step[t] == step)) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  if (low == begin) return -1;
  const int t = last[low - 1];
  return t < begin ? -1 : a.position[t];
}

__global__ void __launch_bounds__(kThreads) write_intervals(const __grid_constant__ Work p) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < p.a.rows) {
    const Row row = row_at(p.a, i);
    for (int k = 0; k < p.batch.count; ++k) {
      const int rule = rule_of(p.a, p.batch, k, row);
      int prefix = -1;
      if ((rule & (kBefore | kUpto)) != 0) {
        const int32_t* const last = p.of_token + int64_t{p.batch.slot[k]} * p.a.tokens;
        prefix = last_position(p.a, last, row, (rule & kUpto) != 0);
      }
      write_limits(p.a, p.batch.first + k, i, rule, row, prefix);
    }
  }
  if (i < p.a.tokens) {
    for (int k = 0; k < p.batch.count; ++k) {
      p.a.positions[int64_t{p.batch.first + k} * p.a.tokens + i] = position_in(p.a, p.batch, k, static_cast<int>(i));
    }
  }
}

int blocks_of(int tokens) { return static_cast<int>((int64_t{tokens} + kPerBlock - 1) / kPerBlock); }

}  // namespace

int64_t mask_intervals_workspace(int tokens, int slots) { return int64_t{slots} * (int64_t{tokens} + blocks_of(tokens)); }

void mask_intervals(const MaskIntervals& a, const PassBatch& batch, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  const auto stream = reinterpret_cast<cudaStream_t>(queue.stream);
  const int blocks = blocks_of(a.tokens);
  Lasts lasts{a, blocks, {}, nullptr, nullptr};
  int slots = 0;
  for (int p = 0; p < batch.count; ++p) {
    if (batch.prefix[p] < 0) continue;
    lasts.role[batch.slot[p]] = batch.prefix[p];
    slots = std::max(slots, batch.slot[p] + 1);
  }
  lasts.of_token = queue.workspace;
  lasts.of_block = queue.workspace + int64_t{slots} * a.tokens;
  if (slots > 0) {
    launch("last_of_block", last_of_block, dim3(blocks, slots), kThreads, 0, stream, lasts);
    launch("last_of_token", last_of_token, dim3(blocks, slots), kThreads, 0, stream, lasts);
  }
  const int64_t most = std::max(a.rows, a.tokens);
  const Work work{a, batch, lasts.of_token};
  launch("write_intervals", write_intervals, static_cast<unsigned>((most + kThreads - 1) / kThreads), kThreads, 0, stream,
         work);
}

int load_intervals() {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncGetAttributes(&attributes, last_of_block);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, last_of_token);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, write_intervals);
  return error;
}

}  // namespace moda::cuda
