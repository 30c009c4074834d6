// topk_mse of hidden @ weight^T + bias; formulas and the gradient's derivation are in csrc/linear_topk_mse.h.
//
// The pairs (r,k) are visited grouped by vocabulary entry (a stable counting sort), so each row of
// weight is read once and in address order, and every sum has one fixed order.
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

// Asks for a share of a row that is needed soon: `part` of `parts`. The second-level cache takes it, because the first
// can wait for fewer lines at a time. The two halves take turns, so that two pages are under way at once. One line a
// turn is a pace that the core can keep: unrolled, the loop took up to a third longer.
template <typename T>
inline void prefetch(const T* row /* [d] */, uint64_t d, uint64_t part, uint64_t parts) {
  constexpr uint64_t line = 64 / sizeof(T);
  const uint64_t lines = d / line, end = lines * (part + 1) / parts;
  for (uint64_t i = lines * part / parts; i < end; ++i) __builtin_prefetch(row + i % 2 * (d / 2) + i / 2 * line, 0, 2);
}

// Calls f(first, last, row, next) for the pairs [begin, end) in turn: those of [first, last) take the same row of
// weight, and next is the one that follows it (at the end, the row itself).
template <typename P, typename F>
void for_each_row(const P& p, int64_t begin, int64_t end, F f) {
  for (int64_t first = begin, last; first < end; first = last) {
    const int64_t entry = p.index[p.order[first]];
    last = std::min<int64_t>(end, p.group_end[entry]);
    const auto* row = p.weight + entry * p.weight_stride;
    f(first, last, row, last < end ? p.weight + p.index[p.order[last]] * p.weight_stride : row);
  }
}

// Strides count elements, from a row to the next; inside a row elements are neighbours.
template <typename T, typename A, typename I>
struct LinearTopkMse {
  const A* hidden;  // [R,d], contiguous
  const T* weight;  // [V,d]
  int64_t weight_stride;
  const I* index;            // [R,K], contiguous, every value in [0, V)
  const int32_t* order;      // [R*K], positions in index, grouped by its value
  const int32_t* group_end;  // [V]; the group of entry v is order[group_end[v-1] : group_end[v]]
  const T* bias;             // [V], contiguous, or null
  const A* weight_mean;      // [d], contiguous; read for the global mean only
  A* loss;                   // [R]
  A* residual;               // [R,K], contiguous
  A* grad_hidden;            // [R,d], contiguous, or null: not asked for
  int64_t rows, vocab_size, hidden_size, k;
  Center center;
  A constant;

  // That of pair i, whose row of weight is given.
  A logit(int64_t i, const T* row) const {
    const A z = dot(hidden + i / k * hidden_size, row, hidden_size);
    return bias ? z + static_cast<A>(bias[index[i]]) : z;
  }
  // c[r], where it does not depend on the kept logits.
  std::vector<A> targets() const {
    std::vector<A> c(rows, center == Center::kConstant ? constant : A(0));
    if (center == Center::kGlobalMean) {
      const double bias_mean = bias ? sum(bias, vocab_size) / vocab_size : 0;
      for (int64_t r = 0; r < rows; ++r)
        c[r] = dot(hidden + r * hidden_size, weight_mean, hidden_size) + static_cast<A>(bias_mean);
    }
    return c;
  }
};

template <typename T, typename A, typename I>
void linear_topk_mse(const LinearTopkMse<T, A, I>& p) {
  const int64_t k = p.k;
  at::parallel_for(0, p.rows * k, row_grain(p.hidden_size), [&](int64_t begin, int64_t end) {
    for_each_row(p, begin, end, [&](int64_t first, int64_t last, const T* row, const T* next) {
      prefetch(next, p.hidden_size, 0, 1);
      for (int64_t n = first; n < last; ++n) p.residual[p.order[n]] = p.logit(p.order[n], row);
    });
  });
  const std::vector<A> c = p.targets();
  at::parallel_for(0, p.rows, row_grain(k), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) p.loss[r] = finish_row(p.residual + r * k, k, p.center, c[r], p.constant);
  });
}

// The loss and its gradient for hidden, for a target that is known before the kept logits: a row of weight is
// multiplied and added while it is in the cache, so each is read once for both.
//
// The pairs are cut into slices, each with sums of its own, which are added up in order: how many depends on the sizes
// alone, and so do the bits. There are K/64 at most, so that the sums are few beside the rows.
template <typename T, typename A, typename I>
void linear_topk_mse_frozen(const LinearTopkMse<T, A, I>& p, bool through_mean) {
  const int64_t rows = p.rows, d = p.hidden_size, k = p.k, pairs = rows * k;
  const std::vector<A> c = p.targets();
  int64_t slices = 1;
  while (slices < 64 && 64 * slices < k) slices *= 2;
  const at::Tensor partial = at::empty({slices, rows, d}, at::CppTypeToScalarType<A>::value);
  A* sums = partial.mutable_data_ptr<A>();
  at::parallel_for(0, slices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      A* out = sums + s * rows * d;
      std::fill_n(out, rows * d, A(0));
      const int64_t from = pairs * s / slices, to = pairs * (s + 1) / slices;
      for_each_row(p, from, to, [&](int64_t first, int64_t last, const T* row, const T* next) {
        // Half of the next row before each of the two loops, so that there is something to wait for in both.
        prefetch(next, d, 0, 2);
        for (int64_t n = first; n < last; ++n) {
          const int64_t i = p.order[n], r = i / k;
          p.residual[i] = p.logit(i, row) - c[r];
          if (n == first) prefetch(next, d, 1, 2);
          add_scaled(out + r * d, p.residual[i], row, d);
        }
      });
    }
  });
  at::parallel_for(0, rows, row_grain(slices * d + k), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const A* residual = p.residual + r * k;
      p.loss[r] = dot(residual, residual, k) / static_cast<A>(k);
      A* out = sums + r * d;
      for (int64_t s = 1; s < slices; ++s) add_scaled(out, A(1), sums + (s * rows + r) * d, d);
      if (through_mean)
        add_scaled(out, static_cast<A>(p.vocab_size) * mean_share(residual, k, A(1), p.vocab_size), p.weight_mean, d);
      for (int64_t j = 0; j < d; ++j) p.grad_hidden[r * d + j] = A(2) / static_cast<A>(k) * out[j];
    }
  });
}

template <typename T, typename A, typename I>
struct LinearTopkMseBackward {
  const A* grad;      // [R]
  const A* residual;  // [R,K], contiguous
  const A* hidden;    // [R,d], contiguous
  const T* weight;    // [V,d]
  int64_t weight_stride;
  const I* index;            // [R,K], contiguous, every value in [0, V)
  const int32_t* order;      // [R*K], positions in index, grouped by its value
  const int32_t* group_end;  // [V]; the group of entry v is order[group_end[v-1] : group_end[v]]
  const A* weight_mean;      // [d], contiguous; read only if through_mean
  T* grad_hidden;            // [R,d], or null: not asked for
  int64_t grad_hidden_stride;
  T* grad_weight;  // [V,d], or null: not asked for
  int64_t grad_weight_stride;
  T* grad_bias;  // [V], contiguous, or null: not asked for
  int64_t rows, vocab_size, hidden_size, k;
  bool through_mean;
};

template <typename T, typename A, typename I>
void linear_topk_mse_backward(const LinearTopkMseBackward<T, A, I>& p) {
  const int64_t rows = p.rows, d = p.hidden_size, k = p.k;
  // g[r,k] = scale[r] * residual[r,k]
  std::vector<A> scale(rows), share(rows);
  for (int64_t r = 0; r < rows; ++r) {
    scale[r] = A(2) / static_cast<A>(k) * p.grad[r];
    share[r] = p.through_mean ? mean_share(p.residual + r * k, k, scale[r], p.vocab_size) : A(0);
  }

  if (p.grad_hidden) {
    const at::Tensor sums = at::zeros({rows, d}, at::CppTypeToScalarType<A>::value);
    A* out = sums.mutable_data_ptr<A>();
    // Threads take columns, not pairs: no sum is split, so the result does not depend on their number.
    constexpr int64_t block = 64;
    at::parallel_for(0, (d + block - 1) / block, 1, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * block, width = std::min(d, end * block) - first;
      for_each_row(p, 0, rows * k, [&](int64_t from, int64_t to, const T* row, const T* next) {
        prefetch(next + first, width, 0, 1);
        for (int64_t n = from; n < to; ++n) {
          const int64_t i = p.order[n], r = i / k;
          add_scaled(out + r * d + first, scale[r] * p.residual[i], row + first, width);
        }
      });
      for (int64_t r = 0; r < rows; ++r) {
        if (p.through_mean)
          add_scaled(out + r * d + first, static_cast<A>(p.vocab_size) * share[r], p.weight_mean + first, width);
        add_rounded(p.grad_hidden + r * p.grad_hidden_stride + first, out + r * d + first, width);
      }
    });
  }

  if (p.grad_weight || p.grad_bias) {
    // What every vocabulary entry receives through the mean.
    std::vector<A> common(d);
    double common_bias = 0;
    for (int64_t r = 0; r < rows; ++r) {
      if (p.grad_weight) add_scaled(common.data(), share[r], p.hidden + r * d, d);
      common_bias += share[r];
    }
    at::parallel_for(0, p.vocab_size, row_grain(d), [&](int64_t begin, int64_t end) {
      std::vector<A> sums(d);
      for (int64_t v = begin; v < end; ++v) {
        const int64_t first = v == 0 ? 0 : p.group_end[v - 1], last = p.group_end[v];
        if (first == last && !p.through_mean) continue;
        A bias_sum = static_cast<A>(common_bias);
        if (p.grad_weight) std::copy(common.begin(), common.end(), sums.begin());
        for (int64_t n = first; n < last; ++n) {
          const int64_t i = p.order[n], r = i / k;
          const A g = scale[r] * p.residual[i];
          if (p.grad_weight) add_scaled(sums.data(), g, p.hidden + r * d, d);
          bias_sum += g;
        }
        if (p.grad_weight) add_rounded(p.grad_weight + v * p.grad_weight_stride, sums.data(), d);
        if (p.grad_bias) add_rounded(p.grad_bias + v, &bias_sum, 1);
      }
    });
  }
}

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

// Of each row the loss, and its residual [R,K] or (`frozen`) its gradient for hidden [R,d].
std::tuple<at::Tensor, at::Tensor> run_linear_topk_mse(const char* op, bool frozen, const at::Tensor& hidden,
                                                       const at::Tensor& weight, const at::Tensor& index,
                                                       const std::optional<at::Tensor>& bias,
                                                       const std::optional<at::Tensor>& weight_mean,
                                                       std::string_view target, double constant) {
  const Center center = check_linear_topk_mse(hidden, weight, index, bias, weight_mean, target);
  TORCH_CHECK_VALUE(!frozen || center != Center::kLocalMean, op, ": target 'local_mean' is known too late");
  const int64_t rows = hidden.size(0), d = hidden.size(1), vocab_size = weight.size(0), k = index.size(1);
  const auto options = hidden.options().dtype(acc_dtype(hidden.scalar_type()));
  at::Tensor loss = at::empty({rows}, options), residual = at::empty({rows, k}, options), grad_hidden;
  if (frozen) grad_hidden = at::empty({rows, d}, options);
  if (rows == 0) return {loss, frozen ? grad_hidden : residual};
  const at::Tensor h = hidden.to(options.dtype()).contiguous(), w = unit_last_stride(weight), i = index.contiguous();
  const auto b = contiguous(bias), mean = contiguous(weight_mean);
  dispatch_floating(hidden.scalar_type(), [&](auto t, auto a) {
    dispatch_index(index.scalar_type(), [&](auto j) {
      using T = decltype(t);
      using A = decltype(a);
      using I = decltype(j);
      const I* values = i.const_data_ptr<I>();
      check_index_values(op, values, rows, k, vocab_size);
      const Groups groups = group_by_value(op, values, rows * k, vocab_size);
      LinearTopkMse<T, A, I> p{};
      p.hidden = h.const_data_ptr<A>();
      p.weight = w.const_data_ptr<T>();
      p.weight_stride = w.stride(0);
      p.index = values;
      p.order = groups.order.const_data_ptr<int32_t>();
      p.group_end = groups.group_end.const_data_ptr<int32_t>();
      p.bias = data_or_null<T>(b);
      p.weight_mean = data_or_null<A>(mean);
      p.loss = loss.mutable_data_ptr<A>();
      p.residual = residual.mutable_data_ptr<A>();
      p.rows = rows;
      p.vocab_size = vocab_size;
      p.hidden_size = d;
      p.k = k;
      p.center = center;
      p.constant = static_cast<A>(constant);
      if (frozen) {
        p.grad_hidden = grad_hidden.mutable_data_ptr<A>();
        linear_topk_mse_frozen(p, target == "global_mean");
      } else {
        linear_topk_mse(p);
      }
    });
  });
  return {loss, frozen ? grad_hidden : residual};
}

std::tuple<at::Tensor, at::Tensor> linear_topk_mse_op(const at::Tensor& hidden, const at::Tensor& weight,
                                                      const at::Tensor& index, const std::optional<at::Tensor>& bias,
                                                      const std::optional<at::Tensor>& weight_mean,
                                                      std::string_view target, double constant) {
  return run_linear_topk_mse("palu::linear_topk_mse", false, hidden, weight, index, bias, weight_mean, target,
                             constant);
}

std::tuple<at::Tensor, at::Tensor> linear_topk_mse_frozen_op(const at::Tensor& hidden, const at::Tensor& weight,
                                                             const at::Tensor& index,
                                                             const std::optional<at::Tensor>& bias,
                                                             const std::optional<at::Tensor>& weight_mean,
                                                             std::string_view target, double constant) {
  return run_linear_topk_mse("palu::linear_topk_mse_frozen", true, hidden, weight, index, bias, weight_mean, target,
                             constant);
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
      LinearTopkMseBackward<T, A, I> p{};
      p.grad = g.const_data_ptr<A>();
      p.residual = res.const_data_ptr<A>();
      p.hidden = h.const_data_ptr<A>();
      p.weight = w.const_data_ptr<T>();
      p.weight_stride = w.stride(0);
      p.index = values;
      p.order = groups.order.const_data_ptr<int32_t>();
      p.group_end = groups.group_end.const_data_ptr<int32_t>();
      p.weight_mean = data_or_null<A>(mean);
      p.grad_hidden = buffer_or_null<T>(grad_hidden);
      p.grad_hidden_stride = grad_hidden ? grad_hidden->stride(0) : 0;
      p.grad_weight = buffer_or_null<T>(grad_weight);
      p.grad_weight_stride = grad_weight ? grad_weight->stride(0) : 0;
      p.grad_bias = buffer_or_null<T>(grad_bias);
      p.rows = rows;
      p.vocab_size = vocab_size;
      p.hidden_size = d;
      p.k = k;
      p.through_mean = through_mean;
      linear_topk_mse_backward(p);
    });
  });
}

}  // namespace
}  // namespace palu::cpu

TORCH_LIBRARY_IMPL(palu, CPU, m) {
  m.impl("linear_topk_mse", palu::cpu::linear_topk_mse_op);
  m.impl("linear_topk_mse_frozen", palu::cpu::linear_topk_mse_frozen_op);
  m.impl("linear_topk_mse_backward", palu::cpu::linear_topk_mse_backward_op);
}
