// What the CPU registrations share: dispatch over dtypes, and the check of an index's values.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <atomic>

#include "../checks.h"
#include "vector.h"

namespace palu::cpu {

// Elements of work below which a second thread costs more than it saves.
constexpr int64_t kGrain = 32768;

inline int64_t row_grain(int64_t row_elements) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, row_elements));
}

// Calls f(T{}, A{}) for a floating dtype that check_floating has passed.
template <typename F>
void dispatch_floating(at::ScalarType dtype, F f) {
  if (dtype == at::kDouble) {
    f(double{}, double{});
  } else if (dtype == at::kFloat) {
    f(float{}, float{});
  } else {
    f(c10::BFloat16{}, float{});
  }
}

// Calls f(I{}) for an index dtype that check_index has passed.
template <typename F>
void dispatch_index(at::ScalarType dtype, F f) {
  if (dtype == at::kInt) {
    f(int32_t{});
  } else {
    f(int64_t{});
  }
}

template <typename I>
void check_index_values(const char* op, const I* index /* [R,K] */, int64_t rows, int64_t k, int64_t vocab_size) {
  std::atomic<bool> ok{true};
  at::parallel_for(0, rows * k, kGrain, [&](int64_t begin, int64_t end) {
    if (!all_in_range(index + begin, end - begin, vocab_size)) ok = false;
  });
  if (ok) return;
  for (int64_t i = 0; i < rows * k; ++i) {
    TORCH_CHECK_INDEX(index[i] >= 0 && index[i] < vocab_size, op, ": index[", text(i / k), ", ", text(i % k),
                      "] = ", text(index[i]), " is out of range for a vocabulary of ", text(vocab_size));
  }
}

// From z [K] in slope: the slope of the mean square of z - c, which is returned. c is not read for the local mean.
template <typename A>
A finish_mse(A* slope /* [K] */, int64_t k, Center center, A c) {
  if (center == Center::kLocalMean) c = static_cast<A>(sum(slope, k) / k);
  for (int64_t i = 0; i < k; ++i) slope[i] -= c;
  const A loss = dot(slope, slope, k) / static_cast<A>(k);
  for (int64_t i = 0; i < k; ++i) slope[i] *= A(2) / static_cast<A>(k);
  return loss;
}

// s of topk.h: -(1/V) sum_k g[k], for g = grad * slope.
template <typename A>
A grad_through_mean(const A* slope /* [K] */, int64_t k, A grad, int64_t vocab_size) {
  return static_cast<A>(-static_cast<double>(grad) * sum(slope, k) / vocab_size);
}

}  // namespace palu::cpu
