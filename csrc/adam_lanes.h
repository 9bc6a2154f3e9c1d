// Which values a step reads and writes: lanes listed from the bits of a mask, gathered, scattered, gradients put together; for one
// instruction level (see adam_body.h).

// Weights that are stepped on together: those at `at` + lanes[0 .. count), or without lanes the `count` weights from `at`.
// `lane` is the position of the first in compact state.
struct Stretch {
  int64_t at, count, lane;
  const uint16_t* lanes;
};

// lanes ← first + positions of the ones in words, ascending; returns their number. There is room for a register behind the last. Whole
// registers are stored whatever the number of ones: no branch that could mispredict.
static int64_t list_lanes(const uint64_t* words, int64_t n_words, int64_t first, bool sparse, uint16_t* lanes) {
  uint16_t* to = lanes;
  if (sparse) {
    for (int64_t w = 0; w < n_words; ++w)
      for (uint64_t word = words[w]; word; word &= word - 1)
        *to++ = static_cast<uint16_t>(first + 64 * w + __builtin_ctzll(word));
    return to - lanes;
  }
#if PECKER_LEVEL == 2
  alignas(64) uint8_t iota[64];
  for (int i = 0; i < 64; ++i) iota[i] = static_cast<uint8_t>(i);
  const __m512i places = _mm512_load_si512(iota);
  for (int64_t w = 0; w < n_words; ++w) {
    const __m512i at = _mm512_maskz_compress_epi8(words[w], places);
    const __m512i base = _mm512_set1_epi16(static_cast<int16_t>(first + 64 * w));
    const int64_t count = __builtin_popcountll(words[w]);
    const __m512i low = _mm512_add_epi16(base, _mm512_cvtepu8_epi16(_mm512_castsi512_si256(at)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(low));
    if (count > 16) _mm512_storeu_si512(to, low);
    if (count > 32)
      _mm512_storeu_si512(to + 32, _mm512_add_epi16(base, _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(at, 1))));
    to += count;
  }
#else
  for (int64_t w = 0; w < n_words; ++w) {
    uint64_t word = words[w];
    for (int i = 0; i < 8; ++i, word >>= 8) {
      const PositionsOfByte& positions = kPositions.of[word & 255];
      for (int j = 0; j < 8; ++j) to[j] = static_cast<uint16_t>(positions.at[j] + first + 64 * w + 8 * i);
      to += positions.count;
    }
  }
#endif
  return to - lanes;
}

// Ask for the cache lines of weights that are worked on soon: those of the lanes, or all n from `at` where most are needed.
static void prefetch(const void* data, int64_t size, int64_t base, const uint16_t* lanes, int64_t count, int64_t at, int64_t n) {
  const char* const from = static_cast<const char*>(data);
  if (8 * count < n)
    for (int64_t i = 0; i < count; ++i) __builtin_prefetch(from + (base + lanes[i]) * size, 0, 3);
  else
    for (int64_t i = 0; i < n * size; i += 64) __builtin_prefetch(from + at * size + i, 0, 3);
}

// The kept values of a stretch, closed up. Only they are read.
template <typename T>
static void gather(const Stretch& s, const void* from, int64_t dtype, T* to) {
  const auto each = [&](const auto* at, const auto& load) {
    at += s.at;
#pragma GCC unroll 8
    for (int64_t i = 0; i < s.count; ++i) to[i] = static_cast<T>(load(at[s.lanes[i]]));
  };
  switch (dtype) {
    case kFloat32: return each(static_cast<const float*>(from), [](float x) { return x; });
    case kFloat64: return each(static_cast<const double*>(from), [](double x) { return x; });
    case kBFloat16: return each(static_cast<const uint16_t*>(from), [](uint16_t x) { return from_bf16(x); });
    default: return each(static_cast<const uint16_t*>(from), [](uint16_t x) { return from_f16(x); });
  }
}

// The way back; no other weight is written.
template <typename T>
static void scatter(const Stretch& s, const T* from, T* to) {
  to += s.at;
#pragma GCC unroll 8
  for (int64_t i = 0; i < s.count; ++i) to[s.lanes[i]] = from[i];
}

// words ← the mask of weights [at, at + n), `at` a multiple of 64; zero behind the end of the tensor.
static int64_t read_words(const uint8_t* bits, int64_t at, int64_t n, uint64_t* words) {
  const int64_t n_words = (n + 63) / 64;
  words[n_words - 1] = 0;
  std::memcpy(words, bits + at / 8, (n + 7) / 8);
  return n_words;
}

// One task's buffers, with room behind the last value for a whole register.
template <typename T>
struct Buffers {
  alignas(64) T p[kBlock + 16], g[kBlock + 16], m[kBlock + 16], v[kBlock + 16], e[kBlock + 16];
  alignas(64) uint16_t half[kBlock];
};

// Whether the gradient of a stretch is one run of numbers that can be stepped on where it lies.
template <typename T>
static bool gradient_in_place(const AdamTensor& t, const Coefficients<T>& c) {
  return t.grad && t.grad_dtype == (sizeof(T) == 4 ? kFloat32 : kFloat64) && !(t.masked_grad && t.whole) && c.scale == 1;
}

// to += masked_grad of the kept weights, one after the other from `rank`.
template <typename T>
static void add_compact(const AdamTensor& t, const uint64_t* words, int64_t n_words, int64_t rank, const Coefficients<T>& c, T* to) {
  constexpr int64_t own = sizeof(T) == 4 ? kFloat32 : kFloat64;
  const bool scaled = c.scale != 1;
  for (int64_t w = 0; w < n_words; ++w) {
    uint64_t word = words[w];
    const int64_t count = __builtin_popcountll(word);
    T wide[64];
    const T* from = wide;
    if (t.masked_grad_dtype == own)
      from = static_cast<const T*>(t.masked_grad) + rank;
    else
      widen(t.masked_grad, t.masked_grad_dtype, rank, count, wide);
    rank += count;
#if PECKER_LEVEL == 2
    if constexpr (sizeof(T) == 4) {
      for (int64_t i = 64 * w; word; i += 16, word >>= 16) {
        const __mmask16 k = static_cast<__mmask16>(word);
        const int ones = __builtin_popcount(k);
        __m512 more = _mm512_maskz_expand_ps(k, _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << ones) - 1), from));
        if (scaled) more = _mm512_div_ps(more, _mm512_set1_ps(c.scale));
        _mm512_mask_storeu_ps(to + i, k, _mm512_add_ps(_mm512_maskz_loadu_ps(k, to + i), more));
        from += ones;
      }
      continue;
    }
#endif
    for (; word; word &= word - 1, ++from) to[64 * w + __builtin_ctzll(word)] += scaled ? *from / c.scale : *from;
  }
}

// The gradient of a stretch: where it lies, or put into `to`.
template <typename T>
static const T* gradient(const AdamTensor& t, const Stretch& s, const Coefficients<T>& c, T* to) {
  const bool extra = t.masked_grad && t.whole;
  if ((!s.lanes || t.grad_compact) && gradient_in_place(t, c))
    return static_cast<const T*>(t.grad) + (t.grad_compact ? s.lane : s.at);
  if (!t.grad)
    std::fill(to, to + s.count, T{0});
  else if (t.grad_compact)
    widen(t.grad, t.grad_dtype, s.lane, s.count, to);
  else if (s.lanes)
    gather(s, t.grad, t.grad_dtype, to);
  else
    widen(t.grad, t.grad_dtype, s.at, s.count, to);
  const bool scaled = c.scale != 1;
  if (scaled)
    for (int64_t i = 0; i < s.count; ++i) to[i] /= c.scale;
  if (!extra) return to;
  if (!t.bits) {
    alignas(64) T more[kBlock];
    widen(t.masked_grad, t.masked_grad_dtype, s.at, s.count, more);
    for (int64_t i = 0; i < s.count; ++i) to[i] += scaled ? more[i] / c.scale : more[i];
    return to;
  }
  uint64_t words[kBlock / 64];
  const int64_t n_words = read_words(t.bits, s.at, s.count, words);
  if (t.masked_grad_compact) {
    add_compact(t, words, n_words, t.rank[s.at / kBlock], c, to);
    return to;
  }
  for (int64_t w = 0; w < n_words; ++w) {
    uint64_t word = words[w];
#if PECKER_LEVEL == 2
    if constexpr (sizeof(T) == 4)
      if (t.masked_grad_dtype == kFloat32) {
        const float* const from = static_cast<const float*>(t.masked_grad) + s.at;
        for (int64_t i = 64 * w; word; i += 16, word >>= 16) {
          const __mmask16 k = static_cast<__mmask16>(word);
          __m512 more = _mm512_maskz_loadu_ps(k, from + i);
          if (scaled) more = _mm512_div_ps(more, _mm512_set1_ps(c.scale));
          _mm512_mask_storeu_ps(to + i, k, _mm512_add_ps(_mm512_maskz_loadu_ps(k, to + i), more));
        }
        continue;
      }
#endif
    for (; word; word &= word - 1) {
      const int64_t i = 64 * w + __builtin_ctzll(word);
      T more;
      widen(t.masked_grad, t.masked_grad_dtype, s.at + i, 1, &more);
      to[i] += scaled ? more / c.scale : more;
    }
  }
  return to;
}

// The values a stretch starts from: where they lie, or gathered into `to`. Null where the state is the truth (see step_stretch).
template <typename T>
static T* weights(const AdamTensor& t, const Stretch& s, T* to) {
  if (t.master) return nullptr;
  if (!s.lanes) {
    if (t.param_dtype == (sizeof(T) == 4 ? kFloat32 : kFloat64)) return static_cast<T*>(t.param) + s.at;
    widen(t.param, t.param_dtype, s.at, s.count, to);
  } else {
    gather(s, t.param, t.param_dtype, to);
  }
  return to;
}
