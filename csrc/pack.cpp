// Bytes -> bits: 1 byte read and 1/8 written per weight.
#include "parallel.h"
#include "pecker_cpu.h"

#include <cstring>

namespace {

// n need not be a multiple of 8: the last byte is padded with zeros.
void pack_scalar(const uint8_t* bytes, int64_t n, uint8_t* bits) {
  for (int64_t i = 0; i < n; i += 8) {
    const int64_t m = n - i < 8 ? n - i : 8;
    uint8_t out = 0;
    for (int64_t j = 0; j < m; ++j) out |= static_cast<uint8_t>((bytes[i + j] != 0) << j);
    bits[i >> 3] = out;
  }
}

#ifdef PECKER_X86
PECKER_AVX2 void pack_avx2(const uint8_t* bytes, int64_t n, uint8_t* bits) {
  const __m256i zero = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + i));
    const uint32_t word = ~static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(v, zero)));
    std::memcpy(bits + (i >> 3), &word, 4);
  }
  pack_scalar(bytes + i, n - i, bits + (i >> 3));
}

PECKER_AVX512 void pack_avx512(const uint8_t* bytes, int64_t n, uint8_t* bits) {
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    const __m512i v = _mm512_loadu_si512(bytes + i);
    const uint64_t word = _mm512_test_epi8_mask(v, v);
    std::memcpy(bits + (i >> 3), &word, 8);
  }
  pack_scalar(bytes + i, n - i, bits + (i >> 3));
}
#endif

void pack(const uint8_t* bytes, int64_t n, uint8_t* bits) {
#ifdef PECKER_X86
  if (pecker::level() == 2) return pack_avx512(bytes, n, bits);
  if (pecker::level() == 1) return pack_avx2(bytes, n, bits);
#endif
  pack_scalar(bytes, n, bits);
}

}  // namespace

PECKER_API void pecker_pack(const uint8_t* bytes, int64_t n, uint8_t* bits, int threads) {
  pecker::parallel_for(n, 512, n, threads,
                       [=](int64_t begin, int64_t end) { pack(bytes + begin, end - begin, bits + (begin >> 3)); });
}
