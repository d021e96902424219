// The Python module `moda_kernels._native`. Pointers and the stream arrive as integers, checked by native.py, which
// also owns all memory; device -1 is the CPU. The GIL is released throughout.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "intervals.h"
#include "plan.h"
#include "segmentation.h"
#include "walks.h"
#if defined(MODA_WITH_CUDA)
#include "cuda.h"
#endif

#if !defined(MODA_MODULE)
#define MODA_MODULE _native
#endif
#if !defined(MODA_CUDA_ARCHITECTURES)
#define MODA_CUDA_ARCHITECTURES ""
#endif

namespace py = pybind11;

namespace {

using Address = uintptr_t;

template <class T = int32_t>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

#if defined(MODA_WITH_CUDA)
constexpr bool kWithCuda = true;
using moda::cuda::mask_intervals_workspace;
using moda::cuda::probe;
using moda::cuda::runtime_version;
using moda::cuda::segment_tokens_workspace;
using moda::cuda::walk_workspace;

template <class Arguments>
void run(void (*on_cpu)(const Arguments&), void (*on_cuda)(const Arguments&, const moda::cuda::Queue&),
         const Arguments& arguments, int device, Address stream, Address workspace) {
  if (device < 0) {
    on_cpu(arguments);
  } else {
    on_cuda(arguments, {device, stream, at(workspace)});
  }
}
#define MODA_RUN(name, ...) run(moda::cpu::name, moda::cuda::name, __VA_ARGS__)
#else
constexpr bool kWithCuda = false;
std::string probe(int) { return "built without CUDA"; }
int runtime_version() { return 0; }
int64_t segment_tokens_workspace(int, int) { return 0; }
int64_t walk_workspace(int, int, int, int, bool) { return 0; }
int64_t mask_intervals_workspace(int, int) { return 0; }

template <class Arguments>
void run(void (*on_cpu)(const Arguments&), const Arguments& arguments, int device, Address, Address) {
  if (device >= 0) throw std::runtime_error("moda_kernels: built without CUDA");
  on_cpu(arguments);
}
#define MODA_RUN(name, ...) run(moda::cpu::name, __VA_ARGS__)
#endif

void segment_tokens(int device, Address stream, Address workspace, int tokens, int sequences, int modalities,
                    Address modality, Address items, Address cu_seqlens, Address segment, Address position,
                    Address sequence, Address prefix, Address num_segments) {
  const moda::SegmentTokens a{tokens,       sequences,    modalities,   at(modality), at<int64_t>(items), at(cu_seqlens),
                              at(segment),  at(position), at(sequence), at(prefix),   at(num_segments)};
  MODA_RUN(segment_tokens, a, device, stream, workspace);
}

void segment_table(int device, Address stream, int tokens, int max_segments, Address modality, Address segment,
                   Address sequence, Address table) {
  const moda::SegmentTable a{tokens, max_segments, at(modality), at(segment), at(sequence), at(table)};
  MODA_RUN(segment_table, a, device, stream, 0);
}

// The passes from `first` on that fit into one batch. prefix[p]: the role of the keys where a rule speaks of steps.
moda::PassBatch batch_of(const std::vector<int>& rules, const std::vector<int>& modalities, const std::vector<int>& own,
                         int roles, int first) {
  moda::PassBatch batch{};
  batch.first = first;
  const int room = std::min(moda::kPassesAtOnce, moda::kRulesAtOnce / std::max(roles, 1));
  batch.count = std::min(static_cast<int>(modalities.size()) - first, room);
  std::vector<int> known;
  for (int p = 0; p < batch.count; ++p) {
    batch.modality[p] = modalities[first + p];
    batch.own[p] = static_cast<int8_t>(own[first + p]);
    bool steps = false;
    int member = -1;
    for (int r = 0; r < roles; ++r) {
      const int rule = rules[static_cast<size_t>(first + p) * roles + r];
      batch.rules[p * roles + r] = static_cast<uint8_t>(rule);
      steps = steps || (rule & (moda::kBefore | moda::kUpto)) != 0;
      if ((rule & moda::kMember) != 0) member = r;
    }
    batch.prefix[p] = steps ? member : -1;
    if (!steps) continue;
    const auto found = std::find(known.begin(), known.end(), member);
    batch.slot[p] = static_cast<int>(found - known.begin());
    if (found == known.end()) known.push_back(member);
  }
  return batch;
}

// Addresses of what a token is: modality, role, position, segment, step, chunk, sequence.
using FactArguments = std::array<Address, 7>;

void mask_intervals(int device, Address stream, Address workspace, int tokens, int rows, int sequences, int roles,
                    int max_segments, const FactArguments& facts, Address cu_seqlens, Address table, Address columns,
                    const std::vector<int>& rules, const std::vector<int>& modalities, const std::vector<int>& own,
                    int intervals, int window, bool window_all, Address limits, Address positions) {
  const int passes = static_cast<int>(modalities.size());
  if (roles < 1 || roles > moda::kRulesAtOnce || rules.size() != static_cast<size_t>(passes) * roles ||
      own.size() != modalities.size()) {
    throw std::invalid_argument("rules: expected P * R of them, R from 1 to " + std::to_string(moda::kRulesAtOnce) +
                                ", got " + std::to_string(rules.size()));
  }
  const moda::MaskIntervals a{tokens,       rows,         sequences,    roles,        max_segments, passes,
                              intervals,    window,       window_all,   at(facts[0]), at(facts[1]), at(facts[2]),
                              at(facts[3]), at(facts[4]), at(facts[5]), at(facts[6]), at(cu_seqlens), at(table),
                              at<int64_t>(columns), at(limits), at(positions)};
  for (int first = 0; first < passes;) {
    const moda::PassBatch batch = batch_of(rules, modalities, own, roles, first);
#if defined(MODA_WITH_CUDA)
    if (device >= 0) {
      moda::cuda::mask_intervals(a, batch, {device, stream, at(workspace)});
    } else {
      moda::cpu::mask_intervals(a, batch);
    }
#else
    static_cast<void>(stream + workspace);
    if (device >= 0) throw std::runtime_error("moda_kernels: built without CUDA");
    moda::cpu::mask_intervals(a, batch);
#endif
    first += batch.count;
  }
}

void token_facts(int tokens, int roles, Address modality, Address role, Address sequence, Address steps, Address chunks,
                 Address step, Address chunk, Address falls) {
  moda::cpu::token_facts({tokens, roles, at(modality), at(role), at(sequence), at<int64_t>(steps), at<int64_t>(chunks),
                          at(step), at(chunk), at(falls)});
}

// Queries or keys cut into tiles, as Python passes it: address of cu_seqlens; length, block, tiles.
using CutArguments = std::tuple<Address, int, int, int>;

moda::WalkInput walk_input(int passes, int intervals, int sequences, int rows, int tokens, Address limits,
                           Address positions, Address real, const CutArguments& queries, const CutArguments& keys) {
  auto cut = [&](const CutArguments& side) {
    const auto [cu_seqlens, length, block, tiles] = side;
    if (passes < 1 || intervals < 1 || sequences < 1 || length < -1 || block < 1 || tiles < 1) {
      throw std::invalid_argument("walks: expected at least one pass, interval, sequence, token and tile");
    }
    return moda::Cut{at(cu_seqlens), sequences, length, block, tiles};
  };
  return {passes, intervals, rows, tokens, at(limits), at(positions), at<uint8_t>(real), cut(queries), cut(keys)};
}

void query_walk(int device, Address stream, Address workspace, int passes, int intervals, int sequences, int rows,
                int tokens, Address limits, Address positions, Address real, const CutArguments& queries,
                const CutArguments& keys, bool affine, Address tiles, Address order, Address runs, Address key_lists) {
  const moda::QueryWalk a{
      walk_input(passes, intervals, sequences, rows, tokens, limits, positions, real, queries, keys),
      affine, at(tiles), at(order), at(runs), at(key_lists)};
  MODA_RUN(query_walk, a, device, stream, workspace);
}

void key_walk(int device, Address stream, Address workspace, int passes, int intervals, int sequences, int rows,
              int tokens, Address limits, Address positions, const CutArguments& queries, const CutArguments& keys,
              int chains, Address tiles, Address order, Address runs, Address query_lists) {
  if (chains < 1 || chains > moda::kMaxChains) {
    throw std::invalid_argument("key_walk: expected 1 to " + std::to_string(moda::kMaxChains) + " chains, got " +
                                std::to_string(chains));
  }
  const moda::KeyWalk a{walk_input(passes, intervals, sequences, rows, tokens, limits, positions, 0, queries, keys),
                        chains, at(tiles), at(order), at(runs), at(query_lists)};
  MODA_RUN(key_walk, a, device, stream, workspace);
}

// A plan's arguments, as Python passes them: tokens, queries and sequences; passes, first_pass, last_pass and intervals;
// addresses of limits, positions, cu_seqlens and cu_seqlens_q; the costs.
using PlanArguments = std::tuple<std::array<int, 3>, std::array<int, 4>, std::array<Address, 4>,
                                 std::array<int64_t, 8>>;

moda::PlanAttention plan_arguments(const PlanArguments& arguments) {
  const auto& [sizes, passes, addresses, c] = arguments;
  return {sizes[0],         sizes[1],         sizes[2],         passes[0],
          passes[1],        passes[2],        passes[3],        at(addresses[0]),
          at(addresses[1]), at(addresses[2]), at(addresses[3]),
          {c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]}};
}

template <class T>
py::bytearray bytes_of(const std::vector<T>& values) {
  return py::bytearray(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

py::tuple plan_attention(const PlanArguments& arguments) {
  moda::Plan plan;
  {
    const py::gil_scoped_release unlocked;
    plan = moda::cpu::plan_attention(plan_arguments(arguments));
  }
  return py::make_tuple(bytes_of(plan.calls), bytes_of(plan.indices));
}

void plan_masks(const PlanArguments& arguments, int calls, Address plan, Address indices, Address masks,
                Address hidden) {
  const moda::PlanMasks m{calls, at<const moda::PlannedCall>(plan), at(indices), at<uint8_t>(masks),
                          at<uint8_t>(hidden)};
  moda::cpu::plan_masks(plan_arguments(arguments), m);
}

}  // namespace

PYBIND11_MODULE(MODA_MODULE, module) {
  using namespace pybind11::literals;
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  module.doc() = "Segmentation, intervals, tiles and plans; use it through moda_kernels.runtime.native.";
  module.attr("INTERFACE") = 6;  // as in native.py
  module.attr("WITH_CUDA") = kWithCuda;
  module.attr("CUDA_ARCHITECTURES") = MODA_CUDA_ARCHITECTURES;
  module.attr("CUDA_RUNTIME") = runtime_version();
  module.attr("MAX_ROLES") = moda::kRulesAtOnce;
  module.attr("PASSES_AT_ONCE") = moda::kPassesAtOnce;
  module.attr("NO_WINDOW") = std::numeric_limits<int>::max();
  module.def("cuda_probe", &probe, "device"_a, Unlocked(), "Why this build cannot run on a CUDA device, or ''.");
  module.def("segment_tokens_workspace", &segment_tokens_workspace, "tokens"_a, "modalities"_a);
  module.def("segment_tokens", &segment_tokens, py::kw_only(), "device"_a, "stream"_a, "workspace"_a, "tokens"_a,
             "sequences"_a, "modalities"_a, "modality"_a, "items"_a, "cu_seqlens"_a, "segment"_a, "position"_a,
             "sequence"_a, "prefix"_a, "num_segments"_a, Unlocked());
  module.def("token_facts", &token_facts, py::kw_only(), "tokens"_a, "roles"_a, "modality"_a, "role"_a, "sequence"_a,
             "steps"_a, "chunks"_a, "step"_a, "chunk"_a, "falls"_a, Unlocked());
  module.def("segment_table", &segment_table, py::kw_only(), "device"_a, "stream"_a, "tokens"_a, "max_segments"_a,
             "modality"_a, "segment"_a, "sequence"_a, "table"_a, Unlocked());
  module.def("mask_intervals_workspace", &mask_intervals_workspace, "tokens"_a, "slots"_a);
  module.def("mask_intervals", &mask_intervals, py::kw_only(), "device"_a, "stream"_a, "workspace"_a, "tokens"_a,
             "rows"_a, "sequences"_a, "roles"_a, "max_segments"_a, "facts"_a, "cu_seqlens"_a, "table"_a, "columns"_a,
             "rules"_a, "modalities"_a, "own"_a, "intervals"_a, "window"_a, "window_all"_a, "limits"_a, "positions"_a,
             Unlocked());
  module.def("walk_workspace", &walk_workspace, "passes"_a, "walks"_a, "query_tiles"_a, "key_tiles"_a, "of_keys"_a);
  module.def("query_walk", &query_walk, py::kw_only(), "device"_a, "stream"_a, "workspace"_a, "passes"_a, "intervals"_a,
             "sequences"_a, "rows"_a, "tokens"_a, "limits"_a, "positions"_a, "real"_a, "queries"_a, "keys"_a,
             "affine"_a, "tiles"_a, "order"_a, "runs"_a, "key_lists"_a, Unlocked());
  module.def("key_walk", &key_walk, py::kw_only(), "device"_a, "stream"_a, "workspace"_a, "passes"_a, "intervals"_a,
             "sequences"_a, "rows"_a, "tokens"_a, "limits"_a, "positions"_a, "queries"_a, "keys"_a, "chains"_a,
             "tiles"_a, "order"_a, "runs"_a, "query_lists"_a, Unlocked());
  module.attr("CALL_FIELDS") = moda::kCallFields;
  module.def("plan_attention", &plan_attention, "arguments"_a, "Calls and indices of a plan, int32.");
  module.def("plan_masks", &plan_masks, "arguments"_a, "calls"_a, "plan"_a, "indices"_a, "masks"_a, "hidden"_a,
             Unlocked());
}
