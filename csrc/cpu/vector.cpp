#include "vector.h"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define PALU_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PALU_CLONES
#endif
// Inlined into each clone, and so compiled for its instruction set.
#define PALU_INLINE [[gnu::always_inline]] inline

namespace palu::cpu {
namespace {

// One 64-byte vector of the sums' dtype; a compiler without registers of that width takes several.
template <typename A>
struct Vector {
  typedef A type __attribute__((vector_size(64)));
  static constexpr int64_t lanes = 64 / sizeof(A);
};

template <typename A>
PALU_INLINE void load(typename Vector<A>::type& v, const A* x) {
  std::memcpy(&v, x, sizeof v);
}

PALU_INLINE void load(Vector<float>::type& v, const c10::BFloat16* x) {
  typedef uint16_t Half __attribute__((vector_size(32)));
  typedef uint32_t Bits __attribute__((vector_size(64)));
  Half half;
  std::memcpy(&half, x, sizeof half);
  const Bits bits = __builtin_convertvector(half, Bits) << 16;
  std::memcpy(&v, &bits, sizeof v);
}

// Four independent accumulators hide the latency of the addition. All loops read from front to back: the hardware's
// prefetcher follows one stream better than the four quarters of a block.
template <typename A>
PALU_INLINE A add_up(const typename Vector<A>::type (&s)[4]) {
  constexpr int64_t lanes = Vector<A>::lanes;
  const typename Vector<A>::type all = (s[0] + s[1]) + (s[2] + s[3]);
  A part[lanes];
  std::memcpy(part, &all, sizeof all);
  for (int64_t width = lanes / 2; width > 0; width /= 2) {
    for (int64_t j = 0; j < width; ++j) part[j] += part[j + width];
  }
  return part[0];
}

template <typename T, typename A>
PALU_INLINE A block_sum(const T* x, int64_t n) {
  using V = Vector<A>;
  constexpr int64_t step = 4 * V::lanes;
  typename V::type s[4] = {}, v;
  int64_t i = 0;
  for (; i + step <= n; i += step) {
    for (int64_t j = 0; j < 4; ++j) {
      load(v, x + i + j * V::lanes);
      s[j] += v;
    }
  }
  for (; i + V::lanes <= n; i += V::lanes) {
    load(v, x + i);
    s[0] += v;
  }
  A rest = 0;  // of its own, since each addition to the whole would round at that size
  for (; i < n; ++i) rest += static_cast<A>(x[i]);
  return add_up<A>(s) + rest;
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
  using V = Vector<A>;
  constexpr int64_t step = 4 * V::lanes;
  typename V::type s[4] = {}, u, v;
  int64_t i = 0;
  for (; i + step <= n; i += step) {
    for (int64_t j = 0; j < 4; ++j) {
      load(u, a + i + j * V::lanes);
      load(v, x + i + j * V::lanes);
      s[j] += u * v;
    }
  }
  A total = add_up<A>(s);
  for (; i < n; ++i) total += a[i] * static_cast<A>(x[i]);
  return total;
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
