#include "../scale.h"

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "../checks.h"

namespace palu::cpu {
namespace {

void scale_(const at::Tensor& tensor, const at::Tensor& factor) {
  check_scale_(tensor, factor);
  const at::NoGradGuard no_grad;
  if (factor.item<double>() != 1) tensor.mul_(factor);
}

}  // namespace
}  // namespace palu::cpu

TORCH_LIBRARY_IMPL(palu, CPU, m) { m.impl("scale_", palu::cpu::scale_); }
