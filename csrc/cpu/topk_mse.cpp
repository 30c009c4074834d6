#include "../topk_mse.h"

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

template <typename T, typename A, typename I>
void topk_mse(const T* logits, int64_t row_stride, const I* index, A* loss, A* residual, int64_t rows,
              int64_t vocab_size, int64_t k, Target target, A constant) {
  at::parallel_for(0, rows, row_grain(vocab_size), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* z = logits + r * row_stride;
      const A mean = is_global(target) ? static_cast<A>(sum(z, vocab_size) / vocab_size) : A(0);
      for (int64_t i = r * k; i < (r + 1) * k; ++i) residual[i] = static_cast<A>(z[index[i]]);
      loss[r] = finish_row(residual + r * k, k, target, mean, constant);
    }
  });
}

template <typename T, typename A, typename I>
void topk_mse_backward(const A* grad, const A* residual, const I* index, T* grad_logits, int64_t row_stride,
                       int64_t rows, int64_t vocab_size, int64_t k, bool through_mean) {
  at::parallel_for(0, rows, row_grain(vocab_size), [&](int64_t begin, int64_t end) {
    // Duplicates add up in A: in place where the output has that dtype, else in a row of scratch.
    std::vector<A> scratch(std::is_same_v<T, A> ? 0 : vocab_size);
    for (int64_t r = begin; r < end; ++r) {
      const A scale = A(2) / static_cast<A>(k) * grad[r];
      const A share = through_mean ? mean_share(residual + r * k, k, scale, vocab_size) : A(0);
      T* out = grad_logits + r * row_stride;
      A* sums;
      if constexpr (std::is_same_v<T, A>) {
        sums = out;
      } else {
        sums = scratch.data();
      }
      std::fill_n(sums, vocab_size, share);
      for (int64_t i = r * k; i < (r + 1) * k; ++i) sums[index[i]] += scale * residual[i];
      if constexpr (!std::is_same_v<T, A>) round_to(out, sums, vocab_size);
    }
  });
}

namespace {

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
                                               std::string_view target_name, double constant) {
  const Target target = check_topk_mse(logits, index, target_name);
  const int64_t rows = logits.size(0), vocab_size = logits.size(1), k = index.size(1);
  const auto options = logits.options().dtype(acc_dtype(logits.scalar_type()));
  at::Tensor loss = at::empty({rows}, options), residual = at::empty({rows, k}, options);
  if (rows == 0) return {loss, residual};
  const at::Tensor z = unit_last_stride(logits), i = index.contiguous();
  dispatch_floating(logits.scalar_type(), [&](auto t, auto a) {
    dispatch_index(index.scalar_type(), [&](auto j) {
      using T = decltype(t);
      using A = decltype(a);
      using I = decltype(j);
      const I* values = i.const_data_ptr<I>();
      check_index_values("palu::topk_mse", values, rows, k, vocab_size);
      topk_mse<T, A, I>(z.const_data_ptr<T>(), z.stride(0), values, loss.mutable_data_ptr<A>(),
                        residual.mutable_data_ptr<A>(), rows, vocab_size, k, target, static_cast<A>(constant));
    });
  });
  return {loss, residual};
}

void topk_mse_backward_op(const at::Tensor& grad, const at::Tensor& residual, const at::Tensor& index,
                          bool through_mean, const at::Tensor& grad_logits) {
  check_topk_mse_backward(grad, residual, index, grad_logits);
  const int64_t rows = index.size(0), vocab_size = grad_logits.size(1), k = index.size(1);
  if (rows == 0) return;
  const at::Tensor g = grad.contiguous(), res = residual.contiguous(), i = index.contiguous();
  dispatch_floating(grad_logits.scalar_type(), [&](auto t, auto a) {
    dispatch_index(index.scalar_type(), [&](auto j) {
      using T = decltype(t);
      using A = decltype(a);
      using I = decltype(j);
      const I* values = i.const_data_ptr<I>();
      check_index_values("palu::topk_mse_backward", values, rows, k, vocab_size);
      advise_huge_pages(grad_logits);
      topk_mse_backward<T, A, I>(g.const_data_ptr<A>(), res.const_data_ptr<A>(), values,
                                 grad_logits.mutable_data_ptr<T>(), grad_logits.stride(0), rows, vocab_size, k,
                                 through_mean);
    });
  });
}

}  // namespace
}  // namespace palu::cpu

TORCH_LIBRARY_IMPL(palu, CPU, m) {
  m.impl("topk_mse", palu::cpu::topk_mse_op);
  m.impl("topk_mse_backward", palu::cpu::topk_mse_backward_op);
}
