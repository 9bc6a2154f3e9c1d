// The masked Adam step for one instruction level; adam.cpp includes this once for each, inside a namespace of its own.
//
//   g ← clamp(g / grad_scale + m ⊙ masked_grad / grad_scale, ±clip_value) · grad_factor;  L2: g ← g + wd·p;  decoupled: p ← p·(1 - lr·wd)
//   m ← m + (1-β₁)(g - m);  v ← β₂v + (1-β₂)g²;  p ← p - lr / (1-β₁ᵗ) · m / (√v / √(1-β₂ᵗ) + eps);  e ← e + (1-d)(p - e)
//
// Products are fused into sums exactly where torch's fused kernel fuses them, so the dense step gives the same bits.

#include "convert.h"

#if PECKER_LEVEL >= 1
static inline float fma_(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
static inline double fma_(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
// Without the instruction: the product is exact in double, the sum rounded twice.
static inline float fma_(float a, float b, float c) { return static_cast<float>(static_cast<double>(a) * b + c); }
static inline double fma_(double a, double b, double c) { return a * b + c; }
#endif

template <typename T>
struct Coefficients {
  T clip, factor, decay, lerp, lerp_far, beta2, square, bias2_root, eps, minus_step;
  bool near;  // the new first moment is computed from the old one's side, as torch.lerp does
  int wd;     // 0 none, 1 L2, 2 decoupled
  T ema, scale;
};

template <typename T>
static Coefficients<T> coefficients(const AdamSettings& s, double step) {
  Coefficients<T> c;
  c.clip = static_cast<T>(s.clip_value);
  c.factor = static_cast<T>(s.grad_factor);
  c.wd = s.weight_decay == 0 ? 0 : s.decoupled ? 2 : 1;
  c.decay = static_cast<T>(s.decoupled ? 1 - s.lr * s.weight_decay : s.weight_decay);
  c.lerp = static_cast<T>(1 - s.beta1);
  c.near = c.lerp < static_cast<T>(0.5);
  c.lerp_far = c.lerp - 1;
  c.beta2 = static_cast<T>(s.beta2);
  c.square = static_cast<T>(1 - s.beta2);
  c.bias2_root = static_cast<T>(std::sqrt(1 - std::pow(s.beta2, step)));
  c.eps = static_cast<T>(s.eps);
  c.minus_step = static_cast<T>(-s.lr / (1 - std::pow(s.beta1, step)));
  c.ema = static_cast<T>(s.ema_weight);
  c.scale = static_cast<T>(s.grad_scale);
  return c;
}

// kEnd: torch's kernel fuses the other product of v in the last n % 8 weights of a tensor.
template <typename T, bool kMoment, int kDecay, bool kEnd>
static void update(T* __restrict p, const T* __restrict grad, T* __restrict m, T* __restrict v, int64_t n,
                   const Coefficients<T>& c) {
  const T clip = c.clip, factor = c.factor, decay = c.decay, beta2 = c.beta2, square = c.square, root = c.bias2_root,
          eps = c.eps, minus_step = c.minus_step, coefficient = c.near ? c.lerp : c.lerp_far;
  const bool near = c.near;
  for (int64_t i = 0; i < n; ++i) {
    T g = grad[i], w = p[i];
    g = g > clip ? clip : g;  // a NaN compares false and stays
    g = g < -clip ? -clip : g;
    g *= factor;
    if (kDecay == 1) g = fma_(w, decay, g);
    if (kDecay == 2) w *= decay;
    T first = g;
    if (kMoment) {
      const T old = m[i];
      first = fma_(coefficient, g - old, near ? old : g);
      m[i] = first;
    }
    const T second = kEnd ? fma_(v[i], beta2, square * g * g) : fma_(square * g, g, v[i] * beta2);
    v[i] = second;
    p[i] = w + minus_step * first / (std::sqrt(second) / root + eps);
  }
}

// Registers' worth; what is left is worked on as a whole register in a copy, where a loop over single values would take longer.
template <typename T, bool kMoment, int kDecay, bool kEnd>
static void update_all(T* p, const T* g, T* m, T* v, int64_t n, const Coefficients<T>& c) {
  constexpr int64_t width = 64 / sizeof(T);
  const int64_t whole = n / width * width, rest = n - whole;
  update<T, kMoment, kDecay, kEnd>(p, g, m, v, whole, c);
  if (!rest) return;
  alignas(64) T copy[4][width] = {};
  const auto carry = [&](const T* from, T* to) {
#if PECKER_LEVEL == 2
    // In one piece: what is stored in pieces cannot be forwarded to the load of a whole register.
    if constexpr (sizeof(T) == 4) {
      const __mmask16 k = static_cast<__mmask16>((1u << rest) - 1);
      return _mm512_mask_storeu_ps(to, k, _mm512_maskz_loadu_ps(k, from));
    }
#endif
    for (int64_t i = 0; i < rest; ++i) to[i] = from[i];
  };
  carry(p + whole, copy[0]);
  carry(g + whole, copy[1]);
  if (kMoment) carry(m + whole, copy[2]);
  carry(v + whole, copy[3]);
  update<T, kMoment, kDecay, kEnd>(copy[0], copy[1], copy[2], copy[3], width, c);
  carry(copy[0], p + whole);
  if (kMoment) carry(copy[2], m + whole);
  carry(copy[3], v + whole);
}

template <typename T>
static void update_any(T* p, const T* g, T* m, T* v, int64_t n, const Coefficients<T>& c, bool end) {
#define PECKER_CASE(M, D)                                 \
  return end ? update_all<T, M, D, true>(p, g, m, v, n, c) : update_all<T, M, D, false>(p, g, m, v, n, c)
  if (m) {
    if (c.wd == 0) PECKER_CASE(true, 0);
    if (c.wd == 1) PECKER_CASE(true, 1);
    PECKER_CASE(true, 2);
  }
  if (c.wd == 0) PECKER_CASE(false, 0);
  if (c.wd == 1) PECKER_CASE(false, 1);
  PECKER_CASE(false, 2);
#undef PECKER_CASE
}

template <typename T>
static void average(T* __restrict e, const T* __restrict p, int64_t n, T weight) {
  if (weight < static_cast<T>(0.5))
    for (int64_t i = 0; i < n; ++i) e[i] = fma_(weight, p[i] - e[i], e[i]);
  else
    for (int64_t i = 0; i < n; ++i) e[i] = fma_(weight - 1, p[i] - e[i], p[i]);
}

// The 32-bit finaliser of reference.random_bits16.
static inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

static inline uint16_t round_stochastic(float f, uint64_t index, uint32_t key) {
  const uint32_t noise = mix(mix(static_cast<uint32_t>(index) ^ key) ^ static_cast<uint32_t>(index >> 32)) >> 16;
  const uint32_t x = float_to_bits(f);
  return (x & 0x7f800000) == 0x7f800000 ? to_bf16(f) : static_cast<uint16_t>((x + noise) >> 16);
}

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

template <typename T>
static void step_stretch(const AdamTensor& t, const Stretch& s, const Coefficients<T>& c, uint32_t key, T* p, const T* g,
                         Buffers<T>& b) {
  constexpr int64_t own = sizeof(T) == 4 ? kFloat32 : kFloat64;
  const bool staged_state = s.lanes && !t.compact;  // full-size state of which only the lanes are stepped on
  const int64_t at = t.compact ? s.lane : s.at;
  const auto state = [&](void* base, T* buffer) -> T* {
    if (!base) return nullptr;
    if (!staged_state) return static_cast<T*>(base) + at;
    gather(s, base, own, buffer);
    return buffer;
  };
  T* const m = state(t.exp_avg, b.m);
  T* const v = state(t.exp_avg_sq, b.v);
  if (t.master) p = state(t.master, b.p);

  const bool last = !s.lanes && s.at + s.count == t.n;
  const int64_t end = last ? t.n % 8 : 0, body = s.count - end;
  update_any(p, g, m, v, body, c, false);
  if (end) update_any(p + body, g + body, m ? m + body : nullptr, v + body, end, c, true);

  if (t.param_dtype == kBFloat16 || t.param_dtype == kFloat16) {
    if constexpr (sizeof(T) == 4) {
      if (t.master) {
        if (t.param_dtype == kBFloat16)
          for (int64_t i = 0; i < s.count; ++i) b.half[i] = to_bf16(p[i]);
        else
          for (int64_t i = 0; i < s.count; ++i) b.half[i] = to_f16(p[i]);
      } else {
        const uint64_t first = static_cast<uint64_t>(t.first_index + s.at);
        for (int64_t i = 0; i < s.count; ++i)
          b.half[i] = round_stochastic(p[i], first + (s.lanes ? s.lanes[i] : static_cast<uint64_t>(i)), key);
        for (int64_t i = 0; i < s.count; ++i) p[i] = from_bf16(b.half[i]);
      }
      uint16_t* const to = static_cast<uint16_t*>(t.param);
      if (s.lanes)
        scatter(s, b.half, to);
      else
        std::memcpy(to + s.at, b.half, 2 * s.count);
    }
  } else if (s.lanes) {
    scatter(s, p, static_cast<T*>(t.param));
  }
  if (t.ema) {
    T* const e = state(t.ema, b.e);
    average(e, p, s.count, c.ema);
    if (staged_state) scatter(s, e, static_cast<T*>(t.ema));
  }
  if (staged_state) {
    if (m) scatter(s, m, static_cast<T*>(t.exp_avg));
    scatter(s, v, static_cast<T*>(t.exp_avg_sq));
    if (t.master) scatter(s, p, static_cast<T*>(t.master));
  }
}

static int64_t size_of(int64_t dtype) { return dtype == kFloat32 ? 4 : dtype == kFloat64 ? 8 : 2; }

// direct(at, n, lane) for stretches of weights [begin, end) that are stepped on whole; kept(at, n, words, n_words, lane), which returns
// the number of lanes, for stretches of which the ones among the words are, at most kMostLanes.
constexpr int64_t kMostLanes = 512;

template <typename Direct, typename Kept>
static void for_stretches(const AdamTensor& t, int64_t begin, int64_t end, const Direct& direct, const Kept& kept) {
  constexpr int64_t run = 2;  // this many full words in a row are worth stepping on in place
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t n = std::min(kBlock, end - at);
    if (t.whole || !t.bits) {
      direct(at, n, at);
      continue;
    }
    int64_t lane = t.rank[at / kBlock];
    const int64_t ones = t.rank[at / kBlock + 1] - lane;
    if (ones == 0) continue;
    if (ones == n) {
      direct(at, n, lane);
      continue;
    }
    uint64_t words[kBlock / 64];
    const int64_t n_words = read_words(t.bits, at, n, words);
    // Where nearly every cache line is needed, short stretches keep the lines coming at an even pace (measured).
    const int64_t longest = ones * 11 >= n ? 4 : ones * 24 >= n ? 32 : kBlock / 64;
    for (int64_t w = 0; w < n_words;) {
      if (!words[w]) {
        ++w;
        continue;
      }
      int64_t to = w;
      while (to < n_words && words[to] == ~uint64_t{0}) ++to;
      if (to - w >= run) {
        direct(at + 64 * w, 64 * (to - w), lane);
        lane += 64 * (to - w);
        w = to;
        continue;
      }
      const int64_t stop = std::min(n_words, w + longest);
      int64_t full = 0;
      for (to = w; to < stop && full < run; ++to) full = words[to] == ~uint64_t{0} ? full + 1 : 0;
      if (full == run) to -= run;
      lane += kept(at + 64 * w, std::min(64 * (to - w), n - 64 * w), words + w, to - w, lane);
      w = to;
    }
  }
}

// Kept weights lie scattered, which no hardware prefetcher follows: the lanes of a stretch are listed and asked for while the one
// before is gathered. State is stepped on in whole registers: a remainder waits for the next stretch, because a load that overlaps
// a store still under way would wait for every store before it, and so for the cache lines of the weights.
template <typename T>
class Feed {
 public:
  Feed(const AdamTensor& t, const Coefficients<T>& c, uint32_t key, int64_t base, Buffers<T>& b)
      : t_(t), c_(c), key_(key), base_(base), b_(b) {
    if (t.grad_compact && gradient_in_place(t, c)) run_ = static_cast<const T*>(t.grad);
  }

  int64_t add(int64_t at, int64_t n, const uint64_t* words, int64_t n_words, int64_t lane) {
    if (listed_ == 0) lane_ = lane;
    const int64_t more = list_lanes(words, n_words, at - base_, false, lanes_ + listed_);
    prefetch(t_.param, size_of(t_.param_dtype), base_, lanes_ + listed_, more, at, n);
    if (t_.grad && !t_.grad_compact) prefetch(t_.grad, size_of(t_.grad_dtype), base_, lanes_ + listed_, more, at, n);
    gather_listed();
    listed_ += more;
    if (gathered_ >= kEnough) step(gathered_ / 16 * 16);
    return more;
  }

  void flush() {
    gather_listed();
    if (listed_) step(listed_);
  }

 private:
  void gather_listed() {
    const Stretch s{base_, listed_ - gathered_, lane_ + gathered_, lanes_ + gathered_};
    constexpr int64_t own = sizeof(T) == 4 ? kFloat32 : kFloat64;
    if (run_) {
      weights(t_, s, b_.p + gathered_);
    } else if (t_.param_dtype == own && t_.grad_dtype == own && t_.grad && !t_.grad_compact && !t_.master && c_.scale == 1) {
      // The common case in one loop: a position is loaded once.
      const T* const p = static_cast<const T*>(t_.param) + base_;
      const T* const g = static_cast<const T*>(t_.grad) + base_;
      T* const to_p = b_.p + gathered_;
      T* const to_g = b_.g + gathered_;
#pragma GCC unroll 8
      for (int64_t i = 0; i < s.count; ++i) {
        const uint16_t lane = s.lanes[i];
        to_p[i] = p[lane];
        to_g[i] = g[lane];
      }
    } else {
      gradient(t_, s, c_, b_.g + gathered_);
      weights(t_, s, b_.p + gathered_);
    }
    gathered_ = listed_;
  }

  void step(int64_t count) {
    step_stretch(t_, Stretch{base_, count, lane_, lanes_}, c_, key_, b_.p, run_ ? run_ + lane_ : b_.g, b_);
    const auto close_up = [=](auto* values, int64_t n) { std::memmove(values, values + count, (n - count) * sizeof(*values)); };
    close_up(lanes_, listed_);
    if (!run_) close_up(b_.g, gathered_);
    if (!t_.master) close_up(b_.p, gathered_);
    lane_ += count;
    listed_ -= count;
    gathered_ -= count;
  }

  static constexpr int64_t kEnough = 64;
  const AdamTensor& t_;
  const Coefficients<T>& c_;
  const uint32_t key_;
  const int64_t base_;
  Buffers<T>& b_;
  const T* run_ = nullptr;  // a compact gradient that is read where it lies
  int64_t lane_ = 0, listed_ = 0, gathered_ = 0;
  alignas(64) uint16_t lanes_[kEnough + 2 * kMostLanes + 64];
};

template <typename T>
static void step_range(const AdamTensor& t, const AdamSettings& settings, int64_t begin, int64_t end) {
  Buffers<T> buffers;
  const double step = *t.step;
  const Coefficients<T> c = coefficients<T>(settings, step);
  uint32_t key = mix(static_cast<uint32_t>(static_cast<int64_t>(step)));
  key = mix(key ^ static_cast<uint32_t>(settings.seed)) ^ static_cast<uint32_t>(settings.seed >> 32);
  Feed<T> feed(t, c, key, begin, buffers);
  for_stretches(
      t, begin, end,
      [&](int64_t at, int64_t n, int64_t lane) {
        feed.flush();
        const Stretch s{at, n, lane, nullptr};
        const T* const g = gradient(t, s, c, buffers.g);
        step_stretch(t, s, c, key, weights(t, s, buffers.p), g, buffers);
      },
      [&](int64_t at, int64_t n, const uint64_t* words, int64_t n_words, int64_t lane) {
        return feed.add(at, n, words, n_words, lane);
      });
  feed.flush();
}

template <typename T>
static GradStats stats_range(const AdamTensor& t, const AdamSettings& settings, int64_t begin, int64_t end) {
  alignas(64) T buffer[kBlock + 16];
  alignas(64) uint16_t lanes[kMostLanes + 64];
  const Coefficients<T> c = coefficients<T>(settings, 1);
  const T clip = c.clip;
  double total = 0;
  bool finite = true;
  const auto count = [&](const Stretch& s) {
    const T* const g = gradient(t, s, c, buffer);
    // Lanes of sums, added in a fixed order: the same number on any count of threads.
    double sums[16] = {};
    T worst = 0;
    const auto add = [&](int64_t lane, T x) {
      worst += x - x;  // 0, or NaN for NaN and inf
      x = x > clip ? clip : x;
      x = x < -clip ? -clip : x;
      sums[lane] += static_cast<double>(x) * x;
    };
    int64_t i = 0;
    for (; i + 16 <= s.count; i += 16)
      for (int64_t j = 0; j < 16; ++j) add(j, g[i + j]);
    for (; i < s.count; ++i) add(i % 16, g[i]);
    finite &= worst == 0;
    for (double x : sums) total += x;
  };
  for_stretches(
      t, begin, end, [&](int64_t at, int64_t n, int64_t lane) { count(Stretch{at, n, lane, nullptr}); },
      [&](int64_t at, int64_t n, const uint64_t* words, int64_t n_words, int64_t lane) {
        (void)n;
        Stretch s{at, 0, lane, lanes};
        if (t.grad_compact)
          for (int64_t w = 0; w < n_words; ++w) s.count += __builtin_popcountll(words[w]);
        else
          s.count = list_lanes(words, n_words, 0, false, lanes);
        count(s);
        return s.count;
      });
  return {total, finite};
}

static void step_task(const AdamTensor& t, const AdamSettings& s, int64_t begin, int64_t end) {
  if (t.param_dtype == kFloat64)
    step_range<double>(t, s, begin, end);
  else
    step_range<float>(t, s, begin, end);
}

static GradStats stats_task(const AdamTensor& t, const AdamSettings& s, int64_t begin, int64_t end) {
  return t.param_dtype == kFloat64 ? stats_range<double>(t, s, begin, end) : stats_range<float>(t, s, begin, end);
}
