// Tokens to segments: what is asked for, and the decisions about one token, for the CPU and for CUDA alike.
//
// Every output is a running count over the tokens in memory order (see Column). No torch headers here or anywhere in
// csrc: tensors arrive as pointers that Python has checked, so one build serves every version of torch.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MODA_HD __host__ __device__ __forceinline__
#else
#define MODA_HD inline
#endif

namespace moda {

struct SegmentTokens {
  int tokens, sequences, modalities;
  const int32_t* modality;    // [tokens], -1 for padding
  const int64_t* items;       // [tokens], or null
  const int32_t* cu_seqlens;  // [sequences + 1], non-decreasing, within 0...tokens
  int32_t* segment;           // [tokens]
  int32_t* position;          // [tokens]
  int32_t* sequence;          // [tokens]
  int32_t* prefix;            // [tokens + 1, modalities]
  int32_t* num_segments;      // [1]
};

struct SegmentTable {
  int tokens, max_segments;
  const int32_t *modality, *segment, *sequence;  // [tokens]
  int32_t* table;                                // [max_segments, 4]: sequence, first token, length, modality
};

// What tokens may be given beside a modality. The CPU has this; elsewhere PyTorch does it (tokens/segments.py).
struct TokenFacts {
  int tokens, roles;
  const int32_t *modality, *role, *sequence;  // [tokens]; role: 0...roles - 1, -1 for padding
  const int64_t *steps, *chunks;              // [tokens], or null
  int32_t *step, *chunk;                      // [tokens]: 0 and -1 for padding; chunk: the first token of the chunk
  int32_t* falls;                             // [1]: steps that fall along a role of a sequence, or are no int32
};

// The running counts. Column kFirstModality + m counts the tokens of modality m.
enum Column : int {
  kSegments = 0,   // tokens that begin a segment
  kPositions = 1,  // real tokens, anew in each sequence
  kFirstModality = 2,
};

struct Token {
  int modality;
  bool real;             // not padding, and inside a sequence
  bool begins_sequence;  // padding may do that too
  bool begins_segment;
};

// How many of bounds[1...n] are <= index: the interval that an index lies in, empty ones skipped. n where it is past
// the last.
MODA_HD int interval_of(const int32_t* bounds, int n, int index) {
  int low = 0, high = n;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (bounds[middle + 1] <= index) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// The sequence written for a token; one past the last sequence (padding, then) is given to the last.
MODA_HD int sequence_of(const SegmentTokens& a, int t) {
  const int s = interval_of(a.cu_seqlens, a.sequences, t);
  return s < a.sequences ? s : (a.sequences > 0 ? a.sequences - 1 : 0);
}

MODA_HD Token token_at(const SegmentTokens& a, int t, int sequence) {
  Token token{a.modality[t], false, false, false};
  if (a.sequences == 0) return token;
  const int start = a.cu_seqlens[sequence];
  const bool inside = start <= t && t < a.cu_seqlens[sequence + 1];
  token.begins_sequence = inside && t == start;
  token.real = inside && token.modality >= 0;
  token.begins_segment = token.real && (token.begins_sequence || a.modality[t - 1] != token.modality ||
                                        (a.items != nullptr && a.items[t - 1] != a.items[t]));
  return token;
}

// Whether a token adds one to a column.
MODA_HD bool counts(const Token& token, int column) {
  if (column == kSegments) return token.begins_segment;
  return token.real && (column == kPositions || token.modality == column - kFirstModality);
}

MODA_HD bool begins_run(const SegmentTable& a, int t) { return t == 0 || a.segment[t - 1] != a.segment[t]; }
MODA_HD bool ends_run(const SegmentTable& a, int t) { return t + 1 == a.tokens || a.segment[t + 1] != a.segment[t]; }

// The table row of a token's segment, or null: padding, or a segment too many.
MODA_HD int32_t* row_of(const SegmentTable& a, int t) {
  const int s = a.segment[t];
  return s >= 0 && s < a.max_segments ? a.table + int64_t{4} * s : nullptr;
}

namespace cpu {
void segment_tokens(const SegmentTokens&);
void segment_table(const SegmentTable&);
void token_facts(const TokenFacts&);
}  // namespace cpu

}  // namespace moda
