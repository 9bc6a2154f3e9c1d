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

namespace pecker {
struct AdamTensor;
struct AdamSettings;
struct GradStats;
int level();
}  // namespace pecker

// bits [ceil(n / 8)] -> rank [ceil(n / 4096) + 1]: ones before each block of 4096 weights, and in all.
PECKER_API void pecker_rank(const uint8_t* bits, int64_t n, int64_t* rank);
// One Adam step over a table of tensors, and what is known of its gradients beforehand (csrc/adam.h).
PECKER_API void pecker_adam(const pecker::AdamTensor* table, int64_t n_tensors, const pecker::AdamSettings* settings, int threads);
PECKER_API void pecker_grad_stats(const pecker::AdamTensor* table, int64_t n_tensors, const pecker::AdamSettings* settings,
                                  pecker::GradStats* result, int threads);
