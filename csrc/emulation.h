// Just enough CUDA to run this folder's kernels on the CPU, for tests on machines without a GPU.
//
// A block's threads are fibers that take turns. A vote, shuffle or barrier hands over to the others until all lanes of
// the warp (all threads of the block) have come; one that never comes is reported, so a divergent vote cannot pass.
// Launches run threads and blocks forwards or backwards, at random but always the same way, which shows most missing
// barriers and reads of what another block writes. Not for speed, and not a race detector.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#define __global__ static
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(threads)
#define MODA_DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(emulation::dynamic_shared.data())

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, gridDim;

namespace emulation {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 64 << 10;

// Threads that wait for one another, and what they brought, by lane.
struct Meeting {
  unsigned expected = 0, arrived = 0;
  uint64_t held = 0;
  uint32_t brought[kWarp], found[kWarp];  // found: what was brought to the last one held
};

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t context;  // to begin with
  jmp_buf place;       // to go on at; jumps are much cheaper than changes of context
  bool begun, done;
};

inline std::vector<Fiber> fibers;
inline std::vector<Meeting> warps;
inline Meeting block;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline std::vector<uint64_t> dynamic_shared;
inline unsigned current;
inline uint64_t progress;  // counts arrivals and ends
inline bool reverse = false;

// Neither may be inlined: no variable of theirs changes while they are away.
[[gnu::noinline]] inline void resume(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) return;
  if (fiber.begun) _longjmp(fiber.place, 1);
  fiber.begun = true;
  setcontext(&fiber.context);
}

[[gnu::noinline]] inline void pause(Fiber& fiber) {
  if (_setjmp(fiber.place) == 0) _longjmp(scheduler, 1);
}

inline void meet(Meeting& meeting) {
  const uint64_t held = meeting.held;
  ++progress;
  if (++meeting.arrived == meeting.expected) {
    std::copy_n(meeting.brought, kWarp, meeting.found);
    meeting.arrived = 0;
    ++meeting.held;
  }
  Fiber& me = fibers[current];
  while (meeting.held == held) pause(me);
}

// All lanes' values. Another meeting of the warp cannot end before each of its lanes has read this one's.
inline const uint32_t* exchange(uint32_t value) {
  Meeting& warp = warps[current / kWarp];
  warp.brought[current % kWarp] = value;
  meet(warp);
  return warp.found;
}

inline void start() {
  body();
  fibers[current].done = true;
  ++progress;
  _longjmp(scheduler, 1);
}

inline void run_block(const char* name, unsigned threads) {
  warps.assign((threads + kWarp - 1) / kWarp, Meeting());
  for (Meeting& warp : warps) warp.expected = kWarp;
  block = Meeting();
  block.expected = threads;
  if (fibers.size() < threads) fibers = std::vector<Fiber>(threads);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.begun = fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, start, 0);
  }
  for (unsigned left = threads; left > 0;) {
    const uint64_t before = progress;
    for (unsigned i = 0; i < threads; ++i) {
      current = reverse ? threads - 1 - i : i;
      if (fibers[current].done) continue;
      threadIdx = dim3(current);
      resume(fibers[current]);
      left -= fibers[current].done;
    }
    if (left > 0 && progress == before) {
      std::fprintf(stderr, "%s: block (%u, %u): threads wait for others that never come\n", name, blockIdx.x, blockIdx.y);
      std::abort();
    }
  }
}

inline void run(const char* name, std::function<void()> kernel, dim3 grid, int threads, size_t shared_bytes) {
  static std::minstd_rand random;
  reverse = random() / 2 % 2;
  body = std::move(kernel);
  gridDim = grid;
  const unsigned blocks = grid.x * grid.y;
  for (unsigned i = 0; i < blocks; ++i) {
    const unsigned b = reverse ? blocks - 1 - i : i;
    blockIdx = dim3(b % grid.x, b / grid.x);
    dynamic_shared.assign(shared_bytes / 8 + 1, 0xabababababababab);  // what it holds at first is nobody's business
    run_block(name, static_cast<unsigned>(threads));
  }
}

}  // namespace emulation

inline uint32_t __ballot_sync(unsigned, bool vote) {
  const uint32_t* votes = emulation::exchange(vote);
  uint32_t bits = 0;
  for (unsigned lane = 0; lane < emulation::kWarp; ++lane) bits |= votes[lane] << lane;
  return bits;
}
inline bool __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) == 0xffffffffu; }
template <class T>
T shuffled(T value, unsigned from) {
  static_assert(sizeof(T) == 4, "32-bit values only");
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = emulation::exchange(bits)[from < emulation::kWarp ? from : threadIdx.x % emulation::kWarp];
  std::memcpy(&value, &bits, 4);
  return value;
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return shuffled(value, static_cast<unsigned>(lane));
}
template <class T>
T __shfl_up_sync(unsigned, T value, int step) {
  return shuffled(value, threadIdx.x % emulation::kWarp - static_cast<unsigned>(step));
}
template <class T>
T __shfl_down_sync(unsigned, T value, int step) {
  return shuffled(value, threadIdx.x % emulation::kWarp + static_cast<unsigned>(step));
}
inline int __reduce_min_sync(unsigned, int value) {
  const uint32_t* values = emulation::exchange(static_cast<uint32_t>(value));
  int least = value;
  for (unsigned lane = 0; lane < emulation::kWarp; ++lane) least = min(least, static_cast<int>(values[lane]));
  return least;
}
inline int __reduce_max_sync(unsigned mask, int value) { return ~__reduce_min_sync(mask, ~value); }
inline void __syncwarp() { emulation::exchange(0); }
inline void __threadfence() {}
inline void __syncthreads() { emulation::meet(emulation::block); }
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
inline int atomicAdd(int32_t* address, int value) {
  const int before = *address;
  *address += value;
  return before;
}

// The runtime: one device, nothing asynchronous, nothing that fails.
using cudaError_t = int;
using cudaStream_t = void*;
struct cudaFuncAttributes {};
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 0, cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
  return std::memset(address, value, bytes), cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cudaSuccess;
}
