#include "instructions.h"

#include <algorithm>

namespace lowrank_ops::simulator {
namespace {

using Trace = std::vector<Access>;

constexpr size_t kMaxCells = size_t(1) << 24;  // of a table of common subsequences: larger ones are not searched

std::vector<Instruction> instructions;

uint32_t add(const AccessKind& what) {
  instructions.push_back({what, 0, {}});
  return uint32_t(instructions.size() - 1);
}

bool alike(const Access& a, const Access& b) {
  return a.what == b.what;
}

// Lanes whose traces are alike: the trace of the first lane, and the number of the instruction of each access.
struct Group {
  const Trace* trace;
  uint32_t lanes;
  std::vector<uint32_t> numbers;
};

// A part of a group's trace.
struct Part {
  Group* group;
  size_t begin, end;

  size_t size() const { return end - begin; }
  const Access& operator[](size_t i) const { return (*group->trace)[begin + i]; }
  size_t count(const AccessKind& what) const {
    return size_t(std::count_if(group->trace->begin() + ptrdiff_t(begin), group->trace->begin() + ptrdiff_t(end),
                                [&](const Access& access) { return access.what == what; }));
  }
};

bool alike(const Part& a, const Part& b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); i++)
    if (!alike(a[i], b[i])) return false;
  return true;
}

// The access that divides all parts into equally many rounds; null: there is none.
const AccessKind* find_divider(const std::vector<Part>& parts) {
  const Part& first = parts[0];
  const AccessKind* best = nullptr;
  size_t best_count = SIZE_MAX;
  std::vector<AccessKind> seen;
  for (size_t i = 0; i < first.size(); i++) {
    const AccessKind& what = first[i].what;
    if (std::find(seen.begin(), seen.end(), what) != seen.end()) continue;
    seen.push_back(what);
    size_t count = first.count(what);
    for (size_t p = 1; p < parts.size() && count > 0; p++)
      if (parts[p].count(what) != count) count = 0;
    if (count == 0) continue;
    const bool begins = std::all_of(parts.begin(), parts.end(), [&](const Part& part) { return part[0].what == what; });
    if (what.primitive == Primitive::kCommitCopies) return &first[i].what;
    if (begins) count = 0;  // better than any other
    if (count < best_count) best = &what, best_count = count;
  }
  return best;
}

// Merges the instructions of one part into those that `order` lists by number: the longest common subsequence is
// shared, the other accesses become new instructions.
void align(std::vector<uint32_t>& order, const Part& part) {
  const auto same = [&](size_t i, size_t j) { return instructions[order[i]].what == part[j].what; };
  const size_t rows = order.size(), columns = part.size(), width = columns + 1;
  const bool search = rows * columns < kMaxCells && std::max(rows, columns) < UINT16_MAX;
  // table[i, j]: length of the longest common subsequence of order[i:] and part[j:].
  std::vector<uint16_t> table(search ? (rows + 1) * width : 0);
  for (size_t i = search ? rows : 0; i-- > 0;)
    for (size_t j = columns; j-- > 0;)
      table[i * width + j] = same(i, j) ? uint16_t(table[(i + 1) * width + j + 1] + 1)
                                        : std::max(table[(i + 1) * width + j], table[i * width + j + 1]);
  std::vector<uint32_t> merged;
  for (size_t i = 0, j = 0; i < rows || j < columns;) {
    if (search && i < rows && j < columns && same(i, j)) {
      part.group->numbers[part.begin + j++] = order[i];
      merged.push_back(order[i++]);
    } else if (j == columns || (search && i < rows && table[(i + 1) * width + j] >= table[i * width + j + 1])) {
      merged.push_back(order[i++]);
    } else {
      merged.push_back(add(part[j].what));
      part.group->numbers[part.begin + j++] = merged.back();
    }
  }
  order.swap(merged);
}

void merge(std::vector<Part> parts) {
  std::erase_if(parts, [](const Part& part) { return part.size() == 0; });
  if (parts.empty()) return;
  if (std::all_of(parts.begin() + 1, parts.end(), [&](const Part& part) { return alike(part, parts[0]); })) {
    for (size_t i = 0; i < parts[0].size(); i++) {
      const uint32_t number = add(parts[0][i].what);
      for (const Part& part : parts) part.group->numbers[part.begin + i] = number;
    }
    return;
  }
  const AccessKind* const divider = find_divider(parts);
  if (divider == nullptr) {
    std::vector<uint32_t> order;
    for (const Part& part : parts) align(order, part);
    return;
  }
  const AccessKind what = *divider;
  std::vector<Part> round = parts;
  for (size_t rounds = parts[0].count(what); rounds > 0; rounds--) {
    // The accesses before the next divider, and the divider itself.
    const uint32_t number = add(what);
    for (size_t p = 0; p < parts.size(); p++) {
      size_t length = 0;
      while (!(parts[p][length].what == what)) length++;
      round[p].begin = parts[p].begin;
      round[p].end = parts[p].begin + length;
      parts[p].group->numbers[round[p].end] = number;
      parts[p].begin = round[p].end + 1;
    }
    merge(round);
  }
  merge(parts);
}

}  // namespace

const std::vector<Instruction>& merge_traces(Warp& warp) {
  static std::vector<Group> groups;
  instructions.clear();
  groups.clear();
  for (int lane = 0; lane < kLanes; lane++) {
    const Trace& trace = warp.trace[lane];
    const auto found = std::find_if(groups.begin(), groups.end(), [&](const Group& group) {
      return std::equal(trace.begin(), trace.end(), group.trace->begin(), group.trace->end(),
                        [](const Access& a, const Access& b) { return alike(a, b); });
    });
    if (found != groups.end())
      found->lanes |= 1u << lane;
    else
      groups.push_back({&trace, 1u << lane, std::vector<uint32_t>(trace.size())});
  }
  std::vector<Part> parts;
  for (Group& group : groups) parts.push_back({&group, 0, group.trace->size()});
  merge(std::move(parts));
  for (const Group& group : groups)
    for (int lane = 0; lane < kLanes; lane++) {
      if (!(group.lanes >> lane & 1)) continue;
      for (size_t i = 0; i < group.numbers.size(); i++) {
        Instruction& instruction = instructions[group.numbers[i]];
        instruction.lanes |= 1u << lane;
        instruction.address[lane] = warp.trace[lane][i].address;
      }
    }
  for (Trace& trace : warp.trace) trace.clear();
  warp.traced = false;
  return instructions;
}

}  // namespace lowrank_ops::simulator
