// The C ABI of the CPU kernels. Bit i of a mask is bit (i & 7) of byte (i >> 3): least significant first.
// `threads` is an upper bound; arrays below a size worth the thread start run on the caller's thread.
#pragma once

#include <cstdint>

#define PECKER_API extern "C" __attribute__((visibility("default")))

#if defined(__x86_64__)
#define PECKER_X86 1
#include <immintrin.h>
#define PECKER_AVX2 __attribute__((target("avx2,f16c")))
#define PECKER_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx2,f16c,popcnt,bmi,bmi2")))
#endif

// Bumped whenever a signature below changes; the Python door refuses another number.
PECKER_API int pecker_abi_version();

// GOMP_parallel of the OpenMP runtime that the process already uses, or null: then every call starts its own threads.
PECKER_API void pecker_set_openmp(void* gomp_parallel);

// 0 scalar, 1 AVX2 (and F16C), 2 AVX-512 (F, BW, VL, DQ, VBMI2).
PECKER_API int pecker_cpu_level();
PECKER_API int pecker_cpu_level_max();
// Returns 0, or -1 when this machine does not have the level.
PECKER_API int pecker_set_cpu_level(int level);

// bytes [n], any non-zero byte is a one -> bits [ceil(n / 8)], padding bits zero.
PECKER_API void pecker_pack(const uint8_t* bytes, int64_t n, uint8_t* bits, int threads);
// bits [ceil(n / 8)] -> bytes [n] of 0 and 1.
PECKER_API void pecker_unpack(const uint8_t* bits, int64_t n, uint8_t* bytes, int threads);
// Number of ones in bits [n_bytes].
PECKER_API int64_t pecker_popcount(const uint8_t* bits, int64_t n_bytes, int threads);
// data [n] elements of element_size 2, 4 or 8 bytes: elements whose bit is zero become +0, the others are not changed.
// Returns 0, or -1 for another element size.
PECKER_API int pecker_apply(void* data, int64_t n, int element_size, const uint8_t* bits, int threads);

// Scoring and selection. A table of `count` tensors: data[i] points to n[i] values of kinds[i], 0 float32, 1 bfloat16, 2 float16.
// counts [2048] and ones, ties [count] are added to, faults [count] or-ed: 1 NaN or inf, 2 below zero (never with magnitude).
// See select_backend.py for what each computes.
PECKER_API void pecker_accumulate(float* const* scores, const void* const* grads, const int64_t* n, const int32_t* kinds,
                                  int64_t count, int reduction, int64_t* counts, uint8_t* faults, int threads);
PECKER_API void pecker_rms_sums(const float* const* squares, const int64_t* n, int64_t count, int64_t accumulations,
                                double* sums, int threads);
PECKER_API void pecker_contrast(float* const* scores, const float* const* squares, const int64_t* n, int64_t count,
                                int64_t accumulations, float floor, int magnitude, int64_t* counts, uint8_t* faults,
                                int threads);
PECKER_API void pecker_census(const void* const* data, const int64_t* n, const int32_t* kinds, int64_t count, int magnitude,
                              int64_t* counts, uint8_t* faults, int threads);
// counts [1024] of the 10 key bits from `shift` up, among keys whose bits above those equal prefix; the keys go to pool [room] unless
// it is null. Returns how many there were: more than room means that pool is not complete.
PECKER_API int64_t pecker_digit(const void* const* data, const int64_t* n, const int32_t* kinds, int64_t count, int shift,
                                uint32_t prefix, int64_t* counts, uint32_t* pool, int64_t room, int threads);
// thresholds [count]: bits of a float32 ≥ 0. rooms [count]: ties kept in flat order, negative for all.
PECKER_API void pecker_tie_counts(const void* const* data, const int64_t* n, const int32_t* kinds, int64_t count,
                                  int magnitude, const uint32_t* thresholds, int64_t* ties, int threads);
PECKER_API void pecker_keep_bits(const void* const* data, const int64_t* n, const int32_t* kinds, int64_t count,
                                 int magnitude, const uint32_t* thresholds, const int64_t* rooms, uint8_t* const* bits,
                                 int64_t* ones, uint8_t* faults, int threads);
// The blocks of a matrix that is not empty, row-major, edges ragged: sums of float64; kept [blocks] bytes -> bits.
PECKER_API void pecker_block_sums(const void* data, int32_t kind, int64_t rows, int64_t columns, int64_t height,
                                  int64_t width, int magnitude, double* sums, int threads);
PECKER_API void pecker_block_bits(const uint8_t* kept, int64_t rows, int64_t columns, int64_t height, int64_t width,
                                  uint8_t* bits, int threads);

// GroupNorm and SiLU (csrc/group_norm.cpp). x, y, grad, dx: float32 [n, channels, pixels], with nhwc [n, pixels, channels] in memory;
// weight, bias, dweight, dbias [channels]; mean, rstd [n, groups]. silu 0: the norm alone. dx, and dweight with dbias, may be null.
// sums: scratch, float64 [2, n, channels].
PECKER_API void pecker_norm_silu(const float* x, const float* weight, const float* bias, float* y, float* mean, float* rstd, int64_t n,
                                 int64_t channels, int64_t pixels, int64_t groups, float eps, int silu, int nhwc, int threads);
PECKER_API void pecker_norm_silu_backward(const float* grad, const float* x, const float* weight, const float* bias,
                                          const float* mean, const float* rstd, float* dx, float* dweight, float* dbias,
                                          double* sums, int64_t n, int64_t channels, int64_t pixels, int64_t groups, int silu,
                                          int nhwc, int threads);

namespace pecker {
struct AdamTensor;
struct AdamSettings;
struct GradStats;
int level();
// Ones in bits [n_bytes], on this thread.
int64_t popcount(const uint8_t* bits, int64_t n_bytes);
}  // namespace pecker

// bits [ceil(n / 8)] -> rank [ceil(n / 4096) + 1]: ones before each block of 4096 weights, and in all.
PECKER_API void pecker_rank(const uint8_t* bits, int64_t n, int64_t* rank);
// Adds one to the step counter of every row.
PECKER_API void pecker_advance(const pecker::AdamTensor* table, int64_t n_tensors);
// One Adam step over a table of tensors, and what is known of its gradients beforehand (csrc/adam.h).
// Both return kStaleRanks where the bits of a mask were changed after their ranks were taken, 0 else.
PECKER_API int pecker_adam(const pecker::AdamTensor* table, int64_t n_tensors, const pecker::AdamSettings* settings, int threads);
PECKER_API int pecker_grad_stats(const pecker::AdamTensor* table, int64_t n_tensors, const pecker::AdamSettings* settings,
                                  pecker::GradStats* result, int threads);
