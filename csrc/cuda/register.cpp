// The CUDA kernels of the palu ops: argument checks, strides, allocations and the current stream.
// The schemas are in csrc/ops.cpp, the kernels behind launch.h.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "../checks.h"
#include "launch.h"

namespace palu {
namespace {

using cuda::Center;
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

Center center_of(Target target) {
  if (is_global(target)) return Center::kGlobalMean;
  return target == Target::kLocalMean ? Center::kLocalMean : Center::kConstant;
}

at::TensorOptions acc_options(const at::Tensor& t) { return t.options().dtype(acc_dtype(t.scalar_type())); }

// Rows of contiguous elements, at any distance: copied only where the elements themselves are apart.
at::Tensor with_unit_stride(const at::Tensor& t) { return t.size(1) <= 1 || t.stride(1) == 1 ? t : t.contiguous(); }

const void* data_or_null(const std::optional<at::Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

at::Tensor prefix_mask(const at::Tensor& labels, int64_t n, std::optional<int64_t> eos_token_id) {
  check_prefix_mask(labels, n);
  const OnDeviceOf device(labels);
  at::Tensor mask = at::empty(labels.sizes(), labels.options().dtype(at::kBool));
  cuda::prefix_mask(labels.const_data_ptr<int64_t>(), labels.stride(0), labels.stride(1), mask.mutable_data_ptr<bool>(),
                    labels.size(0), labels.size(1), n, eos_token_id.value_or(-1), device.stream);
  return mask;
}

std::tuple<at::Tensor, at::Tensor> topk_mse(const at::Tensor& logits, const at::Tensor& index, std::string_view target,
                                            double constant) {
  const Target parsed = check_topk_mse(logits, index, target);
  const OnDeviceOf device(logits);
  const at::Tensor z = with_unit_stride(logits), i = index.contiguous();
  at::Tensor loss = at::empty({z.size(0)}, acc_options(z));
  at::Tensor residual = at::empty(i.sizes(), acc_options(z));
  cuda::topk_mse(dtype_of(z), is_int64(i), z.const_data_ptr(), z.stride(0), i.const_data_ptr(), loss.mutable_data_ptr(),
                 residual.mutable_data_ptr(), z.size(0), z.size(1), i.size(1), center_of(parsed), constant,
                 device.stream);
  return {loss, residual};
}

void topk_mse_backward(const at::Tensor& grad, const at::Tensor& residual, const at::Tensor& index, bool through_mean,
                       const at::Tensor& grad_logits) {
  check_topk_mse_backward(grad, residual, index, grad_logits);
  const OnDeviceOf device(grad_logits);
  const at::Tensor g = grad.contiguous(), e = residual.contiguous(), i = index.contiguous();
  cuda::topk_mse_backward(dtype_of(grad_logits), is_int64(i), g.const_data_ptr(), e.const_data_ptr(),
                          i.const_data_ptr(), grad_logits.mutable_data_ptr(), grad_logits.stride(0),
                          grad_logits.size(0), grad_logits.size(1), i.size(1), through_mean, device.stream);
}

std::tuple<at::Tensor, at::Tensor> linear_topk_mse(const at::Tensor& hidden, const at::Tensor& weight,
                                                   const at::Tensor& index, const std::optional<at::Tensor>& bias,
                                                   const std::optional<at::Tensor>& weight_mean,
                                                   std::string_view target, double constant) {
  const Target parsed = check_linear_topk_mse(hidden, weight, index, bias, weight_mean, target);
  const OnDeviceOf device(hidden);
  const at::Tensor h = hidden.contiguous(), w = with_unit_stride(weight), i = index.contiguous();
  std::optional<at::Tensor> b, w_mean, b_mean;
  if (bias) b = bias->contiguous();
  if (is_global(parsed)) {
    w_mean = weight_mean->contiguous();
    if (b) b_mean = b->mean(0, /*keepdim=*/false, acc_dtype(h.scalar_type()));
  }
  at::Tensor loss = at::empty({h.size(0)}, acc_options(h));
  at::Tensor residual = at::empty(i.sizes(), acc_options(h));
  cuda::linear_topk_mse(dtype_of(h), is_int64(i), h.const_data_ptr(), w.const_data_ptr(), w.stride(0),
                        i.const_data_ptr(), data_or_null(b), data_or_null(w_mean), data_or_null(b_mean),
                        loss.mutable_data_ptr(), residual.mutable_data_ptr(), h.size(0), w.size(0), h.size(1),
                        i.size(1), center_of(parsed), constant, device.stream);
  return {loss, residual};
}

void linear_topk_mse_backward(const at::Tensor& grad, const at::Tensor& residual, const at::Tensor& hidden,
                              const at::Tensor& weight, const at::Tensor& index,
                              const std::optional<at::Tensor>& weight_mean, bool through_mean,
                              const std::optional<at::Tensor>& grad_hidden,
                              const std::optional<at::Tensor>& grad_weight,
                              const std::optional<at::Tensor>& grad_bias) {
  check_linear_topk_mse_backward(grad, residual, hidden, weight, index, weight_mean, through_mean, grad_hidden,
                                 grad_weight, grad_bias);
  const int64_t rows = hidden.size(0), d = hidden.size(1), vocab_size = weight.size(0);
  const int64_t k = index.size(1);
  if (rows == 0) return;
  const OnDeviceOf device(hidden);
  const Dtype dtype = dtype_of(hidden);
  const at::Tensor g = grad.contiguous(), e = residual.contiguous(), i = index.contiguous();

  std::optional<at::Tensor> shift;
  if (through_mean) {
    shift = at::empty({rows}, acc_options(hidden));
    cuda::linear_mean_shift(dtype, g.const_data_ptr(), e.const_data_ptr(), shift->mutable_data_ptr(), rows, vocab_size,
                            k, device.stream);
  }
  if (grad_hidden) {
    const at::Tensor w = with_unit_stride(weight);
    std::optional<at::Tensor> w_mean;
    if (through_mean) w_mean = weight_mean->contiguous();
    const int64_t slices = cuda::linear_grad_hidden_slices(rows, k);
    at::Tensor partial = at::empty({slices, rows, d}, acc_options(hidden));
    cuda::linear_grad_hidden(dtype, is_int64(i), g.const_data_ptr(), e.const_data_ptr(), w.const_data_ptr(),
                             w.stride(0), i.const_data_ptr(), data_or_null(w_mean), data_or_null(shift),
                             partial.mutable_data_ptr(), grad_hidden->mutable_data_ptr(), grad_hidden->stride(0), rows,
                             vocab_size, d, k, device.stream);
  }
  if (grad_weight || grad_bias) {
    const at::Tensor h = hidden.contiguous();
    // Stable, so that the terms of an entry are added in the order (r,k).
    const auto [sorted_index, sorted_order] = at::sort(i.flatten(), /*stable=*/true, /*dim=*/0, /*descending=*/false);
    at::Tensor offsets = at::empty({vocab_size + 1}, i.options().dtype(at::kLong));
    std::optional<at::Tensor> mean_row;
    if (grad_weight && through_mean) mean_row = at::empty({d}, acc_options(hidden));
    cuda::linear_grad_weight(
        dtype, is_int64(i), g.const_data_ptr(), e.const_data_ptr(), h.const_data_ptr(), sorted_index.const_data_ptr(),
        sorted_order.const_data_ptr<int64_t>(), data_or_null(shift), offsets.mutable_data_ptr<int64_t>(),
        mean_row ? mean_row->mutable_data_ptr() : nullptr, grad_weight ? grad_weight->mutable_data_ptr() : nullptr,
        grad_weight ? grad_weight->stride(0) : 0, grad_bias ? grad_bias->mutable_data_ptr() : nullptr, rows, vocab_size,
        d, k, device.stream);
  }
}

at::Tensor cross_entropy_(const at::Tensor& logits, const at::Tensor& labels, const at::Tensor& row_weight) {
  check_cross_entropy_(logits, labels, row_weight);
  const OnDeviceOf device(logits);
  const at::Tensor l = labels.contiguous(), w = row_weight.contiguous();
  at::Tensor loss = at::empty({logits.size(0)}, acc_options(logits));
  cuda::cross_entropy_(dtype_of(logits), logits.mutable_data_ptr(), logits.stride(0), l.const_data_ptr<int64_t>(),
                       w.const_data_ptr(), loss.mutable_data_ptr(), logits.size(0), logits.size(1), device.stream);
  return loss;
}

at::Tensor kl_div_(const at::Tensor& logits, const at::Tensor& ref_logits, const at::Tensor& row_weight, bool reverse) {
  check_kl_div_(logits, ref_logits, row_weight);
  const OnDeviceOf device(logits);
  const at::Tensor q = with_unit_stride(ref_logits), w = row_weight.contiguous();
  at::Tensor loss = at::empty({logits.size(0)}, acc_options(logits));
  cuda::kl_div_(dtype_of(logits), logits.mutable_data_ptr(), logits.stride(0), q.const_data_ptr(), q.stride(0),
                w.const_data_ptr(), loss.mutable_data_ptr(), logits.size(0), logits.size(1), reverse, device.stream);
  return loss;
}

void scale_(const at::Tensor& tensor, const at::Tensor& factor) {
  constexpr const char* op = "palu::scale_";
  check_floating(op, "tensor", tensor);
  TORCH_CHECK_VALUE(tensor.is_contiguous(), op, ": tensor must be contiguous, got strides ", text(tensor.strides()));
  check_device(op, "factor", factor, "tensor", tensor);
  check_dim(op, "factor", factor, 0);
  TORCH_CHECK_TYPE(factor.scalar_type() == at::kFloat || factor.scalar_type() == at::kDouble, op,
                   ": factor must be float32 or float64, got ", dtype_name(factor.scalar_type()));
  const OnDeviceOf device(tensor);
  cuda::scale_(dtype_of(tensor), factor.scalar_type() == at::kDouble, tensor.mutable_data_ptr(),
               factor.const_data_ptr(), tensor.numel(), device.stream);
}

}  // namespace
}  // namespace palu

TORCH_LIBRARY_IMPL(palu, CUDA, m) {
  m.impl("prefix_mask", palu::prefix_mask);
  m.impl("topk_mse", palu::topk_mse);
  m.impl("topk_mse_backward", palu::topk_mse_backward);
  m.impl("linear_topk_mse", palu::linear_topk_mse);
  m.impl("linear_topk_mse_backward", palu::linear_topk_mse_backward);
  m.impl("cross_entropy_", palu::cross_entropy_);
  m.impl("kl_div_", palu::kl_div_);
  m.impl("scale_", palu::scale_);
}
