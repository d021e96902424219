// What the CUDA files share: errors, the current device, launches, scans of a block.
//
// The kernels need nothing of the device beyond warp votes, shuffles, barriers and integer atomics, so that
// `emulation.h` can stand in for CUDA and run them on the CPU, where tests compare them with everything else.
#pragma once

#if defined(MODA_EMULATE_CUDA)
#include "emulation.h"
#else
#include <cuda_runtime.h>
// Shared memory whose size comes with the launch.
#define MODA_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#endif

#include <stdexcept>
#include <string>

namespace moda::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

inline void check(cudaError_t error, const char* doing) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("moda_kernels, ") + doing + ": " + cudaGetErrorString(error));
  }
}

// Makes a device current, and the one before it at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device_ != before_) check(cudaSetDevice(device_), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (device_ != before_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_, before_ = 0;
};

template <class Arguments>
void launch(const char* name, void (*kernel)(Arguments), dim3 blocks, int threads, size_t shared_bytes,
            [[maybe_unused]] cudaStream_t stream, const Arguments& arguments) {
  if (blocks.x == 0) return;
#if defined(MODA_EMULATE_CUDA)
  emulation::run(name, [&] { kernel(arguments); }, blocks, threads, shared_bytes);
#else
  kernel<<<blocks, threads, shared_bytes, stream>>>(arguments);
#endif
  check(cudaGetLastError(), name);
}

__device__ __forceinline__ int lane_index() { return threadIdx.x % kWarp; }
__device__ __forceinline__ int warp_index() { return threadIdx.x / kWarp; }

// Sum over the lanes up to and including this one.
__device__ __forceinline__ int warp_inclusive_sum(int value) {
  for (int step = 1; step < kWarp; step *= 2) {
    const int below = __shfl_up_sync(kAllLanes, value, step);
    if (lane_index() >= step) value += below;
  }
  return value;
}

// Sum over the threads of the block before this one. All threads call it; blocks are whole warps.
__device__ inline int block_exclusive_sum(int value) {
  __shared__ int warp_sums[kWarp];
  const int inclusive = warp_inclusive_sum(value);
  __syncthreads();  // an earlier call may still be reading
  if (lane_index() == kWarp - 1) warp_sums[warp_index()] = inclusive;
  __syncthreads();
  int before = inclusive - value;
  for (int w = 0; w < warp_index(); ++w) before += warp_sums[w];
  return before;
}

}  // namespace moda::cuda
