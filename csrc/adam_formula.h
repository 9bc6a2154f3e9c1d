// The formula of the masked Adam step over values that lie side by side, for one instruction level (see adam_body.h).
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
