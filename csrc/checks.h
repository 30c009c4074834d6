// What the CPU and the CUDA registrations share: above all argument checks, in which dtype mistakes become TypeError,
// shapes and values ValueError. No check reads a tensor's elements.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <optional>
#include <string>
#include <string_view>

#include "topk.h"

namespace palu {

inline Center parse_target(const char* op, std::string_view target) {
  if (target == "global_mean" || target == "global_mean_detached") return Center::kGlobalMean;
  if (target == "local_mean") return Center::kLocalMean;
  TORCH_CHECK_VALUE(target == "constant", op, ": unknown target '", target, "'");
  return Center::kConstant;
}

// The dtype that sums are kept in, and that losses and slopes come back in.
inline at::ScalarType acc_dtype(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

// Rows of contiguous elements, at any distance: copied only where the elements themselves are apart.
inline at::Tensor with_unit_stride(const at::Tensor& t) {
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : t.contiguous();
}

// Numbers in messages become strings here: where a toolchain links libstdc++ statically, a stream
// formats strings well and crashes on numbers.
inline std::string text(int64_t number) { return std::to_string(number); }
inline std::string text(at::IntArrayRef numbers) {
  std::string all = "[";
  for (const int64_t number : numbers) all += (all.size() > 1 ? ", " : "") + text(number);
  return all + "]";
}

// "float32", as Python users know it; for the rest torch's C++ name will do.
inline std::string dtype_name(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat: return "float32";
    case at::kDouble: return "float64";
    case at::kHalf: return "float16";
    case at::kBFloat16: return "bfloat16";
    case at::kBool: return "bool";
    case at::kByte: return "uint8";
    case at::kChar: return "int8";
    case at::kShort: return "int16";
    case at::kInt: return "int32";
    case at::kLong: return "int64";
    default: return c10::toString(dtype);
  }
}

inline void check_dim(const char* op, const char* name, const at::Tensor& t, int64_t dim) {
  TORCH_CHECK_VALUE(t.dim() == dim, op, ": ", name, " must have ", text(dim), " dimension", dim == 1 ? "" : "s",
                    ", got shape ", text(t.sizes()));
}

inline void check_shape(const char* op, const char* name, const at::Tensor& t, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(t.sizes() == shape, op, ": ", name, " must have shape ", text(shape), ", got ", text(t.sizes()));
}

inline void check_device(const char* op, const char* name, const at::Tensor& t, const char* as,
                         const at::Tensor& like) {
  TORCH_CHECK_VALUE(t.device() == like.device(), op, ": ", name, " is on ", t.device().str(), " but ", as, " is on ",
                    like.device().str(), "; move it there");
}

inline void check_dtype(const char* op, const char* name, const at::Tensor& t, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, op, ": ", name, " must be ", dtype_name(dtype), ", got ",
                   dtype_name(t.scalar_type()));
}

inline void check_tensor(const char* op, const char* name, const at::Tensor& t, at::ScalarType dtype,
                         at::IntArrayRef shape, const char* as, const at::Tensor& like) {
  check_device(op, name, t, as, like);
  check_dtype(op, name, t, dtype);
  check_shape(op, name, t, shape);
}

inline void check_floating(const char* op, const char* name, const at::Tensor& t) {
  const auto dtype = t.scalar_type();
  TORCH_CHECK_TYPE(dtype != at::kHalf || !t.is_cpu(), op, ": ", name,
                   " is float16, which the CPU kernels do not support; use bfloat16 or float32");
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf, op,
                   ": ", name, " must be float32, float64, bfloat16 or (not on a CPU) float16, got ",
                   dtype_name(dtype));
}

// index [R,K] for R rows over a vocabulary of V entries; its values are checked on the device.
inline void check_index(const char* op, const at::Tensor& index, int64_t rows, int64_t vocab_size) {
  TORCH_CHECK_TYPE(index.scalar_type() == at::kInt || index.scalar_type() == at::kLong, op,
                   ": index must be int32 or int64, got ", dtype_name(index.scalar_type()));
  check_dim(op, "index", index, 2);
  TORCH_CHECK_VALUE(index.size(0) == rows, op, ": index must have one row for each of the ", text(rows), " rows, got ",
                    text(index.size(0)));
  TORCH_CHECK_VALUE(rows == 0 || (index.size(1) > 0 && vocab_size > 0), op,
                    ": needs at least one index per row and a vocabulary that is not empty, got K = ",
                    text(index.size(1)), " and V = ", text(vocab_size));
}

// No op records that it writes in place, so a graph that has the tensor in it would go wrong without a word.
inline void check_no_graph(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK(!t.requires_grad() || !c10::GradMode::is_enabled(), op, ": ", name,
              " requires grad and would be overwritten; use torch.no_grad()");
}

// A matrix or vector that a kernel writes: contiguous elements in a row, rows that do not overlap.
inline void check_writable(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK_VALUE(t.numel() == 0 || t.size(-1) == 1 || t.stride(-1) == 1, op, ": ", name,
                    " must have unit stride in its last dimension, got strides ", text(t.strides()));
  TORCH_CHECK_VALUE(t.numel() == 0 || t.dim() < 2 || t.size(0) == 1 || t.stride(0) >= t.size(1), op, ": ", name,
                    " must not have rows that overlap, got shape ", text(t.sizes()), " and strides ",
                    text(t.strides()));
  check_no_graph(op, name, t);
}

inline void check_buffer(const char* op, const char* name, const at::Tensor& t, const char* as,
                         const at::Tensor& like) {
  check_tensor(op, name, t, like.scalar_type(), like.sizes(), as, like);
  check_writable(op, name, t);
}

inline void check_prefix_mask(const at::Tensor& labels, int64_t n) {
  constexpr const char* op = "palu::prefix_mask";
  check_dtype(op, "labels", labels, at::kLong);
  check_dim(op, "labels", labels, 2);
  TORCH_CHECK_VALUE(n >= -1, op, ": n must be -1 (all) or at least 0, got ", text(n));
}

inline void check_logits_and_index(const char* op, const at::Tensor& logits, const at::Tensor& index) {
  check_floating(op, "logits", logits);
  check_dim(op, "logits", logits, 2);
  check_device(op, "index", index, "logits", logits);
  check_index(op, index, logits.size(0), logits.size(1));
}

inline Center check_topk_mse(const at::Tensor& logits, const at::Tensor& index, std::string_view target) {
  constexpr const char* op = "palu::topk_mse";
  check_logits_and_index(op, logits, index);
  return parse_target(op, target);
}

inline void check_floor(const char* op, double floor) {
  TORCH_CHECK_VALUE(floor >= 0 && floor < 1, op, ": floor must be in [0, 1), got ", std::to_string(floor));
}

// What unlikelihood among candidates asks beyond the other checks.
inline void check_candidates(const char* op, const at::Tensor& index, double floor) {
  TORCH_CHECK_VALUE(
      index.size(1) > 1, op,
      ": index must hold the true token and at least one candidate in each row, got K = ", text(index.size(1)));
  check_floor(op, floor);
}

inline void check_topk_unlikelihood(const at::Tensor& logits, const at::Tensor& index, double floor) {
  constexpr const char* op = "palu::topk_unlikelihood";
  check_logits_and_index(op, logits, index);
  check_candidates(op, index, floor);
}

// grad [R] and slope [R,K], both in the acc dtype of the op's floating inputs.
inline void check_incoming(const char* op, const at::Tensor& grad, const at::Tensor& slope, const at::Tensor& index,
                           const char* as, const at::Tensor& like) {
  check_tensor(op, "grad", grad, acc_dtype(like.scalar_type()), {like.size(0)}, as, like);
  check_tensor(op, "slope", slope, acc_dtype(like.scalar_type()), index.sizes(), as, like);
  check_device(op, "index", index, as, like);
}

inline void check_topk_backward(const at::Tensor& grad, const at::Tensor& slope, const at::Tensor& index,
                                const at::Tensor& grad_logits) {
  constexpr const char* op = "palu::topk_backward";
  check_floating(op, "grad_logits", grad_logits);
  check_dim(op, "grad_logits", grad_logits, 2);
  check_writable(op, "grad_logits", grad_logits);
  check_index(op, index, grad_logits.size(0), grad_logits.size(1));
  check_incoming(op, grad, slope, index, "grad_logits", grad_logits);
}

inline void check_linear(const char* op, const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& index,
                         const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& weight_mean) {
  check_floating(op, "hidden", hidden);
  check_dim(op, "hidden", hidden, 2);
  check_device(op, "weight", weight, "hidden", hidden);
  check_dtype(op, "weight", weight, hidden.scalar_type());
  check_dim(op, "weight", weight, 2);
  TORCH_CHECK_VALUE(weight.size(1) == hidden.size(1), op, ": hidden has ", text(hidden.size(1)),
                    " columns but weight has ", text(weight.size(1)));
  check_device(op, "index", index, "hidden", hidden);
  check_index(op, index, hidden.size(0), weight.size(0));
  const auto dtype = hidden.scalar_type();
  if (bias) check_tensor(op, "bias", *bias, dtype, {weight.size(0)}, "hidden", hidden);
  if (weight_mean) {
    check_tensor(op, "weight_mean", *weight_mean, acc_dtype(dtype), {hidden.size(1)}, "hidden", hidden);
  }
}

inline Center check_linear_topk_mse(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& index,
                                    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& weight_mean,
                                    std::string_view target) {
  constexpr const char* op = "palu::linear_topk_mse";
  check_linear(op, hidden, weight, index, bias, weight_mean);
  const Center center = parse_target(op, target);
  TORCH_CHECK_VALUE(center != Center::kGlobalMean || weight_mean, op, ": target '", target,
                    "' needs weight_mean = weight.mean(0)");
  return center;
}

inline void check_linear_topk_unlikelihood(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& index,
                                           const std::optional<at::Tensor>& bias, double floor) {
  constexpr const char* op = "palu::linear_topk_unlikelihood";
  check_linear(op, hidden, weight, index, bias, std::nullopt);
  check_candidates(op, index, floor);
}

inline void check_linear_topk_backward(const at::Tensor& grad, const at::Tensor& slope, const at::Tensor& hidden,
                                       const at::Tensor& weight, const at::Tensor& index,
                                       const std::optional<at::Tensor>& weight_mean, bool through_mean,
                                       const std::optional<at::Tensor>& grad_hidden,
                                       const std::optional<at::Tensor>& grad_weight,
                                       const std::optional<at::Tensor>& grad_bias) {
  constexpr const char* op = "palu::linear_topk_backward";
  check_linear(op, hidden, weight, index, std::nullopt, weight_mean);
  check_incoming(op, grad, slope, index, "hidden", hidden);
  TORCH_CHECK_VALUE(!through_mean || !grad_hidden || weight_mean, op,
                    ": grad_hidden through the mean needs weight_mean = weight.mean(0)");
  if (grad_hidden) check_buffer(op, "grad_hidden", *grad_hidden, "hidden", hidden);
  if (grad_weight) check_buffer(op, "grad_weight", *grad_weight, "weight", weight);
  if (grad_bias) {
    check_tensor(op, "grad_bias", *grad_bias, hidden.scalar_type(), {weight.size(0)}, "hidden", hidden);
    check_writable(op, "grad_bias", *grad_bias);
  }
}

inline void check_rows_in_place(const char* op, const at::Tensor& logits, const at::Tensor& row_weight) {
  check_floating(op, "logits", logits);
  check_dim(op, "logits", logits, 2);
  check_writable(op, "logits", logits);
  TORCH_CHECK_VALUE(logits.size(0) == 0 || logits.size(1) > 0, op, ": the vocabulary is empty");
  check_tensor(op, "row_weight", row_weight, acc_dtype(logits.scalar_type()), {logits.size(0)}, "logits", logits);
}

inline void check_cross_entropy_(const at::Tensor& logits, const at::Tensor& labels, const at::Tensor& row_weight) {
  constexpr const char* op = "palu::cross_entropy_";
  check_rows_in_place(op, logits, row_weight);
  check_tensor(op, "labels", labels, at::kLong, {logits.size(0)}, "logits", logits);
}

inline void check_kl_div_(const at::Tensor& logits, const at::Tensor& ref_logits, const at::Tensor& row_weight) {
  constexpr const char* op = "palu::kl_div_";
  check_rows_in_place(op, logits, row_weight);
  check_tensor(op, "ref_logits", ref_logits, logits.scalar_type(), logits.sizes(), "logits", logits);
}

// Tensors of one shape, contiguous, since a step goes over them element by element.
inline void check_adamw_(const at::Tensor& weight, const at::Tensor& grad, const at::Tensor& exp_avg,
                         const at::Tensor& exp_avg_sq, const std::optional<at::Tensor>& low_bits,
                         const std::optional<at::Tensor>& clip_factor, int64_t step) {
  constexpr const char* op = "palu::adamw_";
  const auto dtype = weight.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16, op, ": weight must be float32 or bfloat16, got ",
                   dtype_name(dtype));
  const auto check_like = [&](const char* name, const at::Tensor& t, at::ScalarType wanted, bool written) {
    check_tensor(op, name, t, wanted, weight.sizes(), "weight", weight);
    TORCH_CHECK_VALUE(!written || t.is_contiguous(), op, ": ", name, " must be contiguous, got strides ",
                      text(t.strides()));
    if (written) check_no_graph(op, name, t);
  };
  check_like("weight", weight, dtype, true);
  check_like("grad", grad, dtype, false);
  check_like("exp_avg", exp_avg, dtype, true);
  check_like("exp_avg_sq", exp_avg_sq, at::kFloat, true);
  TORCH_CHECK_VALUE(low_bits.has_value() == (dtype == at::kBFloat16), op,
                    ": low_bits belong to a bfloat16 weight, and to no other");
  if (low_bits) check_like("low_bits", *low_bits, dtype, true);
  if (clip_factor) {
    check_device(op, "clip_factor", *clip_factor, "weight", weight);
    check_dtype(op, "clip_factor", *clip_factor, at::kFloat);
    TORCH_CHECK_VALUE(clip_factor->numel() == 1, op, ": clip_factor must be one number, got shape ",
                      text(clip_factor->sizes()));
  }
  TORCH_CHECK_VALUE(step > 0, op, ": step must be at least 1, got ", text(step));
}

}  // namespace palu
