// Runs tasks on several threads. torch already brings an OpenMP runtime, and a second one would spin on the cores torch wants next:
// the door hands us the entry point of torch's own (pecker_set_openmp). Without one, threads are started for a call and joined
// before it returns. Tasks are handed out by a counter, so a core that is taken away delays one task, not a fixed share of the work.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace pecker {

// GOMP_parallel of libgomp, which LLVM's and Intel's runtimes export too: run the function once on each thread of a team.
using OpenMP = void (*)(void (*)(void*), void*, unsigned, unsigned);
OpenMP openmp();

// Data that makes another thread worth its start: waking a member of a team takes microseconds, starting a thread tens of them.
inline int64_t bytes_per_thread() { return openmp() ? int64_t{1} << 18 : int64_t{1} << 22; }

inline int64_t useful_threads(int64_t n_bytes, int threads) {
  return std::max<int64_t>(1, std::min<int64_t>(threads, n_bytes / bytes_per_thread()));
}

// work(i) is called once for each i in [0, n), in any order; n_bytes is what all of them move together.
template <typename Work>
void parallel_tasks(int64_t n, int64_t n_bytes, int threads, const Work& work) {
  const int64_t useful = std::min(useful_threads(n_bytes, threads), n);
  if (useful <= 1) {
    for (int64_t i = 0; i < n; ++i) work(i);
    return;
  }
  struct Shared {
    std::atomic<int64_t> next{0};
    int64_t n;
    const Work* work;
  } shared;
  shared.n = n;
  shared.work = &work;
  const auto drain = [](void* at) {
    Shared& s = *static_cast<Shared*>(at);
    for (int64_t i; (i = s.next.fetch_add(1, std::memory_order_relaxed)) < s.n;) (*s.work)(i);
  };
  if (const OpenMP run = openmp()) {
    run(drain, &shared, static_cast<unsigned>(useful), 0);
    return;
  }
  std::vector<std::thread> pool;
  try {
    for (int64_t i = 1; i < useful; ++i) pool.emplace_back(drain, &shared);
  } catch (const std::system_error&) {
    // No thread to be had: those there are do the rest.
  }
  drain(&shared);
  for (auto& thread : pool) thread.join();
}

// work(begin, end) is called on disjoint ranges of [0, n) whose borders are multiples of `align`.
template <typename Work>
void parallel_for(int64_t n, int64_t align, int64_t n_bytes, int threads, const Work& work) {
  const int64_t useful = useful_threads(n_bytes, threads);
  const int64_t tasks = useful == 1 ? 1 : 4 * useful;
  const int64_t blocks = (n + align - 1) / align;
  const int64_t step = (blocks + tasks - 1) / tasks * align;
  if (n <= step) {
    work(int64_t{0}, n);
    return;
  }
  parallel_tasks((n + step - 1) / step, n_bytes, threads,
                 [&](int64_t i) { work(i * step, std::min((i + 1) * step, n)); });
}

}  // namespace pecker
