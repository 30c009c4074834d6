// The CUDA kernels of the palu ops: argument checks, strides, allocations and the current stream.
// The schemas are in csrc/ops.cpp, the kernels behind launch.h.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <string_view>
#include <tuple>

#include "../checks.h"
#include "launch.h"

namespace palu {
namespace {

using cuda::Dtype;

// Makes the tensor's device current, and knows its current stream.
struct OnDeviceOf {
  explicit OnDeviceOf(const at::Tensor& t)
      : guard(t.device()), stream(c10::cuda::getCurrentCUDAStream(t.device().index())) {}
  c10::cuda::CUDAGuard guard;
  cudaStream_t stream;
};

Dtype dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return Dtype::kFloat;
    case at::kDouble: return Dtype::kDouble;
    case at::kHalf: return Dtype::kHalf;
    case at::kBFloat16: return Dtype::kBFloat16;
    default: TORCH_INTERNAL_ASSERT(false, "palu: a dtype that the checks let through");
  }
}

bool is_int64(const at::Tensor& index) { return index.scalar_type() == at::kLong; }

at::TensorOptions acc_options(const at::Tensor& t) { return t.options().dtype(acc_dtype(t.scalar_type())); }

const void* data_or_null(const std::optional<at::Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }
void* buffer_or_null(const std::optional<at::Tensor>& t) { return t ? t->mutable_data_ptr() : nullptr; }

at::Tensor prefix_mask(const at::Tensor& labels, int64_t n, std::optional<int64_t> eos_token_id) {
  check_prefix_mask(labels, n);
  const OnDeviceOf device(labels);
  at::Tensor mask = at::empty(labels.sizes(), labels.options().dtype(at::kBool));
  cuda::PrefixMask p{};
  p.labels = labels.const_data_ptr<int64_t>();
  p.batch_stride = labels.stride(0);
  p.token_stride = labels.stride(1);
  p.mask = mask.mutable_data_ptr<bool>();
  p.batch = labels.size(0);
  p.length = labels.size(1);
  p.n = n;
  p.eos = eos_token_id.value_or(-1);
  cuda::prefix_mask(p, device.stream);
  return mask;
}

std::tuple<at::Tensor, at::Tensor> topk_mse(const at::Tensor& logits, const at::Tensor& index, std::string_view target,
                                            double constant) {
  const Center center = check_topk_mse(logits, index, target);
  const OnDeviceOf device(logits);
  const at::Tensor z = with_unit_stride(logits), i = index.contiguous();
  at::Tensor loss = at::empty({z.size(0)}, acc_options(z));
  at::Tensor slope = at::empty(i.sizes(), acc_options(z));
  cuda::TopkMse p{};
  p.dtype = dtype_of(z);
  p.index64 = is_int64(i);
  p.logits = z.const_data_ptr();
  p.logits_stride = z.stride(0);
  p.index = i.const_data_ptr();
  p.loss = loss.mutable_data_ptr();
  p.slope = slope.mutable_data_ptr();
  p.rows = z.size(0);
  p.vocab_size = z.size(1);
  p.k = i.size(1);
  p.center = center;
  p.constant = constant;
  cuda::topk_mse(p, device.stream);
  return {loss, slope};
}

void topk_backward(const at::Tensor& grad, const at::Tensor& slope, const at::Tensor& index, bool through_mean,
                   const at::Tensor& grad_logits) {
  check_topk_backward(grad, slope, index, grad_logits);
  const OnDeviceOf device(grad_logits);
  const at::Tensor g = grad.contiguous(), e = slope.contiguous(), i = index.contiguous();
  cuda::TopkBackward p{};
  p.dtype = dtype_of(grad_logits);
  p.index64 = is_int64(i);
  p.grad = g.const_data_ptr();
  p.slope = e.const_data_ptr();
  p.index = i.const_data_ptr();
  p.grad_logits = grad_logits.mutable_data_ptr();
  p.grad_logits_stride = grad_logits.stride(0);
  p.rows = grad_logits.size(0);
  p.vocab_size = grad_logits.size(1);
  p.k = i.size(1);
  p.through_mean = through_mean;
  cuda::topk_backward(p, device.stream);
}

// Returns losses and slopes, which launch(p) fills, with p a cuda::LinearTopk.
template <typename F>
std::tuple<at::Tensor, at::Tensor> run_linear_topk(const at::Tensor& hidden, const at::Tensor& weight,
                                                   const at::Tensor& index, const std::optional<at::Tensor>& bias,
                                                   F launch) {
  const at::Tensor h = hidden.contiguous(), w = with_unit_stride(weight), i = index.contiguous();
  std::optional<at::Tensor> b;
  if (bias) b = bias->contiguous();
  at::Tensor loss = at::empty({h.size(0)}, acc_options(h));
  at::Tensor slope = at::empty(i.sizes(), acc_options(h));
  cuda::LinearTopk p{};
  p.dtype = dtype_of(h);
  p.index64 = is_int64(i);
  p.hidden = h.const_data_ptr();
  p.weight = w.const_data_ptr();
  p.weight_stride = w.stride(0);
  p.index = i.const_data_ptr();
  p.bias = data_or_null(b);
  p.loss = loss.mutable_data_ptr();
  p.slope = slope.mutable_data_ptr();
  p.rows = h.size(0);
  p.vocab_size = w.size(0);
  p.hidden_size = h.size(1);
  p.k = i.size(1);
  launch(p);
  return {loss, slope};
}

std::tuple<at::Tensor, at::Tensor> linear_topk_mse(const at::Tensor& hidden, const at::Tensor& weight,
                                                   const at::Tensor& index, const std::optional<at::Tensor>& bias,
                                                   const std::optional<at::Tensor>& weight_mean,
                                                   std::string_view target, double constant) {
  const Center center = check_linear_topk_mse(hidden, weight, index, bias, weight_mean, target);
  const OnDeviceOf device(hidden);
  std::optional<at::Tensor> w_mean, b_mean;
  if (center == Center::kGlobalMean) {
    w_mean = weight_mean->contiguous();
    if (bias) b_mean = bias->mean(0, /*keepdim=*/false, acc_dtype(hidden.scalar_type()));
  }
  return run_linear_topk(hidden, weight, index, bias, [&](cuda::LinearTopk& p) {
    p.weight_mean = data_or_null(w_mean);
    p.bias_mean = data_or_null(b_mean);
    p.center = center;
    p.constant = constant;
    cuda::linear_topk_mse(p, device.stream);
  });
}

std::tuple<at::Tensor, at::Tensor> linear_topk_unlikelihood(const at::Tensor& hidden, const at::Tensor& weight,
                                                            const at::Tensor& index,
                                                            const std::optional<at::Tensor>& bias, double floor) {
  check_linear_topk_unlikelihood(hidden, weight, index, bias, floor);
  const OnDeviceOf device(hidden);
  return run_linear_topk(hidden, weight, index, bias, [&](cuda::LinearTopk& p) {
    p.floor = floor;
    cuda::linear_topk_unlikelihood(p, device.stream);
  });
}

void linear_topk_backward(const at::Tensor& grad, const at::Tensor& slope, const at::Tensor& hidden,
                          const at::Tensor& weight, const at::Tensor& index,
                          const std::optional<at::Tensor>& weight_mean, bool through_mean,
                          const std::optional<at::Tensor>& grad_hidden, const std::optional<at::Tensor>& grad_weight,
                          const std::optional<at::Tensor>& grad_bias) {
  check_linear_topk_backward(grad, slope, hidden, weight, index, weight_mean, through_mean, grad_hidden, grad_weight,
                             grad_bias);
  const int64_t rows = hidden.size(0), d = hidden.size(1), vocab_size = weight.size(0);
  const int64_t k = index.size(1);
  if (rows == 0) return;
  const OnDeviceOf device(hidden);
  const at::Tensor g = grad.contiguous(), e = slope.contiguous(), i = index.contiguous();
  cuda::LinearTopkBackward p{};
  p.dtype = dtype_of(hidden);
  p.index64 = is_int64(i);
  p.grad = g.const_data_ptr();
  p.slope = e.const_data_ptr();
  p.rows = rows;
  p.vocab_size = vocab_size;
  p.hidden_size = d;
  p.k = k;

  at::Tensor grad_through_mean;
  if (through_mean) {
    grad_through_mean = at::empty({rows}, acc_options(hidden));
    p.grad_through_mean = grad_through_mean.mutable_data_ptr();
    cuda::linear_grad_through_mean(p, device.stream);
  }
  if (grad_hidden) {
    const at::Tensor w = with_unit_stride(weight);
    std::optional<at::Tensor> w_mean;
    if (through_mean) w_mean = weight_mean->contiguous();
    const int64_t slices = cuda::linear_grad_hidden_slices(rows, k);
    at::Tensor partial = at::empty({slices, rows, d}, acc_options(hidden));
    p.weight = w.const_data_ptr();
    p.weight_stride = w.stride(0);
    p.index = i.const_data_ptr();
    p.weight_mean = data_or_null(w_mean);
    p.partial = partial.mutable_data_ptr();
    p.grad_hidden = grad_hidden->mutable_data_ptr();
    p.grad_hidden_stride = grad_hidden->stride(0);
    cuda::linear_grad_hidden(p, device.stream);
  }
  if (grad_weight || grad_bias) {
    const at::Tensor h = hidden.contiguous();
    // Stable, so that the terms of an entry are added in the order (r,k).
    const auto [sorted_index, sorted_order] = at::sort(i.flatten(), /*stable=*/true, /*dim=*/0, /*descending=*/false);
    at::Tensor offsets = at::empty({vocab_size + 1}, i.options().dtype(at::kLong));
    std::optional<at::Tensor> common_row;
    if (grad_weight && through_mean) common_row = at::empty({d}, acc_options(hidden));
    p.hidden = h.const_data_ptr();
    p.sorted_index = sorted_index.const_data_ptr();
    p.sorted_order = sorted_order.const_data_ptr<int64_t>();
    p.offsets = offsets.mutable_data_ptr<int64_t>();
    p.common_row = buffer_or_null(common_row);
    p.grad_weight = buffer_or_null(grad_weight);
    p.grad_weight_stride = grad_weight ? grad_weight->stride(0) : 0;
    p.grad_bias = buffer_or_null(grad_bias);
    cuda::linear_grad_weight(p, device.stream);
  }
}

at::Tensor cross_entropy_(const at::Tensor& logits, const at::Tensor& labels, const at::Tensor& row_weight) {
  check_cross_entropy_(logits, labels, row_weight);
  const OnDeviceOf device(logits);
  const at::Tensor l = labels.contiguous(), w = row_weight.contiguous();
  at::Tensor loss = at::empty({logits.size(0)}, acc_options(logits));
  cuda::CrossEntropy p{};
  p.dtype = dtype_of(logits);
  p.logits = logits.mutable_data_ptr();
  p.logits_stride = logits.stride(0);
  p.labels = l.const_data_ptr<int64_t>();
  p.row_weight = w.const_data_ptr();
  p.loss = loss.mutable_data_ptr();
  p.rows = logits.size(0);
  p.vocab_size = logits.size(1);
  cuda::cross_entropy_(p, device.stream);
  return loss;
}

at::Tensor kl_div_(const at::Tensor& logits, const at::Tensor& ref_logits, const at::Tensor& row_weight, bool reverse) {
  check_kl_div_(logits, ref_logits, row_weight);
  const OnDeviceOf device(logits);
  const at::Tensor q = with_unit_stride(ref_logits), w = row_weight.contiguous();
  at::Tensor loss = at::empty({logits.size(0)}, acc_options(logits));
  cuda::KlDiv p{};
  p.dtype = dtype_of(logits);
  p.logits = logits.mutable_data_ptr();
  p.logits_stride = logits.stride(0);
  p.ref_logits = q.const_data_ptr();
  p.ref_logits_stride = q.stride(0);
  p.row_weight = w.const_data_ptr();
  p.loss = loss.mutable_data_ptr();
  p.rows = logits.size(0);
  p.vocab_size = logits.size(1);
  p.reverse = reverse;
  cuda::kl_div_(p, device.stream);
  return loss;
}

void adamw_(const at::Tensor& weight, const at::Tensor& grad, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
            const std::optional<at::Tensor>& low_bits, const std::optional<at::Tensor>& clip_factor, int64_t step,
            double rate, double weight_decay, double beta1, double beta2, double eps) {
  check_adamw_(weight, grad, exp_avg, exp_avg_sq, low_bits, clip_factor, step);
  const OnDeviceOf device(weight);
  const at::Tensor g = grad.contiguous();
  const double unbias = std::sqrt(1 - std::pow(beta2, step));
  cuda::AdamW p{};
  p.dtype = dtype_of(weight);
  p.weight = weight.mutable_data_ptr();
  p.low_bits = buffer_or_null(low_bits);
  p.grad = g.const_data_ptr();
  p.exp_avg = exp_avg.mutable_data_ptr();
  p.exp_avg_sq = exp_avg_sq.mutable_data_ptr();
  p.clip_factor = data_or_null(clip_factor);
  p.size = weight.numel();
  p.step_size = rate * unbias / (1 - std::pow(beta1, step));
  p.decay_factor = 1 - rate * weight_decay;
  p.one_minus_beta1 = 1 - beta1;
  p.one_minus_beta2 = 1 - beta2;
  p.eps = eps * unbias;
  cuda::adamw_(p, device.stream);
}

}  // namespace
}  // namespace palu

TORCH_LIBRARY_IMPL(palu, CUDA, m) {
  m.impl("prefix_mask", palu::prefix_mask);
  m.impl("topk_mse", palu::topk_mse);
  m.impl("topk_backward", palu::topk_backward);
  m.impl("linear_topk_mse", palu::linear_topk_mse);
  m.impl("linear_topk_unlikelihood", palu::linear_topk_unlikelihood);
  m.impl("linear_topk_backward", palu::linear_topk_backward);
  m.impl("cross_entropy_", palu::cross_entropy_);
  m.impl("kl_div_", palu::kl_div_);
  m.impl("adamw_", palu::adamw_);
}
