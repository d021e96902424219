// The CUDA half of the extension, as the bindings see it: no CUDA headers needed, so that the bindings also build alone.
//
// Nothing here allocates, waits or copies to the host, so every call can be captured in a CUDA graph. Errors are thrown.
#pragma once

#include <cstdint>
#include <string>

#include "intervals.h"
#include "segmentation.h"
#include "walks.h"

namespace moda::cuda {

struct Queue {
  int device;
  uintptr_t stream;    // a cudaStream_t
  int32_t* workspace;  // of the size below, aligned to 16 bytes
};

// Why this build cannot run on a device, or "". Loads the kernels, so that a capture never has to.
std::string probe(int device);
int runtime_version();

int64_t segment_tokens_workspace(int tokens, int modalities);
int64_t walk_workspace(int passes, int walks, int q_tiles, int k_tiles, bool of_keys);
int64_t mask_intervals_workspace(int tokens, int slots);  // slots: roles that a step is looked for in

void segment_tokens(const SegmentTokens&, const Queue&);
void segment_table(const SegmentTable&, const Queue&);
void mask_intervals(const MaskIntervals&, const PassBatch&, const Queue&);
void query_walk(const QueryWalk&, const Queue&);
void key_walk(const KeyWalk&, const Queue&);

// One for each CUDA file: load its kernels on the current device. Returns a cudaError_t.
int load_segmentation();
int load_intervals();
int load_walks();

}  // namespace moda::cuda
