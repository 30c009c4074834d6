#include "vector.h"

#include <algorithm>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define PALU_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PALU_CLONES
#endif
// Inlined into each clone, and so compiled for its instruction set.
#define PALU_INLINE [[gnu::always_inline]] inline

namespace palu::cpu {
namespace {

// Four independent accumulators hide the latency of the addition.
template <typename T, typename A>
PALU_INLINE A block_sum(const T* x, int64_t n) {
  const int64_t q = n / 4;
  A s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t i = 0; i < q; ++i) {
    s0 += static_cast<A>(x[i]);
    s1 += static_cast<A>(x[i + q]);
    s2 += static_cast<A>(x[i + 2 * q]);
    s3 += static_cast<A>(x[i + 3 * q]);
  }
  for (int64_t i = 4 * q; i < n; ++i) s0 += static_cast<A>(x[i]);
  return (s0 + s1) + (s2 + s3);
}

// Blocks summed in A, their sums in double: a long row loses no more than a short one.
template <typename T, typename A>
PALU_INLINE double sum_impl(const T* x, int64_t n) {
  constexpr int64_t block = 2048;
  double total = 0;
  for (int64_t i = 0; i < n; i += block) total += block_sum<T, A>(x + i, std::min(block, n - i));
  return total;
}

template <typename T, typename A>
PALU_INLINE A dot_impl(const A* a, const T* x, int64_t n) {
  const int64_t q = n / 4;
  A s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t i = 0; i < q; ++i) {
    s0 += a[i] * static_cast<A>(x[i]);
    s1 += a[i + q] * static_cast<A>(x[i + q]);
    s2 += a[i + 2 * q] * static_cast<A>(x[i + 2 * q]);
    s3 += a[i + 3 * q] * static_cast<A>(x[i + 3 * q]);
  }
  for (int64_t i = 4 * q; i < n; ++i) s0 += a[i] * static_cast<A>(x[i]);
  return (s0 + s1) + (s2 + s3);
}

template <typename I>
PALU_INLINE bool all_in_range_impl(const I* x, int64_t n, int64_t bound) {
  // As unsigned, a negative value is out of range too.
  bool ok = true;
#pragma omp simd reduction(&& : ok)
  for (int64_t i = 0; i < n; ++i)
    ok = ok && static_cast<uint64_t>(static_cast<int64_t>(x[i])) < static_cast<uint64_t>(bound);
  return ok;
}

}  // namespace

#define PALU_DEFINE_VECTOR(T, A)                                                            \
  PALU_CLONES double sum(const T* x, int64_t n) { return sum_impl<T, A>(x, n); }            \
  PALU_CLONES A dot(const A* a, const T* x, int64_t n) { return dot_impl<T, A>(a, x, n); }  \
  PALU_CLONES void add_scaled(A* __restrict__ y, A a, const T* __restrict__ x, int64_t n) { \
    for (int64_t i = 0; i < n; ++i) y[i] += a * static_cast<A>(x[i]);                       \
  }                                                                                         \
  PALU_CLONES void add_rounded(T* __restrict__ y, const A* __restrict__ x, int64_t n) {     \
    for (int64_t i = 0; i < n; ++i) y[i] = static_cast<T>(static_cast<A>(y[i]) + x[i]);     \
  }                                                                                         \
  PALU_CLONES void round_to(T* __restrict__ y, const A* __restrict__ x, int64_t n) {        \
    for (int64_t i = 0; i < n; ++i) y[i] = static_cast<T>(x[i]);                            \
  }

PALU_DEFINE_VECTOR(float, float)
PALU_DEFINE_VECTOR(double, double)
PALU_DEFINE_VECTOR(c10::BFloat16, float)

PALU_CLONES bool all_in_range(const int32_t* x, int64_t n, int64_t bound) { return all_in_range_impl(x, n, bound); }
PALU_CLONES bool all_in_range(const int64_t* x, int64_t n, int64_t bound) { return all_in_range_impl(x, n, bound); }

}  // namespace palu::cpu
