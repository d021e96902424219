// From intervals to few large rectangles of scores, for attention on the CPU: what is asked for (see
// moda_kernels/backends/cpu/plan.py, which says what the plan is; twin.py there decides the same in Python).
#pragma once

#include <cstdint>
#include <vector>

#include "intervals.h"

namespace moda {

// What calls cost, in scores of a full rectangle. Integers, so that both versions compare equal costs alike.
struct PlanCosts {
  int64_t call;           // one more call
  int64_t row, key;       // for each of its rows and keys
  int64_t masked;         // 100 masked scores
  int64_t causal_block;   // rows of a block along the diagonal, which a causal call computes whole
  int64_t atom, most;     // rows: shorter pieces are put together; the most of a call with a mask
  int64_t whole;          // a masked call over a whole sequence has up to whole^2 scores
};

enum class CallKind : int32_t { kFull = 0, kCausal = 1, kMasked = 2 };

// One kernel call, as it is handed out: rows and keys count from the sequence's first query row and key.
struct PlannedCall {
  int32_t first_sequence, last_sequence;  // the sequences that it serves, which are equal; last excluded
  int32_t begins;                         // 1: other rows than the call before it
  int32_t kind;
  int32_t rows, row_start, row_offset;  // how many; the first one of a run, or -1 and where `indices` has them
  int32_t keys, key_start, key_offset;
};
constexpr int kCallFields = sizeof(PlannedCall) / sizeof(int32_t);

struct PlanAttention {
  int tokens, queries, sequences;
  int passes, first_pass, last_pass, intervals;  // of all passes, those from first_pass to last_pass (excluded)
  const int32_t* limits;                         // as in intervals.h, of `queries` rows
  const int32_t* positions;                      // [passes, tokens]
  const int32_t* cu_seqlens;                     // [sequences + 1]
  const int32_t* cu_seqlens_q;                   // [sequences + 1]
  PlanCosts costs;
};

struct Plan {
  std::vector<PlannedCall> calls;
  std::vector<int32_t> indices;
};

// The masks of the masked calls, one after another, [rows, keys] each, and for each of their rows whether all is hidden.
struct PlanMasks {
  int calls;
  const PlannedCall* plan;
  const int32_t* indices;
  uint8_t* masks;
  uint8_t* hidden;
};

namespace cpu {
Plan plan_attention(const PlanAttention&);
void plan_masks(const PlanAttention&, const PlanMasks&);
}  // namespace cpu

}  // namespace moda
