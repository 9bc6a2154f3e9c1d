// GroupNorm and SiLU in one pass over memory each way: y = u / (1 + exp(-u)), u = (x - mean) * rstd * weight + bias. What torch does in two
// operations, with a tensor between them that is kept for the way back, is here done on values that lie in the cache; the way back needs
// x alone. A task is a few groups of one sample. Sums are float32 over runs of 32 values and float64 over these runs, in an order that
// neither threads nor instruction sets change.
#include "select.h"

#include <cmath>

namespace {

using namespace pecker;

// 16 values: one register, two or four of them, as the instruction set has them.
typedef float V __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef double D __attribute__((vector_size(128)));
constexpr int64_t width = 16, run = 32, most_groups = 512;  // of a task

struct Sums {
  D total;
  V part;
};

// whole: all 16 values; else the first n, and zeros. Two loops, since a value that may be loaded in part lies in memory and in no register.
template <bool whole>
PECKER_INLINE V load(const float* at, int64_t n) {
  V v = {};
  std::memcpy(&v, at, whole ? sizeof v : static_cast<size_t>(n) * sizeof(float));
  return v;
}

template <bool whole>
PECKER_INLINE void store(float* at, const V& v, int64_t n) {
  std::memcpy(at, &v, whole ? sizeof v : static_cast<size_t>(n) * sizeof(float));
}

PECKER_INLINE void close(Sums& s) {
  s.total += __builtin_convertvector(s.part, D);
  s.part = V{};
}

PECKER_INLINE double across(const D& v) {
  double lanes[width];
  std::memcpy(lanes, &v, sizeof lanes);
  for (int half = width / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// exp(z) to an ulp or two; infinity from 89 on, never below exp(-87), NaN of NaN.
PECKER_INLINE V exponential(V z) {
  z = z > 89.0f ? V{} + 89.0f : z;
  z = z < -87.0f ? V{} - 87.0f : z;
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23: its last bits are whole numbers
  const V shifted = z * 1.44269504088896341f + magic;
  const V whole = shifted - magic;
  const V r = (z - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln 2 in two parts, the first exact in products
  V p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r * r + r) + 1.0f;
  I bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4b400000 + 127) << 23;
  V scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

// A task's part of a sample: `channels` of them from `first` on, `pixels` values each. Value (c, p) lies at c * channel + p * pixel.
struct Part {
  int64_t channels, pixels, per_group, channel, pixel;
  bool silu;
};

// Per channel of a task; the caller's stack holds them.
struct Constants {
  const float *mean, *rstd, *weight, *bias;  // weight, bias: of the task's first channel; mean, rstd: of its first group
};

// What belongs to channels [c, c + n) of an NHWC strip, lane by lane.
PECKER_INLINE V of_groups(const float* values, int64_t c, int64_t n, int64_t per_group) {
  V v = {};
  for (int64_t i = 0; i < n; ++i) v[i] = values[(c + i) / per_group];
  return v;
}

PECKER_INLINE V normed(V x, V mean, V rstd, V weight, V bias) { return (x - mean) * rstd * weight + bias; }

// dy of u -> y, times the gradient of y.
PECKER_INLINE V through(V grad, V u) {
  const V s = 1.0f / (1.0f + exponential(-u));
  return grad * (s * (1.0f + u * (1.0f - s)));
}

// ---- pixels before channels (NHWC): a strip is 16 channels wide and walks down the pixels ----

template <bool whole>
PECKER_INLINE void moments_strip(const float* x, const Part& p, int64_t n, V centre, bool squares, D& out) {
  Sums s = {};
  for (int64_t i = 0; i < p.pixels; i += run) {
    const int64_t end = std::min(p.pixels, i + run);
    for (int64_t j = i; j < end; ++j) {
      const V d = load<whole>(x + j * p.pixel, n) - centre;
      s.part += squares ? d * d : d;
    }
    close(s);
  }
  out = s.total;
}

PECKER_INLINE void moments_nhwc(const float* x, const Part& p, float eps, float* mean, float* rstd) {
  const int64_t groups = p.channels / p.per_group;
  const double m = static_cast<double>(p.per_group * p.pixels);
  for (int pass = 0; pass < 2; ++pass) {
    double sums[most_groups] = {};
    for (int64_t c = 0; c < p.channels; c += width) {
      const int64_t n = std::min(width, p.channels - c);
      const V centre = pass ? of_groups(mean, c, n, p.per_group) : V{};
      D found;
      if (n == width)
        moments_strip<true>(x + c, p, n, centre, pass, found);
      else
        moments_strip<false>(x + c, p, n, centre, pass, found);
      for (int64_t i = 0; i < n; ++i) sums[(c + i) / p.per_group] += found[i];
    }
    for (int64_t g = 0; g < groups; ++g) {
      if (pass)
        rstd[g] = static_cast<float>(1.0 / std::sqrt(sums[g] / m + static_cast<double>(eps)));
      else
        mean[g] = static_cast<float>(sums[g] / m);
    }
  }
}

template <bool whole>
PECKER_INLINE void forward_strip(const float* x, float* y, const Part& p, const Constants& k, int64_t c, int64_t n) {
  const V mean = of_groups(k.mean, c, n, p.per_group), rstd = of_groups(k.rstd, c, n, p.per_group);
  const V weight = load<whole>(k.weight + c, n), bias = load<whole>(k.bias + c, n);
  for (int64_t j = 0; j < p.pixels; ++j) {
    const V u = normed(load<whole>(x + c + j * p.pixel, n), mean, rstd, weight, bias);
    store<whole>(y + c + j * p.pixel, p.silu ? u / (1.0f + exponential(-u)) : u, n);
  }
}

// du of the strip's values goes to dx; sums of du and of du * xhat by channel.
template <bool whole>
PECKER_INLINE void backward_strip(const float* grad, const float* x, float* dx, const Part& p, const Constants& k, int64_t c, int64_t n,
                                  double* by_bias, double* by_weight) {
  const V mean = of_groups(k.mean, c, n, p.per_group), rstd = of_groups(k.rstd, c, n, p.per_group);
  const V weight = load<whole>(k.weight + c, n), bias = load<whole>(k.bias + c, n);
  Sums b = {}, w = {};
  for (int64_t i = 0; i < p.pixels; i += run) {
    const int64_t end = std::min(p.pixels, i + run);
    for (int64_t j = i; j < end; ++j) {
      const int64_t at = c + j * p.pixel;
      const V xhat = (load<whole>(x + at, n) - mean) * rstd;
      V du = load<whole>(grad + at, n);
      if (p.silu) du = through(du, xhat * weight + bias);
      if (dx) store<whole>(dx + at, du, n);
      b.part += du;
      w.part += du * xhat;
    }
    close(b);
    close(w);
  }
  for (int64_t i = 0; i < n; ++i) by_bias[c + i] = b.total[i], by_weight[c + i] = w.total[i];
}

template <bool whole>
PECKER_INLINE void finish_strip(const float* x, float* dx, const Part& p, const Constants& k, const float* a, const float* b, int64_t c,
                                int64_t n) {
  const V mean = of_groups(k.mean, c, n, p.per_group), rstd = of_groups(k.rstd, c, n, p.per_group);
  const V weight = load<whole>(k.weight + c, n), one = of_groups(a, c, n, p.per_group), two = of_groups(b, c, n, p.per_group);
  for (int64_t j = 0; j < p.pixels; ++j) {
    const int64_t at = c + j * p.pixel;
    const V xhat = (load<whole>(x + at, n) - mean) * rstd;
    store<whole>(dx + at, rstd * (weight * load<whole>(dx + at, n) - one - xhat * two), n);
  }
}

// ---- channels before pixels (NCHW): a channel's values lie in one run ----

PECKER_INLINE void add_channel(const float* x, int64_t pixels, float centre, bool squares, Sums& s, double& rest) {
  int64_t j = 0;
  while (j + width <= pixels) {
    const int64_t end = std::min(pixels - width, j + width * (run - 1));
    for (; j <= end; j += width) {
      const V d = load<true>(x + j, width) - centre;
      s.part += squares ? d * d : d;
    }
    close(s);
  }
  for (; j < pixels; ++j) {
    const float d = x[j] - centre;
    rest += static_cast<double>(squares ? d * d : d);
  }
}

PECKER_INLINE void moments_nchw(const float* x, const Part& p, float eps, float* mean, float* rstd) {
  const double m = static_cast<double>(p.per_group * p.pixels);
  for (int64_t g = 0; g < p.channels / p.per_group; ++g)
    for (int pass = 0; pass < 2; ++pass) {
      Sums s = {};
      double sum = 0;
      for (int64_t c = g * p.per_group; c < (g + 1) * p.per_group; ++c)
        add_channel(x + c * p.channel, p.pixels, pass ? mean[g] : 0.0f, pass, s, sum);
      sum += across(s.total);
      if (pass)
        rstd[g] = static_cast<float>(1.0 / std::sqrt(sum / m + static_cast<double>(eps)));
      else
        mean[g] = static_cast<float>(sum / m);
    }
}

// What one channel's values have in common.
struct Lane {
  V mean, rstd, weight, bias;
};

PECKER_INLINE Lane lane_of(const Part& p, const Constants& k, int64_t c) {
  const int64_t g = c / p.per_group;
  return {V{} + k.mean[g], V{} + k.rstd[g], V{} + k.weight[c], V{} + k.bias[c]};
}

template <bool whole>
PECKER_INLINE void forward_run(const float* x, float* y, const Part& p, const Lane& k, int64_t n) {
  const V u = normed(load<whole>(x, n), k.mean, k.rstd, k.weight, k.bias);
  store<whole>(y, p.silu ? u / (1.0f + exponential(-u)) : u, n);
}

PECKER_INLINE void forward_channel(const float* x, float* y, const Part& p, const Lane& k) {
  int64_t j = 0;
  for (; j + width <= p.pixels; j += width) forward_run<true>(x + j, y + j, p, k, width);
  if (j < p.pixels) forward_run<false>(x + j, y + j, p, k, p.pixels - j);
}

// Behind the end of a channel grad is zero, and so are its terms of the sums.
template <bool whole>
PECKER_INLINE void backward_run(const float* grad, const float* x, float* dx, const Part& p, const Lane& k, int64_t n, Sums& b, Sums& w) {
  const V xhat = (load<whole>(x, n) - k.mean) * k.rstd;
  V du = load<whole>(grad, n);
  if (p.silu) du = through(du, xhat * k.weight + k.bias);
  if (dx) store<whole>(dx, du, n);
  b.part += du;
  w.part += du * xhat;
}

PECKER_INLINE void backward_channel(const float* grad, const float* x, float* dx, const Part& p, const Lane& k, double& by_bias,
                                    double& by_weight) {
  Sums b = {}, w = {};
  int64_t j = 0;
  while (j + width <= p.pixels) {
    const int64_t end = std::min(p.pixels - width, j + width * (run - 1));
    for (; j <= end; j += width) backward_run<true>(grad + j, x + j, dx ? dx + j : nullptr, p, k, width, b, w);
    close(b);
    close(w);
  }
  if (j < p.pixels) backward_run<false>(grad + j, x + j, dx ? dx + j : nullptr, p, k, p.pixels - j, b, w);
  close(b);
  close(w);
  by_bias = across(b.total);
  by_weight = across(w.total);
}

template <bool whole>
PECKER_INLINE void finish_run(const float* x, float* dx, const Lane& k, float a, float b, int64_t n) {
  const V xhat = (load<whole>(x, n) - k.mean) * k.rstd;
  store<whole>(dx, k.rstd * (k.weight * load<whole>(dx, n) - a - xhat * b), n);
}

PECKER_INLINE void finish_channel(const float* x, float* dx, const Part& p, const Lane& k, float a, float b) {
  int64_t j = 0;
  for (; j + width <= p.pixels; j += width) finish_run<true>(x + j, dx + j, k, a, b, width);
  if (j < p.pixels) finish_run<false>(x + j, dx + j, k, a, b, p.pixels - j);
}

// ---- a task ----

PECKER_INLINE void forward_body(const float* x, float* y, const Part& p, const Constants& k, float eps, float* mean, float* rstd) {
  if (p.channel != 1) {
    moments_nchw(x, p, eps, mean, rstd);
    for (int64_t c = 0; c < p.channels; ++c) forward_channel(x + c * p.channel, y + c * p.channel, p, lane_of(p, k, c));
    return;
  }
  moments_nhwc(x, p, eps, mean, rstd);
  int64_t c = 0;
  for (; c + width <= p.channels; c += width) forward_strip<true>(x, y, p, k, c, width);
  if (c < p.channels) forward_strip<false>(x, y, p, k, c, p.channels - c);
}

PECKER_INLINE void backward_body(const float* grad, const float* x, float* dx, const Part& p, const Constants& k, double* by_bias,
                                 double* by_weight) {
  const bool nhwc = p.channel == 1;
  int64_t c = 0;
  if (nhwc) {
    for (; c + width <= p.channels; c += width) backward_strip<true>(grad, x, dx, p, k, c, width, by_bias, by_weight);
    if (c < p.channels) backward_strip<false>(grad, x, dx, p, k, c, p.channels - c, by_bias, by_weight);
  }
  for (; !nhwc && c < p.channels; ++c) {
    const int64_t at = c * p.channel;
    backward_channel(grad + at, x + at, dx ? dx + at : nullptr, p, lane_of(p, k, c), by_bias[c], by_weight[c]);
  }
  if (!dx) return;
  float a[most_groups], b[most_groups];
  const double m = static_cast<double>(p.per_group * p.pixels);
  for (int64_t g = 0; g < p.channels / p.per_group; ++g) {
    double one = 0, two = 0;
    for (int64_t i = g * p.per_group; i < (g + 1) * p.per_group; ++i) {
      one += static_cast<double>(k.weight[i]) * by_bias[i];
      two += static_cast<double>(k.weight[i]) * by_weight[i];
    }
    a[g] = static_cast<float>(one / m);
    b[g] = static_cast<float>(two / m);
  }
  for (c = 0; nhwc && c + width <= p.channels; c += width) finish_strip<true>(x, dx, p, k, a, b, c, width);
  if (nhwc && c < p.channels) finish_strip<false>(x, dx, p, k, a, b, c, p.channels - c);
  for (c = 0; !nhwc && c < p.channels; ++c) {
    const int64_t at = c * p.channel, g = c / p.per_group;
    finish_channel(x + at, dx + at, p, lane_of(p, k, c), a[g], b[g]);
  }
}

#ifdef PECKER_X86
#define PECKER_NORM_LEVELS(NAME, PARAMETERS, ARGUMENTS)                                                                   \
  void NAME##_scalar PARAMETERS { NAME##_body ARGUMENTS; }                                                                \
  __attribute__((target("avx2,fma"))) void NAME##_avx2 PARAMETERS { NAME##_body ARGUMENTS; }                              \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))) void NAME##_avx512 PARAMETERS { NAME##_body ARGUMENTS; } \
  void NAME PARAMETERS {                                                                                                  \
    if (pecker::level() == 2) return NAME##_avx512 ARGUMENTS;                                                             \
    if (pecker::level() == 1) return NAME##_avx2 ARGUMENTS;                                                               \
    NAME##_scalar ARGUMENTS;                                                                                              \
  }
#else
#define PECKER_NORM_LEVELS(NAME, PARAMETERS, ARGUMENTS) \
  void NAME PARAMETERS { NAME##_body ARGUMENTS; }
#endif

PECKER_NORM_LEVELS(forward, (const float* x, float* y, const Part& p, const Constants& k, float eps, float* mean, float* rstd),
                   (x, y, p, k, eps, mean, rstd))
PECKER_NORM_LEVELS(backward,
                   (const float* grad, const float* x, float* dx, const Part& p, const Constants& k, double* by_bias, double* by_weight),
                   (grad, x, dx, p, k, by_bias, by_weight))

// Groups of a task: in NHWC whole strips where that can be, so that no cache line is shared; enough to be worth handing out.
int64_t groups_of_task(int64_t channels, int64_t pixels, int64_t groups, bool nhwc) {
  constexpr int64_t worth = 1 << 12;
  const int64_t per_group = channels / groups, most = std::min(groups, most_groups);
  int64_t best = 0;
  for (int64_t g = 1; g <= most; ++g) {
    if (groups % g || (nhwc && g * per_group % width)) continue;
    best = g;
    if (g * per_group * pixels >= worth) break;
  }
  return best ? best : groups <= most_groups ? groups : 1;
}

}  // namespace

PECKER_API void pecker_norm_silu(const float* x, const float* weight, const float* bias, float* y, float* mean, float* rstd, int64_t n,
                                 int64_t channels, int64_t pixels, int64_t groups, float eps, int silu, int nhwc, int threads) {
  const int64_t step = groups_of_task(channels, pixels, groups, nhwc), per_group = channels / groups, tasks = groups / step;
  const Part part{step * per_group, pixels, per_group, nhwc ? 1 : pixels, nhwc ? channels : 1, silu != 0};
  parallel_tasks(n * tasks, 8 * n * channels * pixels, threads, [&](int64_t i) {
    const int64_t g = i / tasks * groups + i % tasks * step, c = i % tasks * part.channels;
    const int64_t at = i / tasks * channels * pixels + c * part.channel;
    forward(x + at, y + at, part, {mean + g, rstd + g, weight + c, bias + c}, eps, mean + g, rstd + g);
  });
}

PECKER_API void pecker_norm_silu_backward(const float* grad, const float* x, const float* weight, const float* bias,
                                          const float* mean, const float* rstd, float* dx, float* dweight, float* dbias,
                                          double* sums, int64_t n, int64_t channels, int64_t pixels, int64_t groups, int silu,
                                          int nhwc, int threads) {
  const int64_t step = groups_of_task(channels, pixels, groups, nhwc), per_group = channels / groups, tasks = groups / step;
  const Part part{step * per_group, pixels, per_group, nhwc ? 1 : pixels, nhwc ? channels : 1, silu != 0};
  parallel_tasks(n * tasks, 12 * n * channels * pixels, threads, [&](int64_t i) {
    const int64_t g = i / tasks * groups + i % tasks * step, c = i % tasks * part.channels;
    const int64_t at = i / tasks * channels * pixels + c * part.channel, row = i / tasks * channels + c;
    backward(grad + at, x + at, dx ? dx + at : nullptr, part, {mean + g, rstd + g, weight + c, bias + c}, sums + row,
             sums + n * channels + row);
  });
  if (!dweight) return;
  for (int64_t c = 0; c < channels; ++c) {
    double b = 0, w = 0;
    for (int64_t i = 0; i < n; ++i) {
      b += sums[i * channels + c];
      w += sums[(n + i) * channels + c];
    }
    dbias[c] = static_cast<float>(b);
    dweight[c] = static_cast<float>(w);
  }
}
