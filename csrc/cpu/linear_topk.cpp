// topk_mse and topk_unlikelihood of hidden @ weight^T + bias; formulas and the gradient's derivation are in
// csrc/linear_topk.h.
//
// The pairs (r,k) are visited grouped by vocabulary entry (a stable counting sort), so each row of
// weight is read once and in address order, and every sum has one fixed order.
#include "../linear_topk.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
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

// What forward and backward pass read. Strides count elements, from a row to the next; inside a row elements are
// neighbours.
template <typename Value, typename Sum, typename Index>
struct KeptRows {
  using T = Value;
  using A = Sum;
  using I = Index;
  const A* hidden;  // [R,d], contiguous
  const T* weight;  // [V,d]
  int64_t weight_stride;
  const I* index;            // [R,K], contiguous, every value in [0, V)
  const int32_t* order;      // [R*K], positions in index, grouped by its value
  const int32_t* group_end;  // [V]; the group of entry v is order[group_end[v-1] : group_end[v]]
  int64_t rows, vocab_size, hidden_size, k;

  // Calls f(first, last, row, next) for the pairs [begin, end) in turn: those of [first, last) take the same row of
  // weight, and next is the one that follows it (at the end, the row itself).
  template <typename F>
  void for_each_row(int64_t begin, int64_t end, F f) const {
    for (int64_t first = begin, last; first < end; first = last) {
      const int64_t entry = index[order[first]];
      last = std::min<int64_t>(end, group_end[entry]);
      const T* row = weight + entry * weight_stride;
      f(first, last, row, last < end ? weight + index[order[last]] * weight_stride : row);
    }
  }
};

template <typename P>  // KeptRows
struct LinearTopk : P {
  const typename P::T* bias;         // [V], contiguous, or null
  const typename P::A* weight_mean;  // [d], contiguous; read for the global mean only
  typename P::A* loss;               // [R]
  typename P::A* slope;              // [R,K], contiguous
};

// z[r,k] of pair i, whose row of weight is given.
template <typename P>
typename P::A logit(const LinearTopk<P>& p, int64_t i, const typename P::T* row) {
  const auto z = dot(p.hidden + i / p.k * p.hidden_size, row, p.hidden_size);
  return p.bias ? z + static_cast<typename P::A>(p.bias[p.index[i]]) : z;
}

// c[r], where it does not depend on the kept logits.
template <typename P>
std::vector<typename P::A> targets(const LinearTopk<P>& p, Center center, double constant) {
  using A = typename P::A;
  std::vector<A> c(p.rows, center == Center::kConstant ? static_cast<A>(constant) : A(0));
  if (center == Center::kGlobalMean) {
    const double bias_mean = p.bias ? sum(p.bias, p.vocab_size) / p.vocab_size : 0;
    for (int64_t r = 0; r < p.rows; ++r)
      c[r] = dot(p.hidden + r * p.hidden_size, p.weight_mean, p.hidden_size) + static_cast<A>(bias_mean);
  }
  return c;
}

// Puts the kept logits into slope, of which finish(r, slope[r]) then makes slopes; it returns the row's loss.
template <typename P, typename F>
void gather_logits(const LinearTopk<P>& p, F finish) {
  at::parallel_for(0, p.rows * p.k, row_grain(p.hidden_size), [&](int64_t begin, int64_t end) {
    p.for_each_row(begin, end, [&](int64_t first, int64_t last, const auto* row, const auto* next) {
      prefetch(next, p.hidden_size, 0, 1);
      for (int64_t n = first; n < last; ++n) p.slope[p.order[n]] = logit(p, p.order[n], row);
    });
  });
  at::parallel_for(0, p.rows, row_grain(p.k), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) p.loss[r] = finish(r, p.slope + r * p.k);
  });
}

template <typename P>
void linear_topk_mse(const LinearTopk<P>& p, Center center, double constant) {
  using A = typename P::A;
  const std::vector<A> c = targets(p, center, constant);
  gather_logits(p, [&](int64_t r, A* slope) { return finish_mse(slope, p.k, center, c[r]); });
}

template <typename P>
void linear_topk_unlikelihood(const LinearTopk<P>& p, double floor) {
  using A = typename P::A;
  gather_logits(p, [&](int64_t r, A* slope) {
    const auto* index = p.index + r * p.k;
    A largest = std::numeric_limits<A>::lowest(), mass = 0;  // not -inf, which would leave NaN in z - largest
    for (int64_t j = 1; j < p.k; ++j) {
      if (index[j] == index[0]) slope[j] = -std::numeric_limits<A>::infinity();  // left out
      largest = std::max(largest, slope[j]);
    }
    for (int64_t j = 1; j < p.k; ++j) mass += slope[j] = std::exp(slope[j] - largest);
    const A margin = (slope[0] - largest) - std::log(mass), small = std::exp(-std::abs(margin));  // small in [0, 1]
    const A probability = (margin < 0 ? small : A(1)) / (1 + small);
    if (mass == 0 || probability <= static_cast<A>(floor)) {  // a NaN stays one
      std::fill_n(slope, p.k, A(0));
      return A(0);
    }
    slope[0] = probability;
    for (int64_t j = 1; j < p.k; ++j) slope[j] *= -probability / mass;
    return std::max(margin, A(0)) + std::log1p(small);
  });
}

// The loss and its gradient for hidden, for a target that is known before the kept logits: a row of weight is
// multiplied and added while it is in the cache, so each is read once for both.
//
// The pairs are cut into slices, each with sums of its own, which are added up in order: how many depends on the sizes
// alone, and so do the bits. There are K/64, rounded up to a power of two, and 64 at most, so that the sums are few
// beside the rows.
template <typename P>
void linear_topk_mse_frozen(const LinearTopk<P>& p, Center center, double constant, bool through_mean,
                            typename P::A* grad_hidden /* [R,d], contiguous */) {
  using A = typename P::A;
  const int64_t rows = p.rows, d = p.hidden_size, k = p.k, pairs = rows * k;
  const std::vector<A> c = targets(p, center, constant);
  int64_t slices = 1;
  while (slices < 64 && 64 * slices < k) slices *= 2;
  const at::Tensor partial = at::empty({slices, rows, d}, at::CppTypeToScalarType<A>::value);
  A* sums = partial.mutable_data_ptr<A>();
  at::parallel_for(0, slices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      A* out = sums + s * rows * d;
      std::fill_n(out, rows * d, A(0));
      const int64_t from = pairs * s / slices, to = pairs * (s + 1) / slices;
      p.for_each_row(from, to, [&](int64_t first, int64_t last, const auto* row, const auto* next) {
        // Half of the next row before each of the two loops, so that there is something to wait for in both.
        prefetch(next, d, 0, 2);
        for (int64_t n = first; n < last; ++n) {
          const int64_t i = p.order[n], r = i / k;
          p.slope[i] = A(2) / static_cast<A>(k) * (logit(p, i, row) - c[r]);
          if (n == first) prefetch(next, d, 1, 2);
          add_scaled(out + r * d, p.slope[i], row, d);
        }
      });
    }
  });
  at::parallel_for(0, rows, row_grain(slices * d + k), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const A* slope = p.slope + r * k;
      p.loss[r] = dot(slope, slope, k) * static_cast<A>(k) / A(4);
      A* out = grad_hidden + r * d;
      std::copy_n(sums + r * d, d, out);
      for (int64_t s = 1; s < slices; ++s) add_scaled(out, A(1), sums + (s * rows + r) * d, d);
      if (through_mean)
        add_scaled(out, static_cast<A>(p.vocab_size) * grad_through_mean(slope, k, A(1), p.vocab_size), p.weight_mean,
                   d);
    }
  });
}

template <typename P>  // KeptRows
struct LinearTopkBackward : P {
  const typename P::A* grad;         // [R]
  const typename P::A* slope;        // [R,K], contiguous
  const typename P::A* weight_mean;  // [d], contiguous; read only if through_mean
  typename P::T* grad_hidden;        // [R,d], or null: not asked for
  int64_t grad_hidden_stride;
  typename P::T* grad_weight;  // [V,d], or null: not asked for
  int64_t grad_weight_stride;
  typename P::T* grad_bias;  // [V], contiguous, or null: not asked for
  bool through_mean;
};

template <typename P>
void linear_topk_backward(const LinearTopkBackward<P>& p) {
  using A = typename P::A;
  const int64_t rows = p.rows, d = p.hidden_size, k = p.k;
  std::vector<A> grads_through_mean(rows);
  for (int64_t r = 0; p.through_mean && r < rows; ++r)
    grads_through_mean[r] = grad_through_mean(p.slope + r * k, k, p.grad[r], p.vocab_size);

  if (p.grad_hidden) {
    const at::Tensor sums = at::zeros({rows, d}, at::CppTypeToScalarType<A>::value);
    A* out = sums.mutable_data_ptr<A>();
    // Threads take columns, not pairs: no sum is split, so the result does not depend on their number.
    constexpr int64_t block = 64;
    at::parallel_for(0, (d + block - 1) / block, 1, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * block, width = std::min(d, end * block) - first;
      p.for_each_row(0, rows * k, [&](int64_t from, int64_t to, const auto* row, const auto* next) {
        prefetch(next + first, width, 0, 1);
        for (int64_t n = from; n < to; ++n) {
          const int64_t i = p.order[n], r = i / k;
          add_scaled(out + r * d + first, p.grad[r] * p.slope[i], row + first, width);
        }
      });
      for (int64_t r = 0; r < rows; ++r) {
        if (p.through_mean)
          add_scaled(out + r * d + first, static_cast<A>(p.vocab_size) * grads_through_mean[r], p.weight_mean + first,
                     width);
        add_rounded(p.grad_hidden + r * p.grad_hidden_stride + first, out + r * d + first, width);
      }
    });
  }

  if (p.grad_weight || p.grad_bias) {
    // What every vocabulary entry receives through the mean.
    std::vector<A> common_row(d);
    double common_bias = 0;
    for (int64_t r = 0; r < rows; ++r) {
      if (p.grad_weight) add_scaled(common_row.data(), grads_through_mean[r], p.hidden + r * d, d);
      common_bias += grads_through_mean[r];
    }
    at::parallel_for(0, p.vocab_size, row_grain(d), [&](int64_t begin, int64_t end) {
      std::vector<A> sums(d);
      for (int64_t v = begin; v < end; ++v) {
        const int64_t first = v == 0 ? 0 : p.group_end[v - 1], last = p.group_end[v];
        if (first == last && !p.through_mean) continue;
        A bias_sum = static_cast<A>(common_bias);
        if (p.grad_weight) std::copy(common_row.begin(), common_row.end(), sums.begin());
        for (int64_t n = first; n < last; ++n) {
          const int64_t i = p.order[n], r = i / k;
          const A g = p.grad[r] * p.slope[i];
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

// Calls f with the kept rows of weight (KeptRows), for arguments that have been checked but for the index's values.
template <typename F>
void dispatch_kept_rows(const char* op, const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& index,
                        F f) {
  const int64_t rows = hidden.size(0), vocab_size = weight.size(0), k = index.size(1);
  if (rows == 0) return;
  const at::Tensor h = hidden.to(acc_dtype(hidden.scalar_type())).contiguous(), w = with_unit_stride(weight),
                   i = index.contiguous();
  dispatch_floating(hidden.scalar_type(), [&](auto t, auto a) {
    dispatch_index(index.scalar_type(), [&](auto j) {
      KeptRows<decltype(t), decltype(a), decltype(j)> p{};
      p.index = i.const_data_ptr<decltype(j)>();
      check_index_values(op, p.index, rows, k, vocab_size);
      const Groups groups = group_by_value(op, p.index, rows * k, vocab_size);
      p.hidden = h.const_data_ptr<decltype(a)>();
      p.weight = w.const_data_ptr<decltype(t)>();
      p.weight_stride = w.stride(0);
      p.order = groups.order.const_data_ptr<int32_t>();
      p.group_end = groups.group_end.const_data_ptr<int32_t>();
      p.rows = rows;
      p.vocab_size = vocab_size;
      p.hidden_size = hidden.size(1);
      p.k = k;
      f(p);
    });
  });
}

// Returns losses and slopes, which f(p) fills, with p a LinearTopk.
template <typename F>
std::tuple<at::Tensor, at::Tensor> run_linear_topk(const char* op, const at::Tensor& hidden, const at::Tensor& weight,
                                                   const at::Tensor& index, const std::optional<at::Tensor>& bias,
                                                   const std::optional<at::Tensor>& weight_mean, F f) {
  const auto options = hidden.options().dtype(acc_dtype(hidden.scalar_type()));
  at::Tensor loss = at::empty({hidden.size(0)}, options), slope = at::empty(index.sizes(), options);
  const auto b = contiguous(bias), mean = contiguous(weight_mean);
  dispatch_kept_rows(op, hidden, weight, index, [&](auto kept) {
    using P = decltype(kept);
    LinearTopk<P> p{kept};
    p.bias = data_or_null<typename P::T>(b);
    p.weight_mean = data_or_null<typename P::A>(mean);
    p.loss = loss.mutable_data_ptr<typename P::A>();
    p.slope = slope.mutable_data_ptr<typename P::A>();
    f(p);
  });
  return {loss, slope};
}

std::tuple<at::Tensor, at::Tensor> linear_topk_mse_op(const at::Tensor& hidden, const at::Tensor& weight,
                                                      const at::Tensor& index, const std::optional<at::Tensor>& bias,
                                                      const std::optional<at::Tensor>& weight_mean,
                                                      std::string_view target, double constant) {
  const Center center = check_linear_topk_mse(hidden, weight, index, bias, weight_mean, target);
  return run_linear_topk("palu::linear_topk_mse", hidden, weight, index, bias, weight_mean,
                         [&](const auto& p) { linear_topk_mse(p, center, constant); });
}

std::tuple<at::Tensor, at::Tensor> linear_topk_mse_frozen_op(const at::Tensor& hidden, const at::Tensor& weight,
                                                             const at::Tensor& index,
                                                             const std::optional<at::Tensor>& bias,
                                                             const std::optional<at::Tensor>& weight_mean,
                                                             std::string_view target, double constant) {
  constexpr const char* op = "palu::linear_topk_mse_frozen";
  const Center center = check_linear_topk_mse(hidden, weight, index, bias, weight_mean, target);
  TORCH_CHECK_VALUE(center != Center::kLocalMean, op, ": target 'local_mean' is known too late");
  at::Tensor grad_hidden = at::empty(hidden.sizes(), hidden.options().dtype(acc_dtype(hidden.scalar_type())));
  at::Tensor loss;
  std::tie(loss, std::ignore) = run_linear_topk(op, hidden, weight, index, bias, weight_mean, [&](const auto& p) {
    using A = std::remove_pointer_t<decltype(p.loss)>;
    linear_topk_mse_frozen(p, center, constant, target == "global_mean", grad_hidden.mutable_data_ptr<A>());
  });
  return {loss, grad_hidden};
}

std::tuple<at::Tensor, at::Tensor> linear_topk_unlikelihood_op(const at::Tensor& hidden, const at::Tensor& weight,
                                                               const at::Tensor& index,
                                                               const std::optional<at::Tensor>& bias, double floor) {
  check_linear_topk_unlikelihood(hidden, weight, index, bias, floor);
  return run_linear_topk("palu::linear_topk_unlikelihood", hidden, weight, index, bias, std::nullopt,
                         [&](const auto& p) { linear_topk_unlikelihood(p, floor); });
}

void linear_topk_backward_op(const at::Tensor& grad, const at::Tensor& slope, const at::Tensor& hidden,
                             const at::Tensor& weight, const at::Tensor& index,
                             const std::optional<at::Tensor>& weight_mean, bool through_mean,
                             const std::optional<at::Tensor>& grad_hidden, const std::optional<at::Tensor>& grad_weight,
                             const std::optional<at::Tensor>& grad_bias) {
  check_linear_topk_backward(grad, slope, hidden, weight, index, weight_mean, through_mean, grad_hidden, grad_weight,
                             grad_bias);
  const at::Tensor g = grad.contiguous(), s = slope.contiguous();
  const auto mean = contiguous(weight_mean);
  dispatch_kept_rows("palu::linear_topk_backward", hidden, weight, index, [&](auto kept) {
    using P = decltype(kept);
    LinearTopkBackward<P> p{kept};
    p.grad = g.const_data_ptr<typename P::A>();
    p.slope = s.const_data_ptr<typename P::A>();
    p.weight_mean = data_or_null<typename P::A>(mean);
    p.grad_hidden = buffer_or_null<typename P::T>(grad_hidden);
    p.grad_hidden_stride = grad_hidden ? grad_hidden->stride(0) : 0;
    p.grad_weight = buffer_or_null<typename P::T>(grad_weight);
    p.grad_weight_stride = grad_weight ? grad_weight->stride(0) : 0;
    p.grad_bias = buffer_or_null<typename P::T>(grad_bias);
    p.through_mean = through_mean;
    linear_topk_backward(p);
  });
}

}  // namespace
}  // namespace palu::cpu

TORCH_LIBRARY_IMPL(palu, CPU, m) {
  m.impl("linear_topk_mse", palu::cpu::linear_topk_mse_op);
  m.impl("linear_topk_mse_frozen", palu::cpu::linear_topk_mse_frozen_op);
  m.impl("linear_topk_unlikelihood", palu::cpu::linear_topk_unlikelihood_op);
  m.impl("linear_topk_backward", palu::cpu::linear_topk_backward_op);
}
