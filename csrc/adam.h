// What the Adam step and the gradient statistics share: the table of tensors, the settings, and blocks of work.
#pragma once

#include <cstdint>

namespace pecker {

// Weights are worked on in blocks: the staging buffers of one block stay in the first cache. Ranks of lanes are kept per block.
constexpr int64_t kBlock = 4096;
constexpr int64_t kBlocksPerTask = 16;

enum DType : int64_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// One row of the table the door fills; all fields are 8 bytes, pointers may be null as said.
struct AdamTensor {
  void* param;
  const void* grad;         // null: zero
  const void* masked_grad;  // null: none
  const uint8_t* bits;      // null: every weight is kept
  const int64_t* rank;      // ones before each block, one entry more than blocks; null where bits is
  void* exp_avg;            // null where beta1 is 0
  void* exp_avg_sq;
  void* master;             // null: the parameter is its own truth
  void* ema;                // null: none
  float* step;              // counts this step, from 1
  int64_t n;
  int64_t first_index;
  int64_t whole;    // all weights are updated; bits choose from masked_grad alone
  int64_t compact;  // state holds one value for each kept weight
  int64_t grad_compact, masked_grad_compact;  // so does that gradient; grad only without `whole`, masked_grad only with it
  int64_t param_dtype, grad_dtype, masked_grad_dtype;
};

struct AdamSettings {
  double lr, beta1, beta2, eps, weight_decay;
  double clip_value;   // infinity: none
  double grad_factor;  // of clipping by norm; 1: none
  double grad_scale;   // gradients are divided by it first; 1: none
  double ema_weight;   // 1 - decay
  int64_t decoupled;
  uint64_t seed;
};

// Of the gradients that a step with these settings would take, before grad_factor.
struct GradStats {
  double square_sum;
  int64_t finite;
};

// What a call returns where the bits of a mask are no longer those its ranks were taken of: nothing of those blocks was touched.
constexpr int kStaleRanks = 1;

// Where the ones of a byte are.
struct PositionsOfByte {
  alignas(16) uint16_t at[8];
  int64_t count;
};
struct PositionTable {
  PositionsOfByte of[256];
};
constexpr PositionTable make_positions() {
  PositionTable table{};
  for (int byte = 0; byte < 256; ++byte)
    for (int bit = 0; bit < 8; ++bit)
      if (byte >> bit & 1) table.of[byte].at[table.of[byte].count++] = static_cast<uint16_t>(bit);
  return table;
}
constexpr PositionTable kPositions = make_positions();

}  // namespace pecker
