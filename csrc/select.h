// What the kernels of scoring and selection share. A score is read as its key: the low 31 bits of its float32 value, which order like
// |score|; 16-bit scores are widened first, a block at a time, so the kernels themselves know float32 only.
#pragma once

#include "parallel.h"
#include "pecker_cpu.h"

#include <cstring>

#define PECKER_INLINE inline __attribute__((always_inline))

namespace pecker {

constexpr uint32_t magnitude_bits = 0x7fffffff, sign_bit = 0x80000000, infinity_bits = 0x7f800000;
constexpr int64_t piece_size = 1 << 16;   // values; also the fixed length of a partial sum
constexpr int64_t block_size = 1 << 11;   // values that are widened, computed and counted while they lie in the first-level cache
constexpr uint8_t not_finite = 1, negative = 2;
enum Kind : int32_t { float32 = 0, bfloat16 = 1, float16 = 2 };

// data[i] points to n[i] values of kinds[i].
struct Tensors {
  const void* const* data;
  const int64_t* n;
  const int32_t* kinds;
  int64_t count;
};

// A stretch of one tensor. Borders are multiples of piece_size, so they fall between the bytes of a mask.
struct Piece {
  int64_t tensor, begin, end;
};

std::vector<Piece> pieces(const int64_t* n, int64_t count);
int64_t total(const int64_t* n, int64_t count);

// The values [begin, begin + n) as float32: in place, or widened into `block`.
const float* widened(const void* data, int32_t kind, int64_t begin, int64_t n, float* block);

// Four counters for every bin: runs of equal values would otherwise wait for their own last store.
struct Histogram {
  uint32_t bins[4][1 << 11] = {};

  // Adds ((raw >> shift) & mask) of n values (float32 or keys), which leaves the sign out; the caller stays below 2^32 values between
  // two flushes.
  void add(const void* values, int64_t n, int shift, uint32_t mask);
  void flush(int64_t* counts, int64_t length);
};

// not_finite | negative; a negative value is a fault only where the score is not read by its magnitude.
uint8_t faults(const float* values, int64_t n, bool magnitude);

// work(first piece, last piece) is called on consecutive groups, few enough that a table per group costs nothing.
template <typename Work>
void parallel_groups(const std::vector<Piece>& all, int64_t n_bytes, int threads, const Work& work) {
  const int64_t n = static_cast<int64_t>(all.size());
  const int64_t useful = useful_threads(n_bytes, threads);
  // 2^14 pieces are 2^30 values: below what a counter of 32 bits holds.
  const int64_t step = std::max<int64_t>(1, std::min<int64_t>(1 << 14, useful == 1 ? n : (n + 8 * useful - 1) / (8 * useful)));
  parallel_tasks((n + step - 1) / step, n_bytes, threads, [&](int64_t i) {
    work(all.data() + i * step, all.data() + std::min((i + 1) * step, n));
  });
}

inline void add_to(int64_t* counter, int64_t value) { __atomic_fetch_add(counter, value, __ATOMIC_RELAXED); }
inline void add_to(uint8_t* flags, uint8_t value) {
  if (value) __atomic_fetch_or(flags, value, __ATOMIC_RELAXED);
}

inline uint32_t bits_of(float value) {
  uint32_t raw;
  std::memcpy(&raw, &value, 4);
  return raw;
}

}  // namespace pecker

// Compiles an always-inline BODY once for each instruction set, where the compiler vectorises its plain loops, and picks one at run
// time: NAME(PARAMETERS) calls BODY(ARGUMENTS). No operation is contracted (see CMakeLists.txt), so all levels agree to the bit.
#ifdef PECKER_X86
#define PECKER_AT_EACH_LEVEL(RESULT, NAME, BODY, PARAMETERS, ARGUMENTS) \
  RESULT NAME##_scalar PARAMETERS { return BODY ARGUMENTS; }            \
  PECKER_AVX2 RESULT NAME##_avx2 PARAMETERS { return BODY ARGUMENTS; }  \
  PECKER_AVX512 RESULT NAME##_avx512 PARAMETERS { return BODY ARGUMENTS; } \
  RESULT NAME PARAMETERS {                                              \
    if (pecker::level() == 2) return NAME##_avx512 ARGUMENTS;           \
    if (pecker::level() == 1) return NAME##_avx2 ARGUMENTS;             \
    return NAME##_scalar ARGUMENTS;                                     \
  }
#else
#define PECKER_AT_EACH_LEVEL(RESULT, NAME, BODY, PARAMETERS, ARGUMENTS) \
  RESULT NAME PARAMETERS { return BODY ARGUMENTS; }
#endif
