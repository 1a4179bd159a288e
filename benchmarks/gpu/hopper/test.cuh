// Shared by all tests: the report (a line of JSON), error checks, and the list of the tests.
#pragma once

#include <cuda_runtime.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace hopper {

enum class Verdict { kRight, kWrong, kUnfinished };

// The line of JSON that a test prints.
class Report {
 public:
  explicit Report(const char* name = "") : name_(name) {}
  void begin(const char* name) { name_ = name, start_ = std::chrono::steady_clock::now(); }
  void number(const std::string& key, double value) { append(key, text_of(value)); }
  void text(const std::string& key, const std::string& value) { append(key, quoted(value)); }
  void list(const std::string& key, const std::vector<double>& values) {
    std::string all = "[";
    for (size_t i = 0; i < values.size(); ++i) all += (i ? ", " : "") + text_of(values[i]);
    append(key, all + "]");
  }
  void wrong() { verdict_ = Verdict::kWrong; }
  void unfinished() {
    if (verdict_ == Verdict::kRight) verdict_ = Verdict::kUnfinished;
  }
  // Prints the line. Only the first call prints: the time limit and the end of the test may come together.
  void print() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (printed_) return;
    printed_ = true;
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
    const char* ok = verdict_ == Verdict::kRight ? "true" : verdict_ == Verdict::kWrong ? "false" : "null";
    std::printf("{\"test\": %s, \"ok\": %s%s, \"seconds\": %.2f}\n", quoted(name_).c_str(), ok, fields_.c_str(),
                seconds);
    std::fflush(stdout);
  }

 private:
  static std::string text_of(double value) {
    if (!std::isfinite(value)) return "null";
    char buffer[40];
    std::snprintf(buffer, sizeof buffer, "%.5g", value);
    return buffer;
  }
  static std::string quoted(const std::string& value) {
    std::string all = "\"";
    for (char c : value) {
      if (c == '"' || c == '\\') all += '\\';
      all += (c >= 0 && c < ' ') ? ' ' : c;
    }
    return all + "\"";
  }
  void append(const std::string& key, const std::string& value) {
    std::lock_guard<std::mutex> lock(mutex_);
    fields_ += ", " + quoted(key) + ": " + value;
  }

  std::string name_, fields_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  Verdict verdict_ = Verdict::kRight;
  bool printed_ = false;
  std::mutex mutex_;
};

// The report of the test that this process runs.
inline Report report;

inline void check(cudaError_t error, const char* call, const char* file, int line) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(file) + ":" + std::to_string(line) + ": " + call + ": " +
                           cudaGetErrorString(error));
}
#define CHECK(call) ::hopper::check((call), #call, __FILE__, __LINE__)

// Runs a part of a test. If it throws, KEY_error is reported, "ok" becomes null, and the test goes on.
template <typename Body>
void attempt(const std::string& key, Body body) {
  try {
    body();
  } catch (const std::exception& error) {
    report.text(key + "_error", error.what());
    report.unfinished();
    cudaGetLastError();
  }
}

// The tests, by the file that defines them.
// wgmma_shifted.cu
void test_wgmma_shifted();
void test_wgmma_swizzle_shifted();
// rates.cu
void test_wgmma_rate();
void test_mma_rate();
// tma.cu
void test_tma_border();
void test_tma_rate();
// latencies.cu
void test_latencies_grid();
void test_latencies_cluster();
void test_latencies_mbarrier();
void test_latencies_multicast();
void test_latencies_launch();
// memory.cu
void test_l2_bandwidth();
void test_cp_async_issue();

}  // namespace hopper
