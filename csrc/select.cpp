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

PECKER_INLINE void histogram_body(uint32_t (*bins)[1 << 11], const uint8_t* values, int64_t n, int shift, uint32_t mask) {
  constexpr int width = 32;
  int64_t i = 0;
  for (; i + width <= n; i += width) {
    uint32_t bin[width];
    std::memcpy(bin, values + 4 * i, sizeof bin);
    for (int j = 0; j < width; ++j) bin[j] = ((bin[j] & pecker::magnitude_bits) >> shift) & mask;
    uint32_t differ = 0;
    for (int j = 0; j < width; ++j) differ |= bin[j] ^ bin[0];
    if (!differ) {
      bins[0][bin[0]] += width;
      continue;
    }
    for (int j = 0; j < width; j += 4) {
      ++bins[0][bin[j]];
      ++bins[1][bin[j + 1]];
      ++bins[2][bin[j + 2]];
      ++bins[3][bin[j + 3]];
    }
  }
  for (; i < n; ++i) {
    uint32_t raw;
    std::memcpy(&raw, values + 4 * i, 4);
    ++bins[i & 3][((raw & pecker::magnitude_bits) >> shift) & mask];
  }
}
PECKER_AT_EACH_LEVEL(void, histogram, histogram_body,
                     (uint32_t(*bins)[1 << 11], const uint8_t* values, int64_t n, int shift, uint32_t mask),
                     (bins, values, n, shift, mask))

PECKER_INLINE uint8_t faults_body(const float* values, int64_t n, bool magnitude) {
  uint32_t largest = 0, largest_signed = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t raw;
    std::memcpy(&raw, values + i, 4);
    const uint32_t key = raw & pecker::magnitude_bits;
    largest = largest > key ? largest : key;
    largest_signed = largest_signed > raw ? largest_signed : raw;
  }
  const bool below_zero = !magnitude && largest_signed > pecker::sign_bit;  // -0.0 is the sign bit alone
  return static_cast<uint8_t>((largest >= pecker::infinity_bits ? pecker::not_finite : 0) |
                              (below_zero ? pecker::negative : 0));
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
