// t ⊙ m in place: at most one read and one write of the tensor and 1/8 byte of mask per weight. Words of 64 ones are not touched, words of
// 64 zeros are written without being read, so clustered masks move less.
#include "parallel.h"
#include "pecker_cpu.h"

#include <cstring>

namespace {

template <typename T>
void some_scalar(T* data, int64_t n, const uint8_t* bits) {
  for (int64_t i = 0; i < n; ++i)
    if (!((bits[i >> 3] >> (i & 7)) & 1)) data[i] = 0;
}

template <typename T>
void word_scalar(T* data, uint64_t word) {
  for (int i = 0; i < 64; ++i)
    if (!((word >> i) & 1)) data[i] = 0;
}

#ifdef PECKER_X86
PECKER_AVX2 inline void keep_avx2(void* at, __m256i hit) {
  const __m256i v = _mm256_loadu_si256(static_cast<const __m256i*>(at));
  _mm256_storeu_si256(static_cast<__m256i*>(at), _mm256_and_si256(v, hit));
}

PECKER_AVX2 void word_avx2(uint16_t* data, uint64_t word) {
  const __m256i bit = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384,  //
                                        static_cast<int16_t>(0x8000));
  for (int i = 0; i < 64; i += 16) {
    const __m256i v = _mm256_set1_epi16(static_cast<int16_t>(word >> i));
    keep_avx2(data + i, _mm256_cmpeq_epi16(_mm256_and_si256(v, bit), bit));
  }
}

PECKER_AVX2 void word_avx2(uint32_t* data, uint64_t word) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  for (int i = 0; i < 64; i += 8) {
    const __m256i v = _mm256_set1_epi32(static_cast<int32_t>((word >> i) & 0xff));
    keep_avx2(data + i, _mm256_cmpeq_epi32(_mm256_and_si256(v, bit), bit));
  }
}

PECKER_AVX2 void word_avx2(uint64_t* data, uint64_t word) {
  const __m256i bit = _mm256_setr_epi64x(1, 2, 4, 8);
  for (int i = 0; i < 64; i += 4) {
    const __m256i v = _mm256_set1_epi64x(static_cast<int64_t>((word >> i) & 0xf));
    keep_avx2(data + i, _mm256_cmpeq_epi64(_mm256_and_si256(v, bit), bit));
  }
}

PECKER_AVX512 void word_avx512(uint16_t* data, uint64_t word) {
  for (int i = 0; i < 64; i += 32)
    _mm512_storeu_si512(data + i, _mm512_maskz_loadu_epi16(static_cast<__mmask32>(word >> i), data + i));
}

PECKER_AVX512 void word_avx512(uint32_t* data, uint64_t word) {
  for (int i = 0; i < 64; i += 16)
    _mm512_storeu_si512(data + i, _mm512_maskz_loadu_epi32(static_cast<__mmask16>(word >> i), data + i));
}

PECKER_AVX512 void word_avx512(uint64_t* data, uint64_t word) {
  for (int i = 0; i < 64; i += 8)
    _mm512_storeu_si512(data + i, _mm512_maskz_loadu_epi64(static_cast<__mmask8>(word >> i), data + i));
}
#endif

template <typename T, typename Word>
void sweep(T* data, int64_t n, const uint8_t* bits, const Word& some) {
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    uint64_t word;
    std::memcpy(&word, bits + (i >> 3), 8);
    if (word == ~uint64_t{0}) continue;
    if (word == 0)
      std::memset(data + i, 0, 64 * sizeof(T));
    else
      some(data + i, word);
  }
  some_scalar(data + i, n - i, bits + (i >> 3));
}

template <typename T>
void apply(T* data, int64_t n, const uint8_t* bits) {
#ifdef PECKER_X86
  if (pecker::level() == 2) return sweep(data, n, bits, [](T* at, uint64_t word) { word_avx512(at, word); });
  if (pecker::level() == 1) return sweep(data, n, bits, [](T* at, uint64_t word) { word_avx2(at, word); });
#endif
  sweep(data, n, bits, [](T* at, uint64_t word) { word_scalar(at, word); });
}

template <typename T>
void apply_all(void* data, int64_t n, const uint8_t* bits, int threads) {
  T* const at = static_cast<T*>(data);
  pecker::parallel_for(n, 512, n * static_cast<int64_t>(sizeof(T)), threads, [=](int64_t begin, int64_t end) {
    apply(at + begin, end - begin, bits + (begin >> 3));
  });
}

}  // namespace

PECKER_API int pecker_apply(void* data, int64_t n, int element_size, const uint8_t* bits, int threads) {
  switch (element_size) {
    case 2: apply_all<uint16_t>(data, n, bits, threads); return 0;
    case 4: apply_all<uint32_t>(data, n, bits, threads); return 0;
    case 8: apply_all<uint64_t>(data, n, bits, threads); return 0;
    default: return -1;
  }
}
