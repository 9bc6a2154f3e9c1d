// Ones in a bit mask: 1/8 byte read per weight.
#include "parallel.h"
#include "pecker_cpu.h"

#include <atomic>
#include <cstring>

namespace {

int64_t popcount_scalar(const uint8_t* bits, int64_t n) {
  int64_t total = 0, i = 0;
  for (; i + 8 <= n; i += 8) {
    uint64_t word;
    std::memcpy(&word, bits + i, 8);
    total += __builtin_popcountll(word);
  }
  for (; i < n; ++i) total += __builtin_popcount(bits[i]);
  return total;
}

#ifdef PECKER_X86
// Two table look-ups of half a byte each (Muła, Kurz, Lemire, "Faster population counts using AVX2 instructions").
PECKER_AVX2 int64_t popcount_avx2(const uint8_t* bits, int64_t n) {
  const __m256i table = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const __m256i low = _mm256_set1_epi8(0x0f);
  __m256i sums = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bits + i));
    const __m256i a = _mm256_shuffle_epi8(table, _mm256_and_si256(v, low));
    const __m256i b = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(v, 4), low));
    sums = _mm256_add_epi64(sums, _mm256_sad_epu8(_mm256_add_epi8(a, b), _mm256_setzero_si256()));
  }
  int64_t lanes[4];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), sums);
  return lanes[0] + lanes[1] + lanes[2] + lanes[3] + popcount_scalar(bits + i, n - i);
}

PECKER_AVX512 int64_t popcount_avx512(const uint8_t* bits, int64_t n) {
  const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const __m512i low = _mm512_set1_epi8(0x0f);
  __m512i sums = _mm512_setzero_si512();
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    const __m512i v = _mm512_loadu_si512(bits + i);
    const __m512i a = _mm512_shuffle_epi8(table, _mm512_and_si512(v, low));
    const __m512i b = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(v, 4), low));
    sums = _mm512_add_epi64(sums, _mm512_sad_epu8(_mm512_add_epi8(a, b), _mm512_setzero_si512()));
  }
  return _mm512_reduce_add_epi64(sums) + popcount_scalar(bits + i, n - i);
}
#endif

}  // namespace

int64_t pecker::popcount(const uint8_t* bits, int64_t n) {
#ifdef PECKER_X86
  if (pecker::level() == 2) return popcount_avx512(bits, n);
  if (pecker::level() == 1) return popcount_avx2(bits, n);
#endif
  return popcount_scalar(bits, n);
}

PECKER_API int64_t pecker_popcount(const uint8_t* bits, int64_t n_bytes, int threads) {
  std::atomic<int64_t> total{0};
  pecker::parallel_for(n_bytes, 64, n_bytes, threads,
                       [&](int64_t begin, int64_t end) { total += pecker::popcount(bits + begin, end - begin); });
  return total;
}
