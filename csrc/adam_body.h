// The masked Adam step for one instruction level; adam.cpp includes this once for each, inside a namespace of its own. Here: stretches of
// weights, one after the other. adam_formula.h: what is computed. adam_lanes.h: of which values.

#include "adam_formula.h"
#include "adam_lanes.h"

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
