#include "parallel.h"
#include "pecker_cpu.h"

#include <atomic>

namespace {

int detect() {
#ifdef PECKER_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi2"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
      __builtin_cpu_supports("bmi2"))
    return 1;
#endif
  return 0;
}

const int level_max = detect();
std::atomic<int> level_now{level_max};
std::atomic<pecker::OpenMP> openmp_now{nullptr};

}  // namespace

namespace pecker {
int level() { return level_now.load(std::memory_order_relaxed); }
OpenMP openmp() { return openmp_now.load(std::memory_order_relaxed); }
}  // namespace pecker

PECKER_API int pecker_abi_version() { return 6; }

PECKER_API int pecker_cpu_level() { return pecker::level(); }

PECKER_API int pecker_cpu_level_max() { return level_max; }

PECKER_API int pecker_set_cpu_level(int level) {
  if (level < 0 || level > level_max) return -1;
  level_now.store(level, std::memory_order_relaxed);
  return 0;
}

PECKER_API void pecker_set_openmp(void* gomp_parallel) {
  openmp_now.store(reinterpret_cast<pecker::OpenMP>(gomp_parallel), std::memory_order_relaxed);
}
