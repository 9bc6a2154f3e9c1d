// Splits [0, n) over short-lived threads. torch already runs an OpenMP runtime; a second one would spin on the cores torch wants
// next, so these threads are started for one call and joined before it returns.
#pragma once

#include <algorithm>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace pecker {

// Starting a thread costs tens of microseconds: below this much data the call stays on one thread.
constexpr int64_t kBytesPerThread = int64_t{1} << 22;

// work(begin, end) is called on disjoint ranges whose borders are multiples of `align`.
template <typename Work>
void parallel_for(int64_t n, int64_t align, int64_t n_bytes, int threads, const Work& work) {
  const int64_t useful = std::min<int64_t>(threads, n_bytes / kBytesPerThread);
  if (useful <= 1) {
    work(int64_t{0}, n);
    return;
  }
  const int64_t blocks = (n + align - 1) / align;
  const int64_t step = (blocks + useful - 1) / useful * align;
  std::vector<std::thread> pool;
  int64_t begin = step;
  try {
    for (; begin < n; begin += step) pool.emplace_back(work, begin, std::min(begin + step, n));
  } catch (const std::system_error&) {
    // No thread to be had: the caller's thread does the rest.
    work(begin, n);
  }
  work(int64_t{0}, std::min(step, n));
  for (auto& thread : pool) thread.join();
}

}  // namespace pecker
