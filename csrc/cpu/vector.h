// Vectorised inner loops of the CPU kernels: plain loops, compiled once per instruction set and
// picked when the library loads, so that one binary suits every x86-64 machine.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

namespace palu::cpu {

#define PALU_DECLARE_VECTOR(T, A)                    \
  /* sum of x [n], finished in double */             \
  double sum(const T* x, int64_t n);                 \
  /* a [n] . x [n] */                                \
  A dot(const A* a, const T* x, int64_t n);          \
  /* y [n] += a * x [n] */                           \
  void add_scaled(A* y, A a, const T* x, int64_t n); \
  /* y [n] = T(y + x [n]), one rounding */           \
  void add_rounded(T* y, const A* x, int64_t n);     \
  /* y [n] = T(x [n]) */                             \
  void round_to(T* y, const A* x, int64_t n);

PALU_DECLARE_VECTOR(float, float)
PALU_DECLARE_VECTOR(double, double)
PALU_DECLARE_VECTOR(c10::BFloat16, float)
#undef PALU_DECLARE_VECTOR

/* whether every value of x [n] lies in [0, bound) */
bool all_in_range(const int32_t* x, int64_t n, int64_t bound);
bool all_in_range(const int64_t* x, int64_t n, int64_t bound);

}  // namespace palu::cpu
