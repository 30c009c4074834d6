#include "../linear_topk_mse.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "common.h"

namespace palu::cpu {
namespace {

// Asks for the start of each page of a row that is needed soon: the hardware prefetcher follows a
// page once it is being read, but does not cross into the next.
template <typename T>
inline void prefetch_row(const T* row /* [d] */, int64_t d) {
  constexpr int64_t page = 4096, line = 64, lines = 8;
  const char* bytes = reinterpret_cast<const char*>(row);
  const int64_t size = d * static_cast<int64_t>(sizeof(T));
  for (int64_t start = 0; start < size; start += page) {
    for (int64_t i = start; i < std::min(start + lines * line, size); i += line) __builtin_prefetch(bytes + i);
  }
}

}  // namespace

template <typename T, typename A, typename I>
void linear_topk_mse(const A* hidden, const T* weight, int64_t weight_stride, const I* index, const int32_t* order,
                     const T* bias, const A* weight_mean, A* loss, A* residual, int64_t rows, int64_t vocab_size,
                     int64_t d, int64_t k, Target target, A constant) {
  at::parallel_for(0, rows * k, row_grain(d), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t i = order[p], v = index[i];
      if (p + 1 < end) prefetch_row(weight + index[order[p + 1]] * weight_stride, d);
      const A z = dot(hidden + i / k * d, weight + v * weight_stride, d);
      residual[i] = bias ? z + static_cast<A>(bias[v]) : z;
    }
  });
  const double bias_mean = bias && is_global(target) ? sum(bias, vocab_size) / vocab_size : 0;
  at::parallel_for(0, rows, row_grain(d + k), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const A mean = is_global(target) ? dot(hidden + r * d, weight_mean, d) + static_cast<A>(bias_mean) : A(0);
      loss[r] = finish_row(residual + r * k, k, target, mean, constant);
    }
  });
}

template <typename T, typename A, typename I>
void linear_topk_mse_backward(const A* grad, const A* residual, const A* hidden, const T* weight, int64_t weight_stride,
                              const I* index, const int32_t* order, const int32_t* group_end, const A* weight_mean,
                              T* grad_hidden, int64_t grad_hidden_stride, T* grad_weight, int64_t grad_weight_stride,
                              T* grad_bias, int64_t rows, int64_t vocab_size, int64_t d, int64_t k, bool through_mean) {
  // g[r,k] = scale[r] * residual[r,k]
  std::vector<A> scale(rows), share(rows);
  for (int64_t r = 0; r < rows; ++r) {
    scale[r] = A(2) / static_cast<A>(k) * grad[r];
    share[r] = through_mean ? mean_share(residual + r * k, k, scale[r], vocab_size) : A(0);
  }

  if (grad_hidden) {
    const at::Tensor sums = at::zeros({rows, d}, at::CppTypeToScalarType<A>::value);
    A* out = sums.mutable_data_ptr<A>();
    // Threads take columns, not pairs: no sum is split, so the result does not depend on their number.
    constexpr int64_t block = 64;
    at::parallel_for(0, (d + block - 1) / block, 1, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * block, width = std::min(d, end * block) - first;
      for (int64_t p = 0; p < rows * k; ++p) {
        const int64_t i = order[p], r = i / k;
        if (p + 1 < rows * k) prefetch_row(weight + index[order[p + 1]] * weight_stride + first, width);
        add_scaled(out + r * d + first, scale[r] * residual[i], weight + index[i] * weight_stride + first, width);
      }
      for (int64_t r = 0; r < rows; ++r) {
        if (through_mean)
          add_scaled(out + r * d + first, static_cast<A>(vocab_size) * share[r], weight_mean + first, width);
        add_rounded(grad_hidden + r * grad_hidden_stride + first, out + r * d + first, width);
      }
    });
  }

  if (grad_weight || grad_bias) {
    // What every vocabulary entry receives through the mean.
    std::vector<A> common(d);
    double common_bias = 0;
    for (int64_t r = 0; r < rows; ++r) {
      if (grad_weight) add_scaled(common.data(), share[r], hidden + r * d, d);
      common_bias += share[r];
    }
    at::parallel_for(0, vocab_size, row_grain(d), [&](int64_t begin, int64_t end) {
      std::vector<A> sums(d);
      for (int64_t v = begin; v < end; ++v) {
        const int64_t first = v == 0 ? 0 : group_end[v - 1], last = group_end[v];
        if (first == last && !through_mean) continue;
        A bias_sum = static_cast<A>(common_bias);
        if (grad_weight) std::copy(common.begin(), common.end(), sums.begin());
        for (int64_t p = first; p < last; ++p) {
          const int64_t i = order[p], r = i / k;
          const A g = scale[r] * residual[i];
          if (grad_weight) add_scaled(sums.data(), g, hidden + r * d, d);
          bias_sum += g;
        }
        if (grad_weight) add_rounded(grad_weight + v * grad_weight_stride, sums.data(), d);
        if (grad_bias) add_rounded(grad_bias + v, &bias_sum, 1);
      }
    });
  }
}

namespace {

struct Groups {
  at::Tensor order;      // int32 [R*K]: positions in index, grouped by its value
  at::Tensor group_end;  // int32 [V]
};

// A stable counting sort.
template <typename I>
Groups group_by_value(const char* op, const I* index /* [R*K] */, int64_t pairs, int64_t vocab_size) {
  TORCH_CHECK_VALUE(pairs <= std::numeric_limits<int32_t>::max(), op, ": index has ", text(pairs),
                    " elements; split the rows into smaller calls");
  at::Tensor order = at::empty({pairs}, at::kInt), group_end = at::zeros({vocab_size}, at::kInt);
  int32_t *position = order.mutable_data_ptr<int32_t>(), *next = group_end.mutable_data_ptr<int32_t>();
  for (int64_t i = 0; i < pairs; ++i) ++next[index[i]];
  int32_t start = 0;
  for (int64_t v = 0; v < vocab_size; ++v) start += std::exchange(next[v], start);
  for (int64_t i = 0; i < pairs; ++i) position[next[index[i]]++] = static_cast<int32_t>(i);
  return {order, group_end};  // each group's next free position has become its end
}

template <typename T>
const T* data_or_null(const std::optional<at::Tensor>& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

template <typename T>
T* buffer_or_null(const std::optional<at::Tensor>& t) {
  return t ? t->mutable_data_ptr<T>() : nullptr;
}

std::optional<at::Tensor> contiguous(const std::optional<at::Tensor>& t) {
  return t ? std::optional(t->contiguous()) : std::nullopt;
}

std::tuple<at::Tensor, at::Tensor> linear_topk_mse_op(const at::Tensor& hidden, const at::Tensor& weight,
                                                      const at::Tensor& index, const std::optional<at::Tensor>& bias,
                                                      const std::optional<at::Tensor>& weight_mean,
                                                      std::string_view target_name, double constant) {
  const Target target = check_linear_topk_mse(hidden, weight, index, bias, weight_mean, target_name);
  const int64_t rows = hidden.size(0), d = hidden.size(1), vocab_size = weight.size(0), k = index.size(1);
  const auto options = hidden.options().dtype(acc_dtype(hidden.scalar_type()));
  at::Tensor loss = at::empty({rows}, options), residual = at::empty({rows, k}, options);
  if (rows == 0) return {loss, residual};
  const at::Tensor h = hidden.to(options.dtype()).contiguous(), w = unit_last_stride(weight), i = index.contiguous();
  const auto b = contiguous(bias), mean = contiguous(weight_mean);
  dispatch_floating(hidden.scalar_type(), [&](auto t, auto a) {
    dispatch_index(index.scalar_type(), [&](auto j) {
      using T = decltype(t);
      using A = decltype(a);
      using I = decltype(j);
      constexpr const char* op = "palu::linear_topk_mse";
      const I* values = i.const_data_ptr<I>();
      check_index_values(op, values, rows, k, vocab_size);
      const Groups groups = group_by_value(op, values, rows * k, vocab_size);
      linear_topk_mse<T, A, I>(h.const_data_ptr<A>(), w.const_data_ptr<T>(), w.stride(0), values,
                               groups.order.const_data_ptr<int32_t>(), data_or_null<T>(b), data_or_null<A>(mean),
                               loss.mutable_data_ptr<A>(), residual.mutable_data_ptr<A>(), rows, vocab_size, d, k,
                               target, static_cast<A>(constant));
    });
  });
  return {loss, residual};
}

void linear_topk_mse_backward_op(const at::Tensor& grad, const at::Tensor& residual, const at::Tensor& hidden,
                                 const at::Tensor& weight, const at::Tensor& index,
                                 const std::optional<at::Tensor>& weight_mean, bool through_mean,
                                 const std::optional<at::Tensor>& grad_hidden,
                                 const std::optional<at::Tensor>& grad_weight,
                                 const std::optional<at::Tensor>& grad_bias) {
  check_linear_topk_mse_backward(grad, residual, hidden, weight, index, weight_mean, through_mean, grad_hidden,
                                 grad_weight, grad_bias);
  const int64_t rows = hidden.size(0), d = hidden.size(1), vocab_size = weight.size(0), k = index.size(1);
  if (rows == 0) return;
  const at::Tensor h = hidden.to(acc_dtype(hidden.scalar_type())).contiguous(), w = unit_last_stride(weight),
                   i = index.contiguous(), g = grad.contiguous(), res = residual.contiguous();
  const auto mean = contiguous(weight_mean);
  dispatch_floating(hidden.scalar_type(), [&](auto t, auto a) {
    dispatch_index(index.scalar_type(), [&](auto j) {
      using T = decltype(t);
      using A = decltype(a);
      using I = decltype(j);
      constexpr const char* op = "palu::linear_topk_mse_backward";
      const I* values = i.const_data_ptr<I>();
      check_index_values(op, values, rows, k, vocab_size);
      const Groups groups = group_by_value(op, values, rows * k, vocab_size);
      linear_topk_mse_backward<T, A, I>(
          g.const_data_ptr<A>(), res.const_data_ptr<A>(), h.const_data_ptr<A>(), w.const_data_ptr<T>(), w.stride(0),
          values, groups.order.const_data_ptr<int32_t>(), groups.group_end.const_data_ptr<int32_t>(),
          data_or_null<A>(mean), buffer_or_null<T>(grad_hidden), grad_hidden ? grad_hidden->stride(0) : 0,
          buffer_or_null<T>(grad_weight), grad_weight ? grad_weight->stride(0) : 0, buffer_or_null<T>(grad_bias), rows,
          vocab_size, d, k, through_mean);
    });
  });
}

}  // namespace
}  // namespace palu::cpu

TORCH_LIBRARY_IMPL(palu, CPU, m) {
  m.impl("linear_topk_mse", palu::cpu::linear_topk_mse_op);
  m.impl("linear_topk_mse_backward", palu::cpu::linear_topk_mse_backward_op);
}
