// The plan of attention on the CPU: one thread; linear in tokens but for the keys that have to be listed.

#include "plan.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>

#include "ranges.h"

namespace moda::cpu {

namespace {

// Of a slot, which is one interval of one pass, the limits of all rows.
struct Limits {
  const int32_t *lo, *hi;
};

std::vector<Limits> limits_of(const PlanAttention& a) {
  std::vector<Limits> limits;
  for (int p = a.first_pass; p < a.last_pass; ++p) {
    for (int i = 0; i < a.intervals; ++i) {
      limits.push_back({a.limits + lower_limit(p, i, a.intervals) * a.queries,
                        a.limits + upper_limit(p, i, a.intervals) * a.queries});
    }
  }
  return limits;
}

constexpr int32_t kFar = 2147483647;

enum class Kind { kAlike, kRising, kMixed };

// Neighbouring rows of a class, [begin, end) of its list.
struct Atom {
  int begin, end;
  Kind kind;
};

// Of some rows, for each interval of each pass: the least and the largest rank at which it begins and ends.
struct Bounds {
  std::vector<int> least_begin, most_begin, least_end, most_end;

  explicit Bounds(int slots)
      : least_begin(slots, kFar), most_begin(slots, -1), least_end(slots, kFar), most_end(slots, -1) {}

  void add(const int* begin, const int* end) {
    for (size_t s = 0; s < least_begin.size(); ++s) {
      least_begin[s] = std::min(least_begin[s], begin[s]);
      most_begin[s] = std::max(most_begin[s], begin[s]);
      least_end[s] = std::min(least_end[s], end[s]);
      most_end[s] = std::max(most_end[s], end[s]);
    }
  }

  void add(const Bounds& other) {
    add(other.least_begin.data(), other.least_end.data());
    add(other.most_begin.data(), other.most_end.data());
  }
};

class Sequence {
 public:
  Sequence(const PlanAttention& a, int s, Plan& plan)
      : a_(a),
        sequence_(s),
        first_key_(a.cu_seqlens[s]),
        keys_(a.cu_seqlens[s + 1] - a.cu_seqlens[s]),
        first_row_(a.cu_seqlens_q[s]),
        rows_(a.cu_seqlens_q[s + 1] - a.cu_seqlens_q[s]),
        passes_(a.last_pass - a.first_pass),
        slots_(passes_ * a.intervals),
        plan_(plan) {}

  void make() {
    find_members();
    find_rows();
    int64_t cost = 0;
    for (const std::vector<int>& rows : classes_) cost += choose(rows);
    if (whole_is_cheaper(cost)) return;
    for (const Group& group : groups_) write(group);
  }

 private:
  struct Group {
    const std::vector<int>* rows;
    int begin, end;
    Kind kind;
    Bounds bounds;
  };

  void find_members() {
    columns_.resize(passes_);
    ranks_.resize(passes_);
    for (int p = 0; p < passes_; ++p) {
      const int32_t* position = a_.positions + int64_t{a_.tokens} * (a_.first_pass + p) + first_key_;
      std::vector<int>& ranks = ranks_[p];
      ranks.assign(keys_ + 1, 0);
      int last = -1;
      for (int k = 0; k < keys_; ++k) {
        if (position[k] < 0) continue;
        if (position[k] <= last || position[k] >= keys_) {
          throw std::invalid_argument("positions: expected them to rise along each sequence, below its number of keys");
        }
        for (int x = last + 1; x <= position[k]; ++x) ranks[x] = static_cast<int>(columns_[p].size());
        last = position[k];
        columns_[p].push_back(k);
      }
      for (int x = last + 1; x <= keys_; ++x) ranks[x] = static_cast<int>(columns_[p].size());
    }
  }

  // Which ranks each row sees, and the classes: rows whose intervals are there, begin with the sequence, and reach
  // beyond its end alike.
  void find_rows() {
    begin_.assign(int64_t{rows_} * slots_, 0);
    end_.assign(int64_t{rows_} * slots_, 0);
    const std::vector<Limits> limits = limits_of(a_);
    std::map<std::string, int> known;
    std::string signature(slots_, 0), last;
    int current = -1;
    for (int r = 0; r < rows_; ++r) {
      bool sees = false;
      for (int s = 0; s < slots_; ++s) {
        const int p = s / a_.intervals;
        const int32_t low = limits[s].lo[first_row_ + r], high = limits[s].hi[first_row_ + r];
        signature[s] = 0;
        if (low >= high || low < -1) continue;
        const std::vector<int>& ranks = ranks_[p];
        begin(r)[s] = ranks[std::min(low, keys_ - 1) + 1];
        end(r)[s] = ranks[std::min(high, keys_ - 1) + 1];
        signature[s] = high == kFar ? 3 : low == -1 ? 1 : 2;
        sees |= begin(r)[s] < end(r)[s];
      }
      if (!sees) continue;
      if (current < 0 || signature != last) {
        const auto found = known.emplace(signature, static_cast<int>(classes_.size()));
        if (found.second) classes_.emplace_back();
        current = found.first->second;
        last = signature;
      }
      classes_[current].push_back(r);
    }
  }

  int* begin(int row) { return begin_.data() + int64_t{row} * slots_; }
  int* end(int row) { return end_.data() + int64_t{row} * slots_; }

  // The last key that a row sees.
  int last_seen(int row) {
    int last = -1;
    for (int s = 0; s < slots_; ++s) {
      if (begin(row)[s] < end(row)[s]) last = std::max(last, columns_[s / a_.intervals][end(row)[s] - 1]);
    }
    return last;
  }

  // The key that a row sees beyond those of another one: one, behind all that `last` stands for; else -1.
  int one_more(int row, int next, int last) {
    int key = -1;
    for (int s = 0; s < slots_; ++s) {
      const int grown = end(next)[s] - end(row)[s];
      if (grown == 0 && begin(next)[s] == begin(row)[s]) continue;
      if (grown != 1 || key >= 0 || begin(next)[s] != begin(row)[s]) return -1;
      key = columns_[s / a_.intervals][end(row)[s]];
    }
    return key > last ? key : -1;
  }

  std::vector<Atom> cut(const std::vector<int>& rows) {
    const int count = static_cast<int>(rows.size());
    const size_t size = sizeof(int) * slots_;
    std::vector<Atom> atoms;
    Atom pending{0, 0, Kind::kMixed};
    const auto flush = [&] {
      if (pending.begin < pending.end) atoms.push_back(pending);
      pending.begin = pending.end;
    };
    for (int at = 0; at < count;) {
      Atom piece{at, at + 1, Kind::kAlike};
      int last = -1;
      for (; piece.end < count; ++piece.end) {
        const int row = rows[piece.end - 1], next = rows[piece.end];
        const bool alike = std::memcmp(begin(row), begin(next), size) == 0 && std::memcmp(end(row), end(next), size) == 0;
        if (alike && piece.kind == Kind::kAlike) continue;
        if (alike || (piece.kind == Kind::kAlike && piece.end - at > 1)) break;
        const int key = one_more(row, next, piece.kind == Kind::kAlike ? last_seen(row) : last);
        if (key < 0) break;
        piece.kind = Kind::kRising;
        last = key;
      }
      at = piece.end;
      if (piece.end - piece.begin >= a_.costs.atom) {
        flush();
        atoms.push_back(piece);
        pending = {at, at, Kind::kMixed};
      } else if (pending.begin == pending.end) {
        pending = piece;
      } else {
        pending.end = piece.end;
        pending.kind = Kind::kMixed;
      }
      if (pending.end - pending.begin >= a_.costs.atom) {
        flush();
        pending = {at, at, Kind::kMixed};
      }
    }
    flush();
    return atoms;
  }

  // The keys that all rows see, and those that only some may see.
  void split(const Bounds& bounds, Ranges& full, Ranges& some) {
    full.clear();
    some.clear();
    for (int p = 0; p < passes_; ++p) {
      Ranges all, any;
      for (int s = p * a_.intervals; s < (p + 1) * a_.intervals; ++s) {
        all.push_back({p, bounds.most_begin[s], bounds.least_end[s]});
        any.push_back({p, bounds.least_begin[s], bounds.most_end[s]});
      }
      all = united(all);
      const Ranges rest = without(united(any), all);
      full.insert(full.end(), all.begin(), all.end());
      some.insert(some.end(), rest.begin(), rest.end());
    }
  }

  // How many keys those are. As `split`, for each of many candidates.
  void count(const Bounds& b, int64_t& full, int64_t& some) {
    full = some = 0;
    if (a_.intervals == 1) {
      for (int s = 0; s < slots_; ++s) {
        const int64_t all = std::max(b.least_end[s] - b.most_begin[s], 0);
        full += all;
        some += std::max(b.most_end[s] - b.least_begin[s], 0) - all;
      }
      return;
    }
    Ranges all, rest;
    split(b, all, rest);
    full = size_of(all);
    some = size_of(rest);
  }

  int64_t call_cost(int64_t rows, int64_t keys, bool masked) const {
    const PlanCosts& c = a_.costs;
    return c.call + c.row * rows + c.key * keys + (masked ? rows * keys * c.masked / 100 : rows * keys);
  }

  int64_t cost_of(const Bounds& bounds, int64_t rows, Kind kind) {
    int64_t full, some;
    count(bounds, full, some);
    if (some == 0) return call_cost(rows, full, false);
    const int64_t apart = cost_apart(rows, full, some, kind);
    return is_together(rows, full, some, apart) ? call_cost(rows, full + some, true) : apart;
  }

  // One call for the keys that all rows see and one for the others. Of rising rows the last key that all see is the
  // first one of those along the diagonal.
  int64_t cost_apart(int64_t rows, int64_t full, int64_t some, Kind kind) const {
    const PlanCosts& c = a_.costs;
    const int64_t scores = std::min(rows * rows, rows * (rows + c.causal_block) / 2);
    const int64_t diagonal = c.call + (c.row + c.key) * rows + scores;
    full -= kind == Kind::kRising;
    return (full > 0 ? call_cost(rows, full, false) : 0) +
           (kind == Kind::kRising ? diagonal : call_cost(rows, some, true));
  }

  // Whether one masked call over all these keys does as well.
  bool is_together(int64_t rows, int64_t full, int64_t some, int64_t apart) const {
    return full > 0 && some > 0 && rows <= a_.costs.most && call_cost(rows, full + some, true) <= apart;
  }

  // The cheapest way to cut a class's rows into groups.
  int64_t choose(const std::vector<int>& rows) {
    const std::vector<Atom> atoms = cut(rows);
    const int count = static_cast<int>(atoms.size());
    std::vector<Bounds> bounds;
    bounds.reserve(count);
    for (const Atom& atom : atoms) {
      bounds.emplace_back(slots_);
      for (int i = atom.begin; i < atom.end; ++i) bounds.back().add(begin(rows[i]), end(rows[i]));
    }
    std::vector<int64_t> best(count + 1, 0);
    std::vector<int> from(count + 1, 0);
    for (int j = 1; j <= count; ++j) {
      Bounds joined(slots_);
      for (int i = j - 1; i >= 0; --i) {
        const int64_t size = atoms[j - 1].end - atoms[i].begin;
        if (i < j - 1 && size > a_.costs.most) break;
        joined.add(bounds[i]);
        const int64_t cost = best[i] + cost_of(joined, size, i == j - 1 ? atoms[i].kind : Kind::kMixed);
        if (i == j - 1 || cost < best[j]) {
          best[j] = cost;
          from[j] = i;
        }
      }
    }
    const size_t first = groups_.size();
    for (int j = count; j > 0; j = from[j]) {
      const int i = from[j];
      Group group{&rows, atoms[i].begin, atoms[j - 1].end, i == j - 1 ? atoms[i].kind : Kind::kMixed, Bounds(slots_)};
      for (int n = i; n < j; ++n) group.bounds.add(bounds[n]);
      groups_.push_back(std::move(group));
    }
    std::reverse(groups_.begin() + first, groups_.end());
    return best[count];
  }

  // Short sequences: one masked call over everything, where that is cheaper; written then.
  bool whole_is_cheaper(int64_t cost) {
    int64_t rows = 0;
    for (const std::vector<int>& of_class : classes_) rows += of_class.size();
    const int64_t most = a_.costs.whole * a_.costs.whole;
    if (groups_.size() < 2 || rows * keys_ > most) return false;
    std::vector<int> keys, all;
    for (int p = 0; p < passes_; ++p) {
      std::vector<int> change(columns_[p].size() + 1, 0);
      for (const std::vector<int>& of_class : classes_) {
        for (const int r : of_class) {
          for (int s = p * a_.intervals; s < (p + 1) * a_.intervals; ++s) {
            if (begin(r)[s] >= end(r)[s]) continue;
            ++change[begin(r)[s]];
            --change[end(r)[s]];
          }
        }
      }
      int seen = 0;
      for (size_t i = 0; i < columns_[p].size(); ++i) {
        seen += change[i];
        if (seen > 0) keys.push_back(columns_[p][i]);
      }
    }
    if (call_cost(rows, keys.size(), true) >= cost) return false;
    for (const std::vector<int>& of_class : classes_) all.insert(all.end(), of_class.begin(), of_class.end());
    std::sort(keys.begin(), keys.end());
    std::sort(all.begin(), all.end());
    PlannedCall call = begin_call(CallKind::kMasked, true);
    write_span(all.data(), static_cast<int>(all.size()), call.rows, call.row_start, call.row_offset);
    write_span(keys.data(), static_cast<int>(keys.size()), call.keys, call.key_start, call.key_offset);
    plan_.calls.push_back(call);
    return true;
  }

  void write(const Group& group) {
    Ranges full, some;
    split(group.bounds, full, some);
    const int64_t rows = group.end - group.begin;
    const int64_t of_full = size_of(full), of_some = size_of(some);
    CallKind kind = CallKind::kMasked;
    if (is_together(rows, of_full, of_some, cost_apart(rows, of_full, of_some, group.kind))) {
      some.insert(some.end(), full.begin(), full.end());
      full.clear();
    } else if (group.kind == Kind::kRising) {
      kind = CallKind::kCausal;
      take_diagonal((*group.rows)[group.begin], full, some);
    }
    PlannedCall call = begin_call(CallKind::kFull, true);
    write_span(group.rows->data() + group.begin, static_cast<int>(rows), call.rows, call.row_start, call.row_offset);
    if (!full.empty()) {
      write_keys(full, call);
      plan_.calls.push_back(call);
      call.begins = 0;
    }
    if (!some.empty()) {
      call.kind = static_cast<int32_t>(kind);
      write_keys(some, call);
      plan_.calls.push_back(call);
    }
  }

  // Rising rows: the last key that their first row sees, and so all see, begins the diagonal.
  void take_diagonal(int row, Ranges& full, Ranges& some) {
    const int key = last_seen(row);
    for (Range& r : full) {
      if (r.begin < r.end && columns_[r.pass][r.end - 1] == key) {
        --r.end;
        some.push_back({r.pass, r.end, r.end + 1});
        break;
      }
    }
    full.erase(std::remove_if(full.begin(), full.end(), [](const Range& r) { return r.begin >= r.end; }), full.end());
  }

  PlannedCall begin_call(CallKind kind, bool begins) const {
    return {sequence_, sequence_ + 1, begins, static_cast<int32_t>(kind), 0, 0, 0, 0, 0, 0};
  }

  void write_span(const int* list, int count, int32_t& size, int32_t& start, int32_t& offset) {
    size = count;
    start = list[0];
    offset = -1;
    if (list[count - 1] - list[0] == count - 1) return;
    start = -1;
    offset = static_cast<int32_t>(plan_.indices.size());
    plan_.indices.insert(plan_.indices.end(), list, list + count);
  }

  void write_keys(const Ranges& ranges, PlannedCall& call) {
    int first = keys_, last = -1;
    for (const Range& r : ranges) {
      first = std::min(first, columns_[r.pass][r.begin]);
      last = std::max(last, columns_[r.pass][r.end - 1]);
    }
    call.keys = size_of(ranges);
    call.key_start = first;
    call.key_offset = -1;
    if (last - first + 1 == call.keys) return;
    std::vector<int> list;
    list.reserve(call.keys);
    for (const Range& r : ranges) {
      list.insert(list.end(), columns_[r.pass].begin() + r.begin, columns_[r.pass].begin() + r.end);
    }
    std::sort(list.begin(), list.end());
    write_span(list.data(), call.keys, call.keys, call.key_start, call.key_offset);
  }

  const PlanAttention& a_;
  const int sequence_, first_key_, keys_, first_row_, rows_, passes_, slots_;
  Plan& plan_;
  std::vector<std::vector<int>> columns_, ranks_;  // of each pass: its keys; keys before each position
  std::vector<int> begin_, end_;                   // [rows, slots]
  std::vector<std::vector<int>> classes_;
  std::vector<Group> groups_;
};

// Asks for large pages, where the system gives them to those who ask: to touch fresh memory page by page takes longer
// than to fill it with masks.
void ask_for_large_pages(void* memory, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{1} << 21;
  const uintptr_t address = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

// As std::upper_bound, from where the row before had its own: along a document that is a step or none.
void move_to(const std::vector<int32_t>& of, int32_t limit, int64_t& at) {
  const int64_t size = of.size();
  while (at < size && of[at] <= limit) ++at;
  while (at > 0 && of[at - 1] > limit) --at;
}

// Whether the calls of sequence s - 1 serve sequence s too.
bool as_before(const PlanAttention& a, int s) {
  const int32_t *k = a.cu_seqlens + s, *q = a.cu_seqlens_q + s;
  if (k[0] - k[-1] != k[1] - k[0] || q[0] - q[-1] != q[1] - q[0]) return false;
  for (int p = a.first_pass; p < a.last_pass; ++p) {
    const int32_t* position = a.positions + int64_t{a.tokens} * p;
    if (!std::equal(position + k[-1], position + k[0], position + k[0])) return false;
  }
  const std::vector<Limits> limits = limits_of(a);
  return std::all_of(limits.begin(), limits.end(), [&](const Limits& of) {
    return std::equal(of.lo + q[-1], of.lo + q[0], of.lo + q[0]) && std::equal(of.hi + q[-1], of.hi + q[0], of.hi + q[0]);
  });
}

}  // namespace

Plan plan_attention(const PlanAttention& a) {
  Plan plan;
  size_t first = 0;
  for (int s = 0; s < a.sequences; ++s) {
    if (s > 0 && as_before(a, s)) {
      for (size_t c = first; c < plan.calls.size(); ++c) plan.calls[c].last_sequence = s + 1;
      continue;
    }
    first = plan.calls.size();
    Sequence(a, s, plan).make();
  }
  return plan;
}

void plan_masks(const PlanAttention& a, const PlanMasks& m) {
  // Of each pass, the call's keys: where they stand in the call, and their positions, which rise.
  std::vector<std::vector<int32_t>> place(a.passes), position(a.passes);
  std::vector<std::array<int64_t, 2>> seen(int64_t{a.passes} * a.intervals);  // of each interval: which of those keys
  const std::vector<Limits> limits = limits_of(a);
  uint8_t *mask = m.masks, *hidden = m.hidden;
  size_t bytes = 0;
  for (const PlannedCall* call = m.plan; call < m.plan + m.calls; ++call) {
    if (call->kind == static_cast<int32_t>(CallKind::kMasked)) bytes += size_t(call->rows) * call->keys;
  }
  ask_for_large_pages(mask, bytes);
  for (const PlannedCall* call = m.plan; call < m.plan + m.calls; ++call) {
    if (call->kind != static_cast<int32_t>(CallKind::kMasked)) continue;
    const int keys = call->keys;
    const int32_t first_key = a.cu_seqlens[call->first_sequence], first_row = a.cu_seqlens_q[call->first_sequence];
    for (int p = a.first_pass; p < a.last_pass; ++p) {
      const int32_t* of_pass = a.positions + int64_t{a.tokens} * p + first_key;
      place[p].clear();
      position[p].clear();
      for (int k = 0; k < keys; ++k) {
        const int32_t at = of_pass[call->key_start >= 0 ? call->key_start + k : m.indices[call->key_offset + k]];
        if (at < 0) continue;
        place[p].push_back(k);
        position[p].push_back(at);
      }
    }
    std::memset(mask, 0, int64_t{call->rows} * keys);
    std::fill(seen.begin(), seen.end(), std::array<int64_t, 2>{0, 0});
    for (int r = 0; r < call->rows; ++r, mask += keys) {
      const int row = first_row + (call->row_start >= 0 ? call->row_start + r : m.indices[call->row_offset + r]);
      bool sees = false;
      for (int s = a.first_pass * a.intervals; s < a.last_pass * a.intervals; ++s) {
        const Limits& of_slot = limits[s - a.first_pass * a.intervals];
        const int32_t low = of_slot.lo[row], high = of_slot.hi[row];
        if (low >= high || low < -1) continue;
        const std::vector<int32_t>&of = position[s / a.intervals], &where = place[s / a.intervals];
        auto& [begin, end] = seen[s];
        move_to(of, low, begin);
        move_to(of, high, end);
        if (begin == end) continue;
        sees = true;
        if (where[end - 1] - where[begin] == end - begin - 1) {
          std::memset(mask + where[begin], 1, end - begin);
        } else {
          for (auto k = begin; k < end; ++k) mask[where[k]] = 1;
        }
      }
      *hidden++ = !sees;
    }
  }
}

}  // namespace moda::cpu
