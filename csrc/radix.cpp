// The three digit histograms of a radix select. The first pass reads every value (4 bytes); the second reads them again, packs the
// values of the chosen bin into a pool and counts their next digit; the third reads the pool. Without a pool (a bin too large to be
// worth a copy) the third pass reads every value once more.
#include "select.h"

namespace {

using namespace pecker;

int64_t match_scalar(const float* values, int64_t n, int shift, uint32_t prefix, uint32_t* out) {
  int64_t found = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t key = bits_of(values[i]) & magnitude_bits;
    out[found] = key;
    found += (key >> shift) == prefix;
  }
  return found;
}

#ifdef PECKER_X86
// For each set of 8 lanes, their indices packed to the front, one per byte.
struct Packing {
  uint64_t lanes[256];
  uint8_t count[256];
};

constexpr Packing packing() {
  Packing p{};
  for (unsigned set = 0; set < 256; ++set)
    for (uint64_t lane = 0; lane < 8; ++lane)
      if ((set >> lane) & 1) p.lanes[set] |= lane << (8 * p.count[set]++);
  return p;
}
constexpr Packing packed = packing();

// Branch-free: `out` has room for 8 more.
PECKER_AVX2 int64_t match_avx2(const float* values, int64_t n, int shift, uint32_t prefix, uint32_t* out) {
  const __m256i low = _mm256_set1_epi32(0x7fffffff), wanted = _mm256_set1_epi32(static_cast<int32_t>(prefix));
  const __m128i by = _mm_cvtsi32_si128(shift);
  int64_t i = 0, found = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256i key = _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + i)), low);
    const __m256i hit = _mm256_cmpeq_epi32(_mm256_srl_epi32(key, by), wanted);
    const int set = _mm256_movemask_ps(_mm256_castsi256_ps(hit));
    const __m128i lanes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed.lanes + set));
    const __m256i front = _mm256_permutevar8x32_epi32(key, _mm256_cvtepu8_epi32(lanes));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + found), front);
    found += packed.count[set];
  }
  return found + match_scalar(values + i, n - i, shift, prefix, out + found);
}

// Compressed in a register and stored whole: vpcompressd to memory is microcoded on Zen 4. `out` has room for 16 more.
PECKER_AVX512 int64_t match_avx512(const float* values, int64_t n, int shift, uint32_t prefix, uint32_t* out) {
  const __m512i low = _mm512_set1_epi32(0x7fffffff), wanted = _mm512_set1_epi32(static_cast<int32_t>(prefix));
  const __m128i by = _mm_cvtsi32_si128(shift);
  int64_t i = 0, found = 0;
  for (; i + 16 <= n; i += 16) {
    const __m512i key = _mm512_and_si512(_mm512_loadu_si512(values + i), low);
    const __mmask16 hit = _mm512_cmpeq_epi32_mask(_mm512_srl_epi32(key, by), wanted);
    _mm512_storeu_si512(out + found, _mm512_maskz_compress_epi32(hit, key));
    found += __builtin_popcount(hit);
  }
  return found + match_scalar(values + i, n - i, shift, prefix, out + found);
}
#endif

int64_t match(const float* values, int64_t n, int shift, uint32_t prefix, uint32_t* out) {
#ifdef PECKER_X86
  if (level() == 2) return match_avx512(values, n, shift, prefix, out);
  if (level() == 1) return match_avx2(values, n, shift, prefix, out);
#endif
  return match_scalar(values, n, shift, prefix, out);
}

}  // namespace

PECKER_API void pecker_census(const void* const* data, const int64_t* n, const int32_t* kinds, int64_t count, int magnitude,
                              int64_t* counts, uint8_t* faults_of, int threads) {
  parallel_groups(pieces(n, count), 4 * total(n, count), threads, [=](const Piece* first, const Piece* last) {
    Histogram histogram;
    float block[block_size];
    for (const Piece* p = first; p != last; ++p)
      for (int64_t begin = p->begin; begin < p->end; begin += block_size) {
        const int64_t m = std::min(block_size, p->end - begin);
        const float* values = widened(data[p->tensor], kinds[p->tensor], begin, m, block);
        histogram.add(values, m, 20, 0x7ff);
        add_to(faults_of + p->tensor, faults(values, m, magnitude));
      }
    histogram.flush(counts, 1 << 11);
  });
}

PECKER_API int64_t pecker_digit(const void* const* data, const int64_t* n, const int32_t* kinds, int64_t count, int shift,
                                uint32_t prefix, int64_t* counts, uint32_t* pool, int64_t room, int threads) {
  int64_t seen = 0;
  parallel_groups(pieces(n, count), 4 * total(n, count), threads, [&](const Piece* first, const Piece* last) {
    Histogram histogram;
    float block[block_size];
    uint32_t found[block_size + 16];
    for (const Piece* p = first; p != last; ++p)
      for (int64_t begin = p->begin; begin < p->end; begin += block_size) {
        const int64_t m = std::min(block_size, p->end - begin);
        const int64_t hits = match(widened(data[p->tensor], kinds[p->tensor], begin, m, block), m, shift + 10, prefix, found);
        histogram.add(found, hits, shift, 0x3ff);
        const int64_t at = __atomic_fetch_add(&seen, hits, __ATOMIC_RELAXED);
        if (pool && at + hits <= room) std::memcpy(pool + at, found, static_cast<size_t>(hits) * 4);
      }
    histogram.flush(counts, 1 << 10);
  });
  return seen;
}
