// Sets of keys as ranges of ranks within passes, for plans on the CPU.
#pragma once

#include <algorithm>
#include <vector>

namespace moda {

// Keys of a pass by their rank in it, first included, last excluded.
struct Range {
  int pass, begin, end;
  int size() const { return std::max(end - begin, 0); }
};

using Ranges = std::vector<Range>;

inline int size_of(const Ranges& ranges) {
  int size = 0;
  for (const Range& r : ranges) size += r.size();
  return size;
}

// Ranges of one pass, sorted, disjoint and not empty.
inline Ranges united(Ranges ranges) {
  ranges.erase(std::remove_if(ranges.begin(), ranges.end(), [](const Range& r) { return r.begin >= r.end; }),
               ranges.end());
  std::sort(ranges.begin(), ranges.end(), [](const Range& x, const Range& y) { return x.begin < y.begin; });
  Ranges result;
  for (const Range& r : ranges) {
    if (!result.empty() && r.begin <= result.back().end) {
      result.back().end = std::max(result.back().end, r.end);
    } else {
      result.push_back(r);
    }
  }
  return result;
}

// What `ranges` has and `taken` has not; both of one pass and united.
inline Ranges without(const Ranges& ranges, const Ranges& taken) {
  Ranges result;
  for (Range r : ranges) {
    for (const Range& t : taken) {
      if (t.end <= r.begin || t.begin >= r.end) continue;
      if (t.begin > r.begin) result.push_back({r.pass, r.begin, t.begin});
      r.begin = t.end;
    }
    if (r.begin < r.end) result.push_back(r);
  }
  return result;
}

}  // namespace moda
