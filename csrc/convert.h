// 16-bit floats to float32 and back, n values at a time. Included once for each instruction level (see adam.cpp).

static inline float bits_to_float(uint32_t x) {
  float f;
  std::memcpy(&f, &x, 4);
  return f;
}

static inline uint32_t float_to_bits(float f) {
  uint32_t x;
  std::memcpy(&x, &f, 4);
  return x;
}

static inline float from_bf16(uint16_t h) { return bits_to_float(static_cast<uint32_t>(h) << 16); }

// Round to nearest even; a NaN stays one.
static inline uint16_t to_bf16(float f) {
  const uint32_t x = float_to_bits(f);
  const uint32_t rounded = (x + 0x7fff + ((x >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((x & 0x7fffffff) > 0x7f800000 ? (x >> 16) | 0x40 : rounded);
}

static inline float from_f16(uint16_t h) {
#if PECKER_LEVEL >= 1
  return _cvtsh_ss(h);
#else
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 0x3ff;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000 | fraction << 13);
  if (exponent) return bits_to_float(sign | (exponent + 112) << 23 | fraction << 13);
  const float magnitude = static_cast<float>(fraction) * (1.0f / 16777216.0f);
  return sign ? -magnitude : magnitude;
#endif
}

static inline uint16_t to_f16(float f) {
#if PECKER_LEVEL >= 1
  return static_cast<uint16_t>(_cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT));
#else
  const uint32_t x = float_to_bits(f), sign = (x >> 16) & 0x8000, magnitude = x & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 puts the rounding where float32 does it
    const uint32_t shifted = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000;
    return static_cast<uint16_t>(sign | shifted);
  }
  return static_cast<uint16_t>(sign | ((magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13));
#endif
}

template <typename T>
static inline void widen(const void* from, int64_t dtype, int64_t at, int64_t n, T* to) {
  switch (dtype) {
    case kFloat32: {
      const float* f = static_cast<const float*>(from) + at;
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(f[i]);
      return;
    }
    case kFloat64: {
      const double* f = static_cast<const double*>(from) + at;
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(f[i]);
      return;
    }
    case kBFloat16: {
      const uint16_t* h = static_cast<const uint16_t*>(from) + at;
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(from_bf16(h[i]));
      return;
    }
    default: {
      const uint16_t* h = static_cast<const uint16_t*>(from) + at;
      int64_t i = 0;
#if PECKER_LEVEL >= 1
      if constexpr (sizeof(T) == 4)
        for (; i + 8 <= n; i += 8)
          _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(h + i))));
#endif
      for (; i < n; ++i) to[i] = static_cast<T>(from_f16(h[i]));
    }
  }
}
