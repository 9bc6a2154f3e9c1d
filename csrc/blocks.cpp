// Sums of scores over the blocks of a matrix (4 bytes read per weight), and a keep-set of blocks as packed bits (1/8 byte written).
#include "select.h"

namespace {

using namespace pecker;

// Sixteen partial sums at every level, so that all levels add in the same order.
PECKER_INLINE double sum_body(const float* values, int64_t n, bool magnitude) {
  double lanes[16] = {};
  int64_t i = 0;
  if (magnitude) {
    for (; i + 16 <= n; i += 16)
      for (int j = 0; j < 16; ++j) lanes[j] += static_cast<double>(__builtin_fabsf(values[i + j]));
    for (int j = 0; i + j < n; ++j) lanes[j] += static_cast<double>(__builtin_fabsf(values[i + j]));
  } else {
    for (; i + 16 <= n; i += 16)
      for (int j = 0; j < 16; ++j) lanes[j] += static_cast<double>(values[i + j]);
    for (int j = 0; i + j < n; ++j) lanes[j] += static_cast<double>(values[i + j]);
  }
  double sum = 0;
  for (double lane : lanes) sum += lane;
  return sum;
}
PECKER_AT_EACH_LEVEL(double, sum, sum_body, (const float* values, int64_t n, bool magnitude), (values, n, magnitude))

struct Scores {
  const void* data;
  int32_t kind;
  bool magnitude;

  double sum_of(int64_t begin, int64_t end) const {
    float block[block_size];
    double total = 0;
    for (; begin < end; begin += block_size) {
      const int64_t m = std::min(block_size, end - begin);
      total += sum(widened(data, kind, begin, m, block), m, magnitude);
    }
    return total;
  }
};

// Sets the bits [begin, end) of a zeroed array.
void set_bits(uint8_t* bits, int64_t begin, int64_t end) {
  const int64_t first = begin >> 3, last = end >> 3;
  const unsigned low = 0xffu << (begin & 7), high = (1u << (end & 7)) - 1;
  if (first == last) {
    bits[first] |= static_cast<uint8_t>(low & high);
    return;
  }
  bits[first] |= static_cast<uint8_t>(low);
  std::memset(bits + first + 1, 0xff, static_cast<size_t>(last - first - 1));
  if (high) bits[last] |= static_cast<uint8_t>(high);
}

}  // namespace

PECKER_API void pecker_block_sums(const void* data, int32_t kind, int64_t rows, int64_t columns, int64_t height,
                                  int64_t width, int magnitude, double* sums, int threads) {
  const Scores scores{data, kind, magnitude != 0};
  const int64_t down = (rows + height - 1) / height, across = (columns + width - 1) / width, n_bytes = 4 * rows * columns;
  if (down * across == 1) {
    // One block: pieces of a fixed length are summed side by side, then added in order.
    const int64_t n = rows * columns;
    const auto all = pieces(&n, 1);
    std::vector<double> partial(all.size());
    parallel_tasks(static_cast<int64_t>(all.size()), n_bytes, threads,
                   [&](int64_t i) { partial[i] = scores.sum_of(all[i].begin, all[i].end); });
    *sums = 0;
    for (double part : partial) *sums += part;
    return;
  }
  parallel_for(down, 1, n_bytes, threads, [=](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      double* const band = sums + i * across;
      for (int64_t j = 0; j < across; ++j) band[j] = 0;
      for (int64_t row = i * height; row < std::min((i + 1) * height, rows); ++row)
        for (int64_t j = 0; j < across; ++j)
          band[j] += scores.sum_of(row * columns + j * width, row * columns + std::min((j + 1) * width, columns));
    }
  });
}

PECKER_API void pecker_block_bits(const uint8_t* kept, int64_t rows, int64_t columns, int64_t height, int64_t width,
                                  uint8_t* bits, int threads) {
  const int64_t n = rows * columns, across = (columns + width - 1) / width;
  // Eight rows fill whole bytes, so no two tasks write the same one.
  parallel_for(rows, 8, n / 8, threads, [=](int64_t first, int64_t last) {
    const int64_t from = (first * columns) >> 3, to = (last * columns + 7) >> 3;
    std::memset(bits + from, 0, static_cast<size_t>(to - from));
    for (int64_t row = first; row < last; ++row) {
      const uint8_t* const band = kept + row / height * across;
      for (int64_t j = 0; j < across;) {
        int64_t next = j + 1;
        if (band[j]) {
          while (next < across && band[next]) ++next;
          set_bits(bits, row * columns + j * width, row * columns + std::min(next * width, columns));
        }
        j = next;
      }
    }
  });
}
