// Bits -> bytes of 0 and 1: 1/8 byte read and 1 written per weight.
#include "parallel.h"
#include "pecker_cpu.h"

#include <cstring>

namespace {

void unpack_scalar(const uint8_t* bits, int64_t n, uint8_t* bytes) {
  for (int64_t i = 0; i < n; ++i) bytes[i] = (bits[i >> 3] >> (i & 7)) & 1;
}

#ifdef PECKER_X86
PECKER_AVX2 void unpack_avx2(const uint8_t* bits, int64_t n, uint8_t* bytes) {
  // Lane j of 32 looks at byte j / 8 of the word; shuffle works inside 128-bit halves, and the word is in both.
  const __m256i which = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1,  //
                                         2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
  const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201ULL));
  const __m256i one = _mm256_set1_epi8(1);
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    int32_t word;
    std::memcpy(&word, bits + (i >> 3), 4);
    const __m256i v = _mm256_shuffle_epi8(_mm256_set1_epi32(word), which);
    const __m256i hit = _mm256_cmpeq_epi8(_mm256_and_si256(v, bit), bit);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes + i), _mm256_and_si256(hit, one));
  }
  unpack_scalar(bits + (i >> 3), n - i, bytes + i);
}

PECKER_AVX512 void unpack_avx512(const uint8_t* bits, int64_t n, uint8_t* bytes) {
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    uint64_t word;
    std::memcpy(&word, bits + (i >> 3), 8);
    _mm512_storeu_si512(bytes + i, _mm512_maskz_set1_epi8(word, 1));
  }
  unpack_scalar(bits + (i >> 3), n - i, bytes + i);
}
#endif

void unpack(const uint8_t* bits, int64_t n, uint8_t* bytes) {
#ifdef PECKER_X86
  if (pecker::level() == 2) return unpack_avx512(bits, n, bytes);
  if (pecker::level() == 1) return unpack_avx2(bits, n, bytes);
#endif
  unpack_scalar(bits, n, bytes);
}

}  // namespace

PECKER_API void pecker_unpack(const uint8_t* bits, int64_t n, uint8_t* bytes, int threads) {
  pecker::parallel_for(n, 512, n, threads,
                       [=](int64_t begin, int64_t end) { unpack(bits + (begin >> 3), end - begin, bytes + begin); });
}
