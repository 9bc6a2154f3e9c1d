// Scores -> packed bits: 4 bytes read and 1/8 written per weight; a tensor whose ties are kept in part is read twice.
#include "select.h"

namespace {

using namespace pecker;

// Which of a piece's values equal to the threshold are kept.
struct Rule {
  uint32_t mask;       // magnitude_bits, or all bits: then a value below zero is a negative integer
  int32_t threshold;   // bits of a number ≥ 0: they order like integers
  int32_t equal_too;   // -0.0 where the threshold is 0, else the threshold again
  bool ties;
};

Rule rule(uint32_t threshold, bool magnitude, bool ties) {
  return {magnitude ? magnitude_bits : ~uint32_t{0}, static_cast<int32_t>(threshold),
          static_cast<int32_t>(threshold ? threshold : sign_bit), ties};
}

PECKER_INLINE int64_t ties_body(const float* values, int64_t n, Rule r) {
  int64_t ties = 0;
  for (int64_t i = 0; i < n;) {
    const int64_t end = std::min(n, i + 1024);
    int32_t some = 0;
    for (; i < end; ++i) {
      uint32_t raw;
      std::memcpy(&raw, values + i, 4);
      const int32_t key = static_cast<int32_t>(raw & r.mask);
      some += (key == r.threshold) | (key == r.equal_too);
    }
    ties += some;
  }
  return ties;
}
PECKER_AT_EACH_LEVEL(int64_t, count_ties, ties_body, (const float* values, int64_t n, Rule r), (values, n, r))

// The first `room` ties are kept. Any n: the last byte is padded with zeros.
int64_t keep_scalar(const float* values, int64_t n, Rule r, int64_t room, uint8_t* bits) {
  int64_t ones = 0;
  for (int64_t i = 0; i < n; i += 8) {
    uint8_t out = 0;
    for (int64_t j = 0; j < 8 && i + j < n; ++j) {
      const int32_t key = static_cast<int32_t>(bits_of(values[i + j]) & r.mask);
      const bool tie = key == r.threshold || key == r.equal_too;
      const bool one = tie ? room > 0 : key > r.threshold;
      room -= tie;
      ones += one;
      out |= static_cast<uint8_t>(one << j);
    }
    bits[i >> 3] = out;
  }
  return ones;
}

#ifdef PECKER_X86
PECKER_AVX2 int64_t keep_avx2(const float* values, int64_t n, Rule r, uint8_t* bits) {
  const __m256i mask = _mm256_set1_epi32(static_cast<int32_t>(r.mask)), threshold = _mm256_set1_epi32(r.threshold);
  const __m256i equal_too = _mm256_set1_epi32(r.equal_too), ties = _mm256_set1_epi32(r.ties ? -1 : 0);
  int64_t i = 0, ones = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256i key = _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + i)), mask);
    const __m256i equal = _mm256_or_si256(_mm256_cmpeq_epi32(key, threshold), _mm256_cmpeq_epi32(key, equal_too));
    const __m256i one = _mm256_or_si256(_mm256_cmpgt_epi32(key, threshold), _mm256_and_si256(equal, ties));
    const unsigned out = static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(one)));
    bits[i >> 3] = static_cast<uint8_t>(out);
    ones += __builtin_popcount(out);
  }
  return ones + keep_scalar(values + i, n - i, r, r.ties ? n : 0, bits + (i >> 3));
}

PECKER_AVX512 int64_t keep_avx512(const float* values, int64_t n, Rule r, uint8_t* bits) {
  const __m512i mask = _mm512_set1_epi32(static_cast<int32_t>(r.mask)), threshold = _mm512_set1_epi32(r.threshold);
  const __m512i equal_too = _mm512_set1_epi32(r.equal_too);
  const __mmask16 ties = r.ties ? 0xffff : 0;
  int64_t i = 0, ones = 0;
  for (; i + 64 <= n; i += 64) {
    uint64_t word = 0;
    for (int j = 0; j < 64; j += 16) {
      const __m512i key = _mm512_and_si512(_mm512_loadu_si512(values + i + j), mask);
      const __mmask16 equal = _mm512_cmpeq_epi32_mask(key, threshold) | _mm512_cmpeq_epi32_mask(key, equal_too);
      const __mmask16 one = _mm512_cmpgt_epi32_mask(key, threshold) | (equal & ties);
      word |= static_cast<uint64_t>(one) << j;
    }
    std::memcpy(bits + (i >> 3), &word, 8);
    ones += __builtin_popcountll(word);
  }
  return ones + keep_scalar(values + i, n - i, r, r.ties ? n : 0, bits + (i >> 3));
}
#endif

int64_t keep(const float* values, int64_t n, Rule r, uint8_t* bits) {
#ifdef PECKER_X86
  if (level() == 2) return keep_avx512(values, n, r, bits);
  if (level() == 1) return keep_avx2(values, n, r, bits);
#endif
  return keep_scalar(values, n, r, r.ties ? n : 0, bits);
}

// How many ties each piece keeps: -1 all of them.
std::vector<int64_t> rooms_of(const Tensors& t, const std::vector<Piece>& all, const uint32_t* thresholds, bool magnitude,
                              const int64_t* rooms, int threads) {
  std::vector<int64_t> room(all.size()), unsure;
  int64_t n_bytes = 0;
  for (size_t i = 0; i < all.size(); ++i) {
    room[i] = rooms[all[i].tensor];
    if (room[i] <= 0) continue;
    unsure.push_back(static_cast<int64_t>(i));
    n_bytes += 4 * (all[i].end - all[i].begin);
  }
  std::vector<int64_t> ties(unsure.size());
  parallel_tasks(static_cast<int64_t>(unsure.size()), n_bytes, threads, [&](int64_t u) {
    const Piece& p = all[unsure[u]];
    float block[block_size];
    for (int64_t begin = p.begin; begin < p.end; begin += block_size) {
      const int64_t m = std::min(block_size, p.end - begin);
      ties[u] += count_ties(widened(t.data[p.tensor], t.kinds[p.tensor], begin, m, block), m,
                            rule(thresholds[p.tensor], magnitude, true));
    }
  });
  int64_t left = 0;
  for (size_t u = 0; u < unsure.size(); ++u) {
    const Piece& p = all[unsure[u]];
    if (p.begin == 0) left = rooms[p.tensor];
    room[unsure[u]] = left >= ties[u] ? -1 : left;
    left -= std::min(left, ties[u]);
  }
  return room;
}

}  // namespace

PECKER_API void pecker_tie_counts(const void* const* data, const int64_t* n, const int32_t* kinds, int64_t count,
                                  int magnitude, const uint32_t* thresholds, int64_t* ties, int threads) {
  parallel_groups(pieces(n, count), 4 * total(n, count), threads, [=](const Piece* first, const Piece* last) {
    float block[block_size];
    for (const Piece* p = first; p != last; ++p)
      for (int64_t begin = p->begin; begin < p->end; begin += block_size) {
        const int64_t m = std::min(block_size, p->end - begin);
        const float* values = widened(data[p->tensor], kinds[p->tensor], begin, m, block);
        add_to(ties + p->tensor, count_ties(values, m, rule(thresholds[p->tensor], magnitude, true)));
      }
  });
}

PECKER_API void pecker_keep_bits(const void* const* data, const int64_t* n, const int32_t* kinds, int64_t count,
                                 int magnitude, const uint32_t* thresholds, const int64_t* rooms, uint8_t* const* bits,
                                 int64_t* ones, uint8_t* faults_of, int threads) {
  const auto all = pieces(n, count);
  const auto room = rooms_of({data, n, kinds, count}, all, thresholds, magnitude, rooms, threads);
  parallel_tasks(static_cast<int64_t>(all.size()), 4 * total(n, count), threads, [&](int64_t i) {
    const Piece& p = all[i];
    const Rule r = rule(thresholds[p.tensor], magnitude, room[i] < 0);
    float block[block_size];
    int64_t left = room[i], found = 0;
    uint8_t bad = 0;
    for (int64_t begin = p.begin; begin < p.end; begin += block_size) {
      const int64_t m = std::min(block_size, p.end - begin);
      const float* values = widened(data[p.tensor], kinds[p.tensor], begin, m, block);
      uint8_t* const out = bits[p.tensor] + (begin >> 3);
      bad |= faults(values, m, magnitude);
      if (left > 0) {
        found += keep_scalar(values, m, r, left, out);
        left = std::max<int64_t>(0, left - count_ties(values, m, r));
      } else {
        found += keep(values, m, r, out);
      }
    }
    add_to(ones + p.tensor, found);
    add_to(faults_of + p.tensor, bad);
  });
}
