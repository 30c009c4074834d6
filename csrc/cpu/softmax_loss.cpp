// cross_entropy_, unlikelihood_ and kl_div_ from torch's own operations, in place where they can be; formulas are in
// csrc/softmax_loss.h. Their plain-torch twins do the same operations in the same order.
#include "../softmax_loss.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/logaddexp.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "../checks.h"

namespace palu::cpu {
namespace {

// What torch's operations are called under: neither recorded nor cast, as in every other kernel.
struct PlainOperations {
  at::NoGradGuard no_grad;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

// a [R,V] . b [R,V], row by row: [R]
at::Tensor row_dot(const at::Tensor& a, const at::Tensor& b) {
  return at::bmm(a.unsqueeze(1), b.unsqueeze(2)).select(1, 0).select(1, 0);
}

at::Tensor cross_entropy_(const at::Tensor& logits, const at::Tensor& labels, const at::Tensor& row_weight) {
  check_cross_entropy_(logits, labels, row_weight);
  const PlainOperations plain;
  at::Tensor z = logits.to(row_weight.scalar_type());  // the same tensor unless a half type
  const at::Tensor label = labels.unsqueeze(1), weight = row_weight.unsqueeze(1);
  const at::Tensor picked = z.gather(1, label).select(1, 0);  // torch's error where a label is out of range
  const auto [top, where] = z.numel() ? z.max(1) : std::tuple(picked, labels);
  at::softmax_out(z, z, 1);
  // At the largest logit softmax cannot underflow, and there z - log softmax(z) = logsumexp(z).
  const at::Tensor loss = top - z.gather(1, where.unsqueeze(1)).select(1, 0).log() - picked;
  z.mul_(weight).scatter_add_(1, label, -weight);
  if (!z.is_same(logits)) logits.copy_(z);
  return loss;
}

at::Tensor unlikelihood_(const at::Tensor& logits, const at::Tensor& labels, const at::Tensor& row_weight,
                         double floor) {
  check_unlikelihood_(logits, labels, row_weight, floor);
  const PlainOperations plain;
  at::Tensor z = logits.to(row_weight.scalar_type());  // the same tensor unless a half type
  const at::Tensor label = labels.unsqueeze(1);
  const at::Tensor picked = z.gather(1, label).select(1, 0);  // torch's error where a label is out of range
  z.scatter_(1, label, -std::numeric_limits<double>::infinity());
  const auto [top, where] = z.max(1);
  at::softmax_out(z, z, 1);
  // As in cross_entropy_: the logsumexp of the others.
  const at::Tensor others = top - z.gather(1, where.unsqueeze(1)).select(1, 0).log();
  const at::Tensor margin = picked - others, probability = margin.sigmoid();
  const at::Tensor pushed = probability.le(floor).logical_not();  // a NaN stays one
  const at::Tensor weight = (row_weight * probability * pushed).unsqueeze(1);
  z.mul_(-weight).scatter_(1, label, weight);
  if (!z.is_same(logits)) logits.copy_(z);
  return at::logaddexp(margin, at::zeros_like(margin)) * pushed;
}

at::Tensor kl_div_(const at::Tensor& logits, const at::Tensor& ref_logits, const at::Tensor& row_weight, bool reverse) {
  check_kl_div_(logits, ref_logits, row_weight);
  const PlainOperations plain;
  at::Tensor z = logits.to(row_weight.scalar_type());  // the same tensor unless a half type
  at::log_softmax_out(z, z, 1);                        // log P
  const at::Tensor log_q = at::log_softmax(ref_logits, 1, row_weight.scalar_type());
  at::Tensor loss;
  if (reverse) {
    const at::Tensor log_ratio = log_q.neg_().add_(z);
    z.exp_();
    loss = row_dot(z, log_ratio);
    z.mul_(log_ratio.sub_(loss.unsqueeze(1)));
  } else {
    const at::Tensor q = log_q.exp();
    loss = row_dot(q, log_q.sub_(z));
    z.exp_().sub_(q);
  }
  z.mul_(row_weight.unsqueeze(1));
  if (!z.is_same(logits)) logits.copy_(z);
  return loss;
}

}  // namespace
}  // namespace palu::cpu

TORCH_LIBRARY_IMPL(palu, CPU, m) {
  m.impl("cross_entropy_", palu::cpu::cross_entropy_);
  m.impl("unlikelihood_", palu::cpu::unlikelihood_);
  m.impl("kl_div_", palu::cpu::kl_div_);
}
