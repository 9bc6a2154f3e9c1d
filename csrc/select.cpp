#include "select.h"

namespace {

// IEEE half -> single, exact; NaN keeps its payload and turns quiet, as the instruction does it.
float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, exponent = (half >> 10) & 31, fraction = half & 0x3ff;
  uint32_t raw;
  if (exponent == 31) {
    raw = 0x7f800000 | fraction << 13 | (fraction ? 0x400000 : 0);
  } else if (exponent) {
    raw = (exponent + 112) << 23 | fraction << 13;
  } else {
    const float value = static_cast<float>(fraction) * 0x1p-24f;
    raw = pecker::bits_of(value);
  }
  raw |= sign;
  float out;
  std::memcpy(&out, &raw, 4);
  return out;
}

void widen_half_scalar(const uint16_t* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = half_to_float(from[i]);
}

#ifdef PECKER_X86
PECKER_AVX2 void widen_half_avx2(const uint16_t* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  widen_half_scalar(from + i, n - i, to + i);
}
#endif

void widen_half(const uint16_t* from, int64_t n, float* to) {
#ifdef PECKER_X86
  if (pecker::level() >= 1) return widen_half_avx2(from, n, to);
#endif
  widen_half_scalar(from, n, to);
}

PECKER_INLINE void widen_bfloat_body(const uint16_t* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t raw = static_cast<uint32_t>(from[i]) << 16;
    std::memcpy(to + i, &raw, 4);
  }
}
PECKER_AT_EACH_LEVEL(void, widen_bfloat, widen_bfloat_body, (const uint16_t* from, int64_t n, float* to), (from, n, to))

// The counts are one load and one store a value, so the keys come two to a load and need no vector.
PECKER_INLINE void histogram_body(uint32_t (*bins)[1 << 11], const uint8_t* values, int64_t n, int shift, uint32_t mask) {
  uint32_t first = 0, differ = 0;
  if (n) std::memcpy(&first, values, 4);
  for (int64_t i = 0; i < n; ++i) {
    uint32_t raw;
    std::memcpy(&raw, values + 4 * i, 4);
    differ |= raw ^ first;
  }
  if (!((differ >> shift) & mask)) {
    bins[0][(first >> shift) & mask] += static_cast<uint32_t>(n);
    return;
  }
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    uint64_t pairs[4];
    std::memcpy(pairs, values + 4 * i, sizeof pairs);
    for (int j = 0; j < 4; ++j) {
      ++bins[2 * j & 3][(static_cast<uint32_t>(pairs[j]) >> shift) & mask];
      ++bins[(2 * j + 1) & 3][(pairs[j] >> (32 + shift)) & mask];
    }
  }
  for (; i < n; ++i) {
    uint32_t key;
    std::memcpy(&key, values + 4 * i, 4);
    ++bins[i & 3][(key >> shift) & mask];
  }
}
PECKER_AT_EACH_LEVEL(void, histogram, histogram_body,
                     (uint32_t(*bins)[1 << 11], const uint8_t* values, int64_t n, int shift, uint32_t mask),
                     (bins, values, n, shift, mask))

PECKER_INLINE uint8_t faults_body(const float* values, int64_t n, bool magnitude) {
  int32_t wild = 0, below_zero = 0;
  for (int64_t i = 0; i < n; ++i) {
    int32_t raw;
    std::memcpy(&raw, values + i, 4);
    const int32_t key = raw & static_cast<int32_t>(pecker::magnitude_bits);
    wild |= key >= static_cast<int32_t>(pecker::infinity_bits);
    below_zero |= (raw >> 31) & key;  // nothing left of -0.0, which is the sign bit alone
  }
  return static_cast<uint8_t>((wild ? pecker::not_finite : 0) | (below_zero && !magnitude ? pecker::negative : 0));
}
PECKER_AT_EACH_LEVEL(uint8_t, find_faults, faults_body, (const float* values, int64_t n, bool magnitude),
                     (values, n, magnitude))

}  // namespace

namespace pecker {

std::vector<Piece> pieces(const int64_t* n, int64_t count) {
  std::vector<Piece> all;
  for (int64_t t = 0; t < count; ++t)
    for (int64_t begin = 0; begin < n[t]; begin += piece_size)
      all.push_back({t, begin, std::min(begin + piece_size, n[t])});
  return all;
}

int64_t total(const int64_t* n, int64_t count) {
  int64_t sum = 0;
  for (int64_t t = 0; t < count; ++t) sum += n[t];
  return sum;
}

const float* widened(const void* data, int32_t kind, int64_t begin, int64_t n, float* block) {
  if (kind == float32) return static_cast<const float*>(data) + begin;
  const uint16_t* from = static_cast<const uint16_t*>(data) + begin;
  if (kind == bfloat16)
    widen_bfloat(from, n, block);
  else
    widen_half(from, n, block);
  return block;
}

void Histogram::add(const void* values, int64_t n, int shift, uint32_t mask) {
  histogram(bins, static_cast<const uint8_t*>(values), n, shift, mask);
}

void Histogram::flush(int64_t* counts, int64_t length) {
  for (int64_t i = 0; i < length; ++i) {
    int64_t sum = 0;
    for (auto& row : bins) sum += row[i], row[i] = 0;
    if (sum) add_to(counts + i, sum);
  }
}

uint8_t faults(const float* values, int64_t n, bool magnitude) { return find_faults(values, n, magnitude); }

}  // namespace pecker
