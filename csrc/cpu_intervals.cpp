// Intervals of a mask on the CPU: one thread, in time linear in rows and tokens.

#include <cstddef>
#include <vector>

#include "intervals.h"

namespace moda::cpu {

namespace {

// The tokens of one role in memory order. Steps never fall along a role of a sequence, neither along the rows' nor along
// the keys', so one mark for each row role and kind of rule moves through them and never goes back.
class Steps {
 public:
  Steps(const MaskIntervals& a, int role) : a_(a), marks_(2 * static_cast<size_t>(a.roles)) {
    for (int t = 0; t < a.tokens; ++t) {
      if (a.modality[t] >= 0 && a.role[t] == role) tokens_.push_back(t);
    }
  }

  // The last position of the row's sequence with a step before its own (or, with_own, its own).
  int last(const Row& row, bool with_own) {
    const int sequence = a_.sequence[row.token], step = a_.step[row.token];
    Mark& mark = marks_[2 * static_cast<size_t>(row.role) + with_own];
    if (mark.sequence != sequence || step < mark.step) {
      if (sequence < mark.sequence || mark.sequence < 0 || step < mark.step) mark.next = 0;
      while (mark.next < tokens_.size() && a_.sequence[tokens_[mark.next]] < sequence) ++mark.next;
      mark.sequence = sequence;
      mark.last = -1;
    }
    mark.step = step;
    for (; mark.next < tokens_.size(); ++mark.next) {
      const int t = tokens_[mark.next];
      if (a_.sequence[t] != sequence || a_.step[t] > step || (a_.step[t] == step && !with_own)) break;
      mark.last = a_.position[t];
    }
    return mark.last;
  }

 private:
  struct Mark {
    int sequence = -1, step = 0, last = -1;
    size_t next = 0;
  };
  const MaskIntervals& a_;
  std::vector<int> tokens_;
  std::vector<Mark> marks_;
};

}  // namespace

void mask_intervals(const MaskIntervals& a, const PassBatch& batch) {
  std::vector<Steps> steps;
  std::vector<int> steps_of(batch.count, -1);
  for (int p = 0; p < batch.count; ++p) {
    if (batch.prefix[p] < 0) continue;
    for (int before = 0; before < p && steps_of[p] < 0; ++before) {
      if (batch.prefix[before] == batch.prefix[p]) steps_of[p] = steps_of[before];
    }
    if (steps_of[p] < 0) {
      steps_of[p] = static_cast<int>(steps.size());
      steps.emplace_back(a, batch.prefix[p]);
    }
  }
  for (int i = 0; i < a.rows; ++i) {
    const Row row = row_at(a, i);
    for (int p = 0; p < batch.count; ++p) {
      const int rule = rule_of(a, batch, p, row);
      int prefix = -1;
      if ((rule & (kBefore | kUpto)) != 0) prefix = steps[steps_of[p]].last(row, (rule & kUpto) != 0);
      write_limits(a, batch.first + p, i, rule, row, prefix);
    }
  }
  for (int p = 0; p < batch.count; ++p) {
    int32_t* const positions = a.positions + int64_t{batch.first + p} * a.tokens;
    for (int t = 0; t < a.tokens; ++t) positions[t] = position_in(a, batch, p, t);
  }
}

}  // namespace moda::cpu
