// topk_mse and topk_backward over rows of logits; formulas and the gradient's derivation are in csrc/topk.h.
#include "../topk.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>
#include <type_traits>
#include <vector>

#include "common.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace palu::cpu {
namespace {

// Strides count elements, from a row to the next; inside a row elements are neighbours.
template <typename T, typename A, typename I>
struct TopkMse {
  const T* logits;  // [R,V]
  int64_t logits_stride;
  const I* index;  // [R,K], contiguous, every value in [0, V)
  A* loss;         // [R]
  A* slope;        // [R,K], contiguous
  int64_t rows, vocab_size, k;
  Center center;
  A constant;
};

template <typename T, typename A, typename I>
void topk_mse(const TopkMse<T, A, I>& p) {
  const int64_t k = p.k, vocab_size = p.vocab_size;
  at::parallel_for(0, p.rows, row_grain(vocab_size), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* z = p.logits + r * p.logits_stride;
      const A c = p.center == Center::kGlobalMean ? static_cast<A>(sum(z, vocab_size) / vocab_size) : p.constant;
      for (int64_t i = r * k; i < (r + 1) * k; ++i) p.slope[i] = static_cast<A>(z[p.index[i]]);
      p.loss[r] = finish_mse(p.slope + r * k, k, p.center, c);
    }
  });
}

template <typename T, typename A, typename I>
struct TopkBackward {
  const A* grad;   // [R]
  const A* slope;  // [R,K], contiguous
  const I* index;  // [R,K], contiguous, every value in [0, V)
  T* grad_logits;  // [R,V], every element is overwritten
  int64_t grad_logits_stride;
  int64_t rows, vocab_size, k;
  bool through_mean;
};

template <typename T, typename A, typename I>
void topk_backward(const TopkBackward<T, A, I>& p) {
  const int64_t k = p.k, vocab_size = p.vocab_size;
  at::parallel_for(0, p.rows, row_grain(vocab_size), [&](int64_t begin, int64_t end) {
    // Duplicates add up in A: in place where the output has that dtype, else in a row of scratch.
    std::vector<A> scratch(std::is_same_v<T, A> ? 0 : vocab_size);
    for (int64_t r = begin; r < end; ++r) {
      const A grad = p.grad[r];
      const A share = p.through_mean ? mean_share(p.slope + r * k, k, grad, vocab_size) : A(0);
      T* out = p.grad_logits + r * p.grad_logits_stride;
      A* sums;
      if constexpr (std::is_same_v<T, A>) {
        sums = out;
      } else {
        sums = scratch.data();
      }
      std::fill_n(sums, vocab_size, share);
      for (int64_t i = r * k; i < (r + 1) * k; ++i) sums[p.index[i]] += grad * p.slope[i];
      if constexpr (!std::is_same_v<T, A>) round_to(out, sums, vocab_size);
    }
  });
}

// A fresh output of many pages costs more in page faults than in writes; huge pages mend that.
void advise_huge_pages(const at::Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t huge = uintptr_t{1} << 21;
  const auto first = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  const uintptr_t begin = (first + huge - 1) & ~(huge - 1), end = (first + t.nbytes()) & ~(huge - 1);
  // Only a hint: where the kernel refuses it, nothing is lost.
  if (begin < end && t.is_contiguous()) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

std::tuple<at::Tensor, at::Tensor> topk_mse_op(const at::Tensor& logits, const at::Tensor& index,
                                               std::string_view target, double constant) {
  const Center center = check_topk_mse(logits, index, target);
  const int64_t rows = logits.size(0), vocab_size = logits.size(1), k = index.size(1);
  const auto options = logits.options().dtype(acc_dtype(logits.scalar_type()));
  at::Tensor loss = at::empty({rows}, options), slope = at::empty({rows, k}, options);
  if (rows == 0) return {loss, slope};
  const at::Tensor z = unit_last_stride(logits), i = index.contiguous();
  dispatch_floating(logits.scalar_type(), [&](auto t, auto a) {
    dispatch_index(index.scalar_type(), [&](auto j) {
      using T = decltype(t);
      using A = decltype(a);
      using I = decltype(j);
      TopkMse<T, A, I> p{};
      p.logits = z.const_data_ptr<T>();
      p.logits_stride = z.stride(0);
      p.index = i.const_data_ptr<I>();
      p.loss = loss.mutable_data_ptr<A>();
      p.slope = slope.mutable_data_ptr<A>();
      p.rows = rows;
      p.vocab_size = vocab_size;
      p.k = k;
      p.center = center;
      p.constant = static_cast<A>(constant);
      check_index_values("palu::topk_mse", p.index, rows, k, vocab_size);
      topk_mse(p);
    });
  });
  return {loss, slope};
}

void topk_backward_op(const at::Tensor& grad, const at::Tensor& slope, const at::Tensor& index, bool through_mean,
                      const at::Tensor& grad_logits) {
  check_topk_backward(grad, slope, index, grad_logits);
  const int64_t rows = index.size(0), vocab_size = grad_logits.size(1), k = index.size(1);
  if (rows == 0) return;
  const at::Tensor g = grad.contiguous(), sl = slope.contiguous(), i = index.contiguous();
  dispatch_floating(grad_logits.scalar_type(), [&](auto t, auto a) {
    dispatch_index(index.scalar_type(), [&](auto j) {
      using T = decltype(t);
      using A = decltype(a);
      using I = decltype(j);
      TopkBackward<T, A, I> p{};
      p.grad = g.const_data_ptr<A>();
      p.slope = sl.const_data_ptr<A>();
      p.index = i.const_data_ptr<I>();
      p.grad_logits = grad_logits.mutable_data_ptr<T>();
      p.grad_logits_stride = grad_logits.stride(0);
      p.rows = rows;
      p.vocab_size = vocab_size;
      p.k = k;
      p.through_mean = through_mean;
      check_index_values("palu::topk_backward", p.index, rows, k, vocab_size);
      advise_huge_pages(grad_logits);
      topk_backward(p);
    });
  });
}

}  // namespace
}  // namespace palu::cpu

TORCH_LIBRARY_IMPL(palu, CPU, m) {
  m.impl("topk_mse", palu::cpu::topk_mse_op);
  m.impl("topk_backward", palu::cpu::topk_backward_op);
}
