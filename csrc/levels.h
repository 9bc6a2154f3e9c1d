// Code between PECKER_BEGIN_x and PECKER_END is compiled for that instruction set; the rest of the library runs anywhere.
#pragma once

#if defined(__clang__)
#define PECKER_BEGIN_AVX2 \
  _Pragma("clang attribute push(__attribute__((target(\"avx2,fma,f16c,popcnt,bmi,bmi2\"))), apply_to = function)")
#define PECKER_BEGIN_AVX512                                                                                                  \
  _Pragma("clang attribute push(__attribute__((target(\"avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx2,fma,f16c,popcnt,bmi,bmi2\"))), " \
          "apply_to = function)")
#define PECKER_END _Pragma("clang attribute pop")
#else
#define PECKER_BEGIN_AVX2 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma,f16c,popcnt,bmi,bmi2\")")
#define PECKER_BEGIN_AVX512       \
  _Pragma("GCC push_options")     \
  _Pragma("GCC target(\"avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx2,fma,f16c,popcnt,bmi,bmi2,prefer-vector-width=512\")")
#define PECKER_END _Pragma("GCC pop_options")
#endif
