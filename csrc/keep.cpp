// Scores -> packed bits: 4 bytes read and 1/8 written per weight; pieces whose ties are kept in part are read
// twice.
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

// What keeping a piece found.
struct Kept {
  int64_t ones = 0, ties = 0;
  uint8_t faults = 0;
};

// room: ties kept, negative for all. Ties are only counted on request.
Kept keep_piece(const Tensors& t, const Piece& p, uint32_t threshold, bool magnitude, int64_t room, bool count,
                uint8_t* bits) {
  const Rule r = rule(threshold, magnitude, room < 0);
  float block[block_size];
  Kept kept;
  for (int64_t begin = p.begin; begin < p.end; begin += block_size) {
    const int64_t m = std::min(block_size, p.end - begin);
    const float* values = widened(t.data[p.tensor], t.kinds[p.tensor], begin, m, block);
    uint8_t* const out = bits + (begin >> 3);
    kept.faults |= faults(values, m, magnitude);
    const int64_t ties = count || room > 0 ? count_ties(values, m, r) : 0;
    kept.ties += ties;
    if (room > 0 && ties) {
      kept.ones += keep_scalar(values, m, r, room, out);
      room = std::max<int64_t>(0, room - ties);
    } else {
      kept.ones += keep(values, m, r, out);
    }
  }
  return kept;
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
  const Tensors tensors{data, n, kinds, count};
  const auto all = pieces(n, count);
  std::vector<Kept> kept(all.size());
  // First as if all ties fitted; then the pieces that get fewer are written again. Where ties are rare, hardly any is.
  parallel_tasks(static_cast<int64_t>(all.size()), 4 * total(n, count), threads, [&](int64_t i) {
    const Piece& p = all[i];
    const int64_t room = rooms[p.tensor];
    kept[i] = keep_piece(tensors, p, thresholds[p.tensor], magnitude, room > 0 ? -1 : room, room > 0, bits[p.tensor]);
  });
  struct Again {
    size_t piece;
    int64_t room;
  };
  std::vector<Again> again;
  int64_t left = 0, n_bytes = 0;
  for (size_t i = 0; i < all.size(); ++i) {
    if (rooms[all[i].tensor] <= 0) continue;
    if (all[i].begin == 0) left = rooms[all[i].tensor];
    if (kept[i].ties > left) {
      again.push_back({i, left});
      n_bytes += 4 * (all[i].end - all[i].begin);
    }
    left -= std::min(left, kept[i].ties);
  }
  parallel_tasks(static_cast<int64_t>(again.size()), n_bytes, threads, [&](int64_t a) {
    const Piece& p = all[again[a].piece];
    kept[again[a].piece] =
        keep_piece(tensors, p, thresholds[p.tensor], magnitude, again[a].room, false, bits[p.tensor]);
  });
  for (size_t i = 0; i < all.size(); ++i) {
    ones[all[i].tensor] += kept[i].ones;
    faults_of[all[i].tensor] |= kept[i].faults;
  }
}
