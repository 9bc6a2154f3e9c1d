// Scores in place: accumulation (8 bytes read of score and gradient and 4 written per weight), the mean of the retain scores' roots
// (4 read) and the contrast (8 read, 4 written). The first histogram is counted while a block of scores is still in the cache.
#include "select.h"

#include <cmath>

namespace {

using namespace pecker;

PECKER_INLINE void accumulate_body(float* score, const float* grad, int64_t n, int reduction) {
  if (reduction == 0)
    for (int64_t i = 0; i < n; ++i) score[i] += grad[i];
  else if (reduction == 1)
    for (int64_t i = 0; i < n; ++i) score[i] += __builtin_fabsf(grad[i]);
  else
    for (int64_t i = 0; i < n; ++i) score[i] += grad[i] * grad[i];
}
PECKER_AT_EACH_LEVEL(void, accumulate, accumulate_body, (float* score, const float* grad, int64_t n, int reduction),
                     (score, grad, n, reduction))

PECKER_INLINE void contrast_body(float* score, const float* squares, int64_t n, float count, float floor, uint32_t mask) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t raw;
    std::memcpy(&raw, score + i, 4);
    raw &= mask;
    float s;
    std::memcpy(&s, &raw, 4);
    score[i] = s / (__builtin_sqrtf(squares[i] / count) + floor);
  }
}
PECKER_AT_EACH_LEVEL(void, contrast, contrast_body,
                     (float* score, const float* squares, int64_t n, float count, float floor, uint32_t mask),
                     (score, squares, n, count, floor, mask))

// Sixteen partial sums at every level, so that all levels add in the same order.
PECKER_INLINE double rms_body(const float* squares, int64_t n, float count) {
  double lanes[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int j = 0; j < 16; ++j) lanes[j] += static_cast<double>(__builtin_sqrtf(squares[i + j] / count));
  for (int j = 0; i + j < n; ++j) lanes[j] += static_cast<double>(__builtin_sqrtf(squares[i + j] / count));
  double sum = 0;
  for (double lane : lanes) sum += lane;
  return sum;
}
PECKER_AT_EACH_LEVEL(double, rms, rms_body, (const float* squares, int64_t n, float count), (squares, n, count))

// change(piece, begin, n, values) updates values [begin, begin + n) of a tensor; then they are counted.
template <typename Change>
void update(float* const* scores, const int64_t* n, int64_t count, bool magnitude, int64_t* counts, uint8_t* faults_of,
            int threads, const Change& change) {
  parallel_groups(pieces(n, count), 12 * total(n, count), threads, [&](const Piece* first, const Piece* last) {
    Histogram histogram;
    for (const Piece* p = first; p != last; ++p)
      for (int64_t begin = p->begin; begin < p->end; begin += block_size) {
        const int64_t m = std::min(block_size, p->end - begin);
        float* const values = scores[p->tensor] + begin;
        change(*p, begin, m, values);
        if (!counts) continue;
        histogram.add(values, m, 20, 0x7ff);
        add_to(faults_of + p->tensor, faults(values, m, magnitude));
      }
    if (counts) histogram.flush(counts, 1 << 11);
  });
}

}  // namespace

PECKER_API void pecker_accumulate(float* const* scores, const void* const* grads, const int64_t* n, const int32_t* kinds,
                                  int64_t count, int reduction, int64_t* counts, uint8_t* faults, int threads) {
  update(scores, n, count, reduction == 0, counts, faults, threads,
         [=](const Piece& p, int64_t begin, int64_t m, float* values) {
           if (!grads[p.tensor]) return;
           float block[block_size];
           accumulate(values, widened(grads[p.tensor], kinds[p.tensor], begin, m, block), m, reduction);
         });
}

PECKER_API void pecker_contrast(float* const* scores, const float* const* squares, const int64_t* n, int64_t count,
                                int64_t accumulations, float floor, int magnitude, int64_t* counts, uint8_t* faults,
                                int threads) {
  update(scores, n, count, magnitude, counts, faults, threads,
         [=](const Piece& p, int64_t begin, int64_t m, float* values) {
           contrast(values, squares[p.tensor] + begin, m, static_cast<float>(accumulations), floor,
                    magnitude ? magnitude_bits : ~uint32_t{0});
         });
}

PECKER_API void pecker_rms_sums(const float* const* squares, const int64_t* n, int64_t count, int64_t accumulations,
                                double* sums, int threads) {
  const auto all = pieces(n, count);
  std::vector<double> partial(all.size());
  parallel_tasks(static_cast<int64_t>(all.size()), 4 * total(n, count), threads, [&](int64_t i) {
    const Piece& p = all[i];
    partial[i] = rms(squares[p.tensor] + p.begin, p.end - p.begin, static_cast<float>(accumulations));
  });
  std::memset(sums, 0, static_cast<size_t>(count) * sizeof(double));
  for (size_t i = 0; i < all.size(); ++i) sums[all[i].tensor] += partial[i];
}
