#include "counters.h"

#include <algorithm>
#include <cstring>

#include "instructions.h"

namespace lowrank_ops::simulator {
namespace {

constexpr int kSectorBytes = 32, kBankBytes = 4, kBanks = 32;

struct Traffic {
  std::vector<uint16_t> times;  // per two bytes: how often accessed
  int64_t bytes = 0, sectors = 0, requests = 0;
};

struct Buffer {
  std::string name;
  uintptr_t begin = 0, end = 0;
  int element = 0;
  Traffic read, written;
};

struct Conflicts {
  Site site;
  Primitive primitive;
  int64_t phases = 0, ways = 0;
  int most = 0;
};

std::vector<Buffer> buffers;
size_t last_buffer = 0;
std::vector<Conflicts> conflicts;

int find_buffer(uintptr_t address, int bytes, Primitive primitive, Site site) {
  const auto inside = [&](const Buffer& buffer) { return address >= buffer.begin && address + bytes <= buffer.end; };
  if (last_buffer >= buffers.size() || !inside(buffers[last_buffer])) {
    const auto found = std::find_if(buffers.begin(), buffers.end(), inside);
    if (found == buffers.end()) {
      const Buffer* nearest = nullptr;
      for (const Buffer& buffer : buffers)
        if (address < buffer.end + 4096 && address + 4096 > buffer.begin) nearest = &buffer;
      if (nearest == nullptr) fail(site, "%s of %d bytes outside of every tensor", name_of(primitive), bytes);
      fail(site, "%s of %d bytes outside of every tensor: at byte %lld of %s, which has %lld", name_of(primitive),
           bytes, static_cast<long long>(address - nearest->begin), nearest->name.c_str(),
           static_cast<long long>(nearest->end - nearest->begin));
    }
    last_buffer = size_t(found - buffers.begin());
  }
  if (address % bytes != 0)
    fail(site, "%s of %d bytes at byte %lld of %s: not aligned", name_of(primitive), bytes,
         static_cast<long long>(address - buffers[last_buffer].begin), buffers[last_buffer].name.c_str());
  return int(last_buffer);
}

template <int granules>
void add_one(uint16_t* times) {
  typedef uint16_t Vector __attribute__((vector_size(2 * granules)));
  Vector value;
  std::memcpy(&value, times, sizeof value);
  value = value + 1;
  value |= Vector(value == 0);  // saturates at the largest count
  std::memcpy(times, &value, sizeof value);
}

void count_bytes(Traffic& traffic, uintptr_t offset, int bytes) {
  uint16_t* const times = traffic.times.data() + offset / 2;
  traffic.bytes += bytes;
  if (bytes == 16)
    add_one<8>(times);
  else if (bytes == 8)
    add_one<4>(times);
  else if (bytes == 4)
    add_one<2>(times);
  else
    add_one<1>(times);
}

int distinct(uintptr_t* values, int count) {
  if (!std::is_sorted(values, values + count)) std::sort(values, values + count);
  int found = count > 0;
  for (int i = 1; i < count; i++) found += values[i] != values[i - 1];
  return found;
}

void count_sectors(Traffic& traffic, const Instruction& instruction) {
  uintptr_t sectors[kLanes];
  int count = 0;
  for (int lane = 0; lane < kLanes; lane++)
    if (instruction.lanes >> lane & 1) sectors[count++] = instruction.address[lane] / kSectorBytes;
  traffic.sectors += distinct(sectors, count);
  traffic.requests++;
}

// Lanes that are served together: 32 with accesses of at most 4 bytes, 16 with 8 bytes, 8 with 16 bytes.
void count_banks(const Instruction& instruction) {
  const auto [site, primitive, bytes, buffer] = instruction.what;
  const int together = std::min(kLanes, kBanks * kBankBytes / bytes);
  for (int first = 0; first < kLanes; first += together) {
    uintptr_t address[kLanes];
    int count = 0;
    for (int lane = first; lane < first + together; lane++)
      if (instruction.lanes >> lane & 1) address[count++] = instruction.address[lane];
    if (count > 0) count_conflict(primitive, site, conflict_ways(address, count, bytes));
  }
}

std::string traffic_json(const Traffic& traffic) {
  int64_t distinct_bytes = 0, most = 0, least = traffic.times.empty() ? 0 : UINT16_MAX;
  for (uint16_t times : traffic.times) {
    distinct_bytes += 2 * (times > 0);
    most = std::max<int64_t>(most, times);
    least = std::min<int64_t>(least, times);
  }
  return "{\"bytes\": " + std::to_string(traffic.bytes) + ", \"distinct_bytes\": " + std::to_string(distinct_bytes) +
         ", \"most\": " + std::to_string(most) + ", \"least\": " + std::to_string(least) +
         ", \"sectors\": " + std::to_string(traffic.sectors) + ", \"requests\": " + std::to_string(traffic.requests) +
         "}";
}

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    result += c;
  }
  return result + "\"";
}

}  // namespace

void add_buffer(const char* name, const void* data, int64_t bytes, int element) {
  Buffer buffer;
  buffer.name = name;
  buffer.begin = reinterpret_cast<uintptr_t>(data);
  buffer.end = buffer.begin + uintptr_t(bytes);
  buffer.element = element;
  buffer.read.times.resize(size_t(bytes + 1) / 2);
  buffer.written.times.resize(size_t(bytes + 1) / 2);
  buffers.push_back(std::move(buffer));
}

void forget_everything() {
  buffers.clear();
  conflicts.clear();
  last_buffer = 0;
  machine.error.clear();
  machine.ctas = machine.launches = machine.largest_shared = 0;
  std::fill(std::begin(machine.barriers), std::end(machine.barriers), 0);
  std::fill(std::begin(machine.instructions), std::end(machine.instructions), 0);
}

const void* read_global(const void* address, int bytes, Primitive primitive, Site site) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  const int index = find_buffer(at, bytes, primitive, site);
  Buffer& buffer = buffers[size_t(index)];
  count_bytes(buffer.read, at - buffer.begin, bytes);
  record(*machine.current, Primitive::kLoadGlobal, bytes, index, at, site);
  if (index != machine.settings.shift_buffer) [[likely]]
    return address;
  const bool last = at + bytes + buffer.element > buffer.end;
  if (last && at - buffer.element < buffer.begin) return address;
  return static_cast<const char*>(address) + (last ? -buffer.element : buffer.element);
}

void* write_global(void* address, int bytes, Site site) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  const int index = find_buffer(at, bytes, Primitive::kStoreGlobal, site);
  Buffer& buffer = buffers[size_t(index)];
  count_bytes(buffer.written, at - buffer.begin, bytes);
  record(*machine.current, Primitive::kStoreGlobal, bytes, index, at, site);
  return address;
}

void count_instructions(Warp& warp) {
  for (const Instruction& instruction : merge_traces(warp)) {
    const auto [site, primitive, bytes, buffer] = instruction.what;
    machine.instructions[int(primitive)]++;
    if (primitive == Primitive::kLoadGlobal)
      count_sectors(buffers[size_t(buffer)].read, instruction);
    else if (primitive == Primitive::kStoreGlobal)
      count_sectors(buffers[size_t(buffer)].written, instruction);
    else if (primitive != Primitive::kCommitCopies)
      count_banks(instruction);
  }
}

int conflict_ways(uintptr_t* address, int count, int bytes) {
  const uintptr_t unit = uintptr_t(std::max(bytes, kBankBytes)), groups = kBanks * kBankBytes / unit;
  uint32_t seen = 0;
  bool clash = false;
  for (int i = 0; i < count; i++) {
    address[i] /= unit;
    const uint32_t bit = 1u << address[i] % groups;
    clash |= (seen & bit) != 0;
    seen |= bit;
  }
  if (!clash) return 1;
  const int different = distinct(address, count);  // sorted now
  int ways[kBanks] = {}, most = 1;
  uintptr_t last = ~uintptr_t(0);
  for (int i = 0; i < count && different > 1; i++) {
    if (address[i] != last) most = std::max(most, ++ways[address[i] % groups]);
    last = address[i];
  }
  return most;
}

void count_conflict(Primitive primitive, Site site, int ways) {
  static size_t last = 0;
  const auto same = [&](const Conflicts& entry) { return entry.site == site && entry.primitive == primitive; };
  if (last >= conflicts.size() || !same(conflicts[last])) {
    last = size_t(std::find_if(conflicts.begin(), conflicts.end(), same) - conflicts.begin());
    if (last == conflicts.size()) conflicts.push_back({site, primitive});
  }
  Conflicts& entry = conflicts[last];
  entry.phases++;
  entry.ways += ways;
  entry.most = std::max(entry.most, ways);
}

std::string report() {
  std::string text = "{\"error\": " + quoted(machine.error) + ", \"ctas\": " + std::to_string(machine.ctas) +
                     ", \"launches\": " + std::to_string(machine.launches) +
                     ", \"shared_bytes\": " + std::to_string(machine.largest_shared) +
                     ", \"threads\": " + std::to_string(machine.threads) + ", \"barriers\": {";
  const char* separator = "";
  for (size_t i = 0; i < std::size(machine.barriers); i++) {
    if (machine.barriers[i] == 0) continue;
    text += separator + quoted(std::to_string(i)) + ": " + std::to_string(machine.barriers[i]);
    separator = ", ";
  }
  text += "}, \"instructions\": {";
  for (int i = 0; i < int(Primitive::kCount); i++)
    text += (i ? ", " : "") + quoted(name_of(Primitive(i))) + ": " + std::to_string(machine.instructions[i]);
  text += "}, \"buffers\": {";
  for (const Buffer& buffer : buffers) {
    text += (&buffer == buffers.data() ? "" : ", ") + quoted(buffer.name) +
            ": {\"size\": " + std::to_string(buffer.end - buffer.begin) + ", \"read\": " + traffic_json(buffer.read) +
            ", \"written\": " + traffic_json(buffer.written) + "}";
  }
  text += "}, \"conflicts\": [";
  for (const Conflicts& entry : conflicts) {
    text += (&entry == conflicts.data() ? "" : ", ") + ("{\"primitive\": " + quoted(name_of(entry.primitive))) +
            ", \"file\": " + quoted(entry.site.file) + ", \"line\": " + std::to_string(entry.site.line) +
            ", \"phases\": " + std::to_string(entry.phases) + ", \"ways\": " + std::to_string(entry.ways) +
            ", \"most\": " + std::to_string(entry.most) + "}";
  }
  return text + "]}";
}

}  // namespace lowrank_ops::simulator
