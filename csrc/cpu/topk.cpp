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

std::tuple<at::Tensor, at::Tensor> topk_mse(const at::Tensor& logits, const at::Tensor& index, std::string_view target,
                                            double constant) {
  const Center center = check_topk_mse(logits, index, target);
  const int64_t rows = logits.size(0), vocab_size = logits.size(1), k = index.size(1);
  const auto options = logits.options().dtype(acc_dtype(logits.scalar_type()));
  const at::Tensor loss = at::empty({rows}, options), slope = at::empty({rows, k}, options);
  if (rows == 0) return {loss, slope};
  const at::Tensor z = with_unit_stride(logits), i = index.contiguous();
  dispatch_floating(logits.scalar_type(), [&](auto t, auto a) {
    dispatch_index(index.scalar_type(), [&](auto j) {
      using T = decltype(t);
      using A = decltype(a);
      const auto* entry = i.const_data_ptr<decltype(j)>();
      check_index_values("palu::topk_mse", entry, rows, k, vocab_size);
      A *losses = loss.mutable_data_ptr<A>(), *slopes = slope.mutable_data_ptr<A>();
      at::parallel_for(0, rows, row_grain(vocab_size), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          const T* row = z.const_data_ptr<T>() + r * z.stride(0);
          const bool global = center == Center::kGlobalMean;
          const A c = static_cast<A>(global ? sum(row, vocab_size) / vocab_size : constant);
          for (int64_t n = r * k; n < (r + 1) * k; ++n) slopes[n] = static_cast<A>(row[entry[n]]);
          losses[r] = finish_mse(slopes + r * k, k, center, c);
        }
      });
    });
  });
  return {loss, slope};
}

void topk_backward(const at::Tensor& grad, const at::Tensor& slope, const at::Tensor& index, bool through_mean,
                   const at::Tensor& grad_logits) {
  check_topk_backward(grad, slope, index, grad_logits);
  const int64_t rows = index.size(0), vocab_size = grad_logits.size(1), k = index.size(1);
  if (rows == 0) return;
  const at::Tensor g = grad.contiguous(), s = slope.contiguous(), i = index.contiguous();
  dispatch_floating(grad_logits.scalar_type(), [&](auto t, auto a) {
    dispatch_index(index.scalar_type(), [&](auto j) {
      using T = decltype(t);
      using A = decltype(a);
      const auto* entry = i.const_data_ptr<decltype(j)>();
      check_index_values("palu::topk_backward", entry, rows, k, vocab_size);
      advise_huge_pages(grad_logits);
      const A *grads = g.const_data_ptr<A>(), *slopes = s.const_data_ptr<A>();
      at::parallel_for(0, rows, row_grain(vocab_size), [&](int64_t begin, int64_t end) {
        // Duplicates add up in A: in place where the output has that dtype, else in a row of scratch.
        std::vector<A> scratch(std::is_same_v<T, A> ? 0 : vocab_size);
        for (int64_t r = begin; r < end; ++r) {
          T* out = grad_logits.mutable_data_ptr<T>() + r * grad_logits.stride(0);
          A* sums;
          if constexpr (std::is_same_v<T, A>) {
            sums = out;
          } else {
            sums = scratch.data();
          }
          std::fill_n(sums, vocab_size,
                      through_mean ? grad_through_mean(slopes + r * k, k, grads[r], vocab_size) : A(0));
          for (int64_t n = r * k; n < (r + 1) * k; ++n) sums[entry[n]] += grads[r] * slopes[n];
          if constexpr (!std::is_same_v<T, A>) round_to(out, sums, vocab_size);
        }
      });
    });
  });
}

}  // namespace
}  // namespace palu::cpu

TORCH_LIBRARY_IMPL(palu, CPU, m) {
  m.impl("topk_mse", palu::cpu::topk_mse);
  m.impl("topk_backward", palu::cpu::topk_backward);
}
