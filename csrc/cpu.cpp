// Segmentation on the CPU: one thread, one pass over the tokens.

#include <algorithm>
#include <vector>

#include "segmentation.h"

namespace moda::cpu {

void segment_tokens(const SegmentTokens& a) {
  std::fill_n(a.prefix, a.modalities, 0);
  int sequence = 0, segments = 0, position = 0;
  for (int t = 0; t < a.tokens; ++t) {
    while (sequence + 1 < a.sequences && a.cu_seqlens[sequence + 1] <= t) ++sequence;
    const Token token = token_at(a, t, sequence);
    if (token.begins_sequence) position = 0;
    segments += token.begins_segment;
    a.sequence[t] = sequence;
    a.segment[t] = token.real ? segments - 1 : -1;
    a.position[t] = token.real ? position : -1;
    position += token.real;
    const int32_t* before = a.prefix + int64_t{a.modalities} * t;
    int32_t* after = a.prefix + int64_t{a.modalities} * (t + 1);
    for (int m = 0; m < a.modalities; ++m) after[m] = before[m] + counts(token, kFirstModality + m);
  }
  *a.num_segments = segments;
}

void segment_table(const SegmentTable& a) {
  std::fill_n(a.table, int64_t{4} * a.max_segments, 0);
  for (int t = 0; t < a.tokens; ++t) {
    int32_t* row = row_of(a, t);
    if (row == nullptr) continue;
    if (begins_run(a, t)) {
      row[0] = a.sequence[t];
      row[1] = t;
      row[3] = a.modality[t];
    }
    ++row[2];
  }
}

void token_facts(const TokenFacts& a) {
  std::vector<int> last_sequence(a.roles, -1);
  std::vector<int32_t> last_step(a.roles, 0);
  int before = -1;  // the last token that is no padding
  *a.falls = 0;
  for (int t = 0; t < a.tokens; ++t) {
    a.step[t] = 0;
    a.chunk[t] = -1;
    if (a.modality[t] < 0) continue;
    const int role = a.role[t], sequence = a.sequence[t];
    if (a.steps != nullptr && role >= 0 && role < a.roles) {
      const int64_t step = std::clamp<int64_t>(a.steps[t], INT32_MIN, INT32_MAX);
      a.step[t] = static_cast<int32_t>(step);
      *a.falls += step != a.steps[t];
      *a.falls += last_sequence[role] == sequence && a.step[t] < last_step[role];
      last_sequence[role] = sequence;
      last_step[role] = a.step[t];
    }
    if (a.chunks != nullptr) {
      const bool goes_on = before >= 0 && a.sequence[before] == sequence && a.chunks[before] == a.chunks[t];
      if (a.chunks[t] >= 0) a.chunk[t] = goes_on ? a.chunk[before] : t;
      before = t;
    }
  }
}

}  // namespace moda::cpu
