// The simulator as a program, for AddressSanitizer and UndefinedBehaviorSanitizer: a library could use those in Python
// only if they were preloaded. Reads launches from a file (harness.py, `sanitized`) and runs each with tensors
// allocated exactly as long as they are. Writes the outputs to another file, and one line with the report of each
// launch to stdout.
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "module.h"

namespace {

constexpr size_t kAlignment = 64;

[[noreturn]] void stop(const char* message) {
  std::fprintf(stderr, "replay: %s\n", message);
  std::exit(2);
}

template <typename Value>
bool read(Value& value, FILE* file) {
  return std::fread(&value, sizeof value, 1, file) == 1;
}

struct Tensor {
  void* memory = nullptr;
  int64_t bytes = 0;

  // The tensor has the same offset from the alignment as in the process that wrote the file. `place`: the call's
  // pointer.
  Tensor(int64_t& place, FILE* file) {
    int64_t beyond = 0;
    if (!read(bytes, file) || !read(beyond, file)) stop("the file is too short");
    if (bytes == 0) return;
    if (posix_memalign(&memory, kAlignment, size_t(beyond + bytes)) != 0) stop("no memory");
    char* const data = static_cast<char*>(memory) + beyond;
    if (std::fread(data, 1, size_t(bytes), file) != size_t(bytes)) stop("the file is too short");
    place = reinterpret_cast<int64_t>(data);
  }
  Tensor(const Tensor&) = delete;
  ~Tensor() { std::free(memory); }
};

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) stop("usage: replay LAUNCHES OUTPUTS");
  FILE* const in = std::fopen(arguments[1], "rb");
  FILE* const out = std::fopen(arguments[2], "wb");
  if (in == nullptr || out == nullptr) stop("cannot open the files");
  auto call = std::make_unique<BlockCall>();
  lowrank_ops::simulator::Settings settings;
  while (read(*call, in)) {
    if (!read(settings, in)) stop("the file is too short");
    const Tensor input(call->input, in), output(call->output, in), in_factor(call->in_factor.data, in),
        core(call->core.data, in), height(call->height_factor.data, in), width(call->width_factor.data, in),
        out_factor(call->out_factor.data, in), bias(call->bias, in);
    simulator_run(call.get(), &settings);
    std::printf("%s\n", simulator_report());
    std::fwrite(reinterpret_cast<const void*>(call->output), 1, size_t(output.bytes), out);
  }
  std::fclose(out);
  std::fclose(in);
}
