// Adam on the weights a mask keeps, over all tensors of a step in one call (formula: adam_formula.h).
// Moved per kept weight in float32: 16 bytes of compact moments (8 without exp_avg); 12 of parameter and gradient for every weight
// whose cache line holds a kept one; 1/8 of mask for every weight of a block that has one.
#include "adam.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "levels.h"
#include "parallel.h"
#include "pecker_cpu.h"

namespace pecker {
namespace scalar {
#define PECKER_LEVEL 0
#include "adam_body.h"
#undef PECKER_LEVEL
}  // namespace scalar

#ifdef PECKER_X86
PECKER_BEGIN_AVX2
namespace avx2 {
#define PECKER_LEVEL 1
#include "adam_body.h"
#undef PECKER_LEVEL
}  // namespace avx2
PECKER_END

PECKER_BEGIN_AVX512
namespace avx512 {
#define PECKER_LEVEL 2
#include "adam_body.h"
#undef PECKER_LEVEL
}  // namespace avx512
PECKER_END
#endif

namespace {

struct Task {
  const AdamTensor* tensor;
  int64_t begin, end;
};

std::vector<Task> tasks_of(const AdamTensor* table, int64_t n_tensors, int64_t* n_bytes) {
  std::vector<Task> tasks;
  *n_bytes = 0;
  for (const AdamTensor* t = table; t != table + n_tensors; ++t) {
    for (int64_t begin = 0; begin < t->n; begin += kBlock * kBlocksPerTask) {
      const int64_t end = std::min(t->n, begin + kBlock * kBlocksPerTask);
      int64_t kept = end - begin;
      if (t->bits && !t->whole) kept = t->rank[(end + kBlock - 1) / kBlock] - t->rank[begin / kBlock];
      if (kept == 0) continue;
      tasks.push_back({t, begin, end});
      *n_bytes += 28 * kept;
    }
  }
  return tasks;
}

// State and compact gradients are read and written where the ranks say, lists of lanes are as long as they say: bits that were
// changed since would lead past the ends of both.
bool ranks_hold(const Task& task) {
  const AdamTensor& t = *task.tensor;
  if (!t.bits || (t.whole && !t.masked_grad_compact)) return true;
  for (int64_t at = task.begin; at < task.end; at += kBlock) {
    const int64_t ones = popcount(t.bits + at / 8, (std::min(kBlock, task.end - at) + 7) / 8);
    if (ones != t.rank[at / kBlock + 1] - t.rank[at / kBlock]) return false;
  }
  return true;
}

}  // namespace
}  // namespace pecker

PECKER_API void pecker_rank(const uint8_t* bits, int64_t n, int64_t* rank) {
  using pecker::kBlock;
  int64_t total = 0, block = 0;
  for (int64_t at = 0; at < n; at += kBlock) {
    rank[block++] = total;
    total += pecker_popcount(bits + at / 8, (std::min(kBlock, n - at) + 7) / 8, 1);
  }
  rank[block] = total;
}

PECKER_API void pecker_advance(const pecker::AdamTensor* table, int64_t n_tensors) {
  for (int64_t i = 0; i < n_tensors; ++i) ++*table[i].step;
}

PECKER_API int pecker_adam(const pecker::AdamTensor* table, int64_t n_tensors, const pecker::AdamSettings* settings,
                            int threads) {
  int64_t n_bytes;
  const auto tasks = pecker::tasks_of(table, n_tensors, &n_bytes);
  const int level = pecker::level();
  std::atomic<int> status{0};
  pecker::parallel_tasks(static_cast<int64_t>(tasks.size()), n_bytes, threads, [&](int64_t i) {
    const auto& task = tasks[i];
    if (!pecker::ranks_hold(task)) return status.store(pecker::kStaleRanks);
#ifdef PECKER_X86
    if (level == 2) return pecker::avx512::step_task(*task.tensor, *settings, task.begin, task.end);
    if (level == 1) return pecker::avx2::step_task(*task.tensor, *settings, task.begin, task.end);
#endif
    pecker::scalar::step_task(*task.tensor, *settings, task.begin, task.end);
  });
  return status;
}

PECKER_API int pecker_grad_stats(const pecker::AdamTensor* table, int64_t n_tensors, const pecker::AdamSettings* settings,
                                  pecker::GradStats* result, int threads) {
  int64_t n_bytes;
  const auto tasks = pecker::tasks_of(table, n_tensors, &n_bytes);
  const int level = pecker::level();
  std::vector<pecker::GradStats> parts(tasks.size());
  std::atomic<int> status{0};
  pecker::parallel_tasks(static_cast<int64_t>(tasks.size()), n_bytes, threads, [&](int64_t i) {
    const auto& task = tasks[i];
    if (!pecker::ranks_hold(task)) return status.store(pecker::kStaleRanks);
#ifdef PECKER_X86
    if (level == 2) parts[i] = pecker::avx512::stats_task(*task.tensor, *settings, task.begin, task.end);
    if (level == 1) parts[i] = pecker::avx2::stats_task(*task.tensor, *settings, task.begin, task.end);
    if (level >= 1) return;
#endif
    parts[i] = pecker::scalar::stats_task(*task.tensor, *settings, task.begin, task.end);
  });
  *result = {0, 1};
  for (const auto& part : parts) {
    result->square_sum += part.square_sum;
    result->finite &= part.finite;
  }
  return status;
}
