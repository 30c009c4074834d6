// The schema of every palu op, the derivatives that none has, and the Python module whose import registers them.
// Kernels live in cpu/ and cuda/, and where there is none in palu/ops/twins.py; fakes and autograd in
// palu/ops/library.py.
#include <c10/core/GradMode.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>
#include <torch/version.h>

#include <optional>
#include <string_view>

#include "checks.h"

namespace palu {
namespace {

// Read from the file, before it is loaded, by palu/_build.py.
[[gnu::used]] constexpr char kBuiltFor[] =
    "palu was built for torch " C10_STRINGIZE(TORCH_VERSION_MAJOR) "." C10_STRINGIZE(TORCH_VERSION_MINOR);

constexpr const char* kDifferentiable[] = {"topk_mse",
                                           "topk_unlikelihood",
                                           "topk_backward",
                                           "linear_topk_mse",
                                           "linear_topk_mse_frozen",
                                           "linear_topk_unlikelihood",
                                           "linear_topk_backward",
                                           "cross_entropy_",
                                           "kl_div_"};

// torch would drop a tangent without a word, and its errors in torch.func are of no help.
void refuse(const c10::OperatorHandle& op) {
  TORCH_CHECK(false, op.schema().name(),
              " has reverse mode alone, one gradient at a time: neither torch.func, forward mode nor is_grads_batched "
              "is supported; use its twin in palu.eager");
}

void refuse_transform(const c10::OperatorHandle& op, torch::jit::Stack*) { refuse(op); }

void refuse_tangent(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  {
    const c10::AutoFwGradMode visible(true);  // an autograd function hides tangents from its forward pass
    for (const c10::IValue& value : torch::jit::last(*stack, op.schema().arguments().size()))
      if (value.isTensor() && value.toTensor()._fw_grad(/*level=*/0).defined()) refuse(op);
  }
  op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
}

template <auto* kernel>
void register_for_all(torch::Library& m) {
  for (const char* op : kDifferentiable) m.impl(op, torch::CppFunction::makeFromBoxedFunction<kernel>());
}

}  // namespace
}  // namespace palu

TORCH_LIBRARY(palu, m) {
  m.def("prefix_mask(Tensor labels, int n, int? eos_token_id=None) -> Tensor");

  m.def(
      "topk_mse(Tensor logits, Tensor index, str target, float constant)"
      " -> (Tensor loss, Tensor slope)");
  m.def("topk_unlikelihood(Tensor logits, Tensor index, float floor) -> (Tensor loss, Tensor slope)");
  m.def("topk_backward(Tensor grad, Tensor slope, Tensor index, bool through_mean, Tensor(a!) grad_logits) -> ()");

  m.def(
      "linear_topk_mse(Tensor hidden, Tensor weight, Tensor index, Tensor? bias,"
      " Tensor? weight_mean, str target, float constant) -> (Tensor loss, Tensor slope)");
  // With the gradient of each row's loss for hidden [R, d], in the dtype of the sums, instead of the slope. It is
  // there for CPUs, and for targets other than "local_mean".
  m.def(
      "linear_topk_mse_frozen(Tensor hidden, Tensor weight, Tensor index, Tensor? bias,"
      " Tensor? weight_mean, str target, float constant) -> (Tensor loss, Tensor grad_hidden)");
  m.def(
      "linear_topk_unlikelihood(Tensor hidden, Tensor weight, Tensor index, Tensor? bias, float floor)"
      " -> (Tensor loss, Tensor slope)");
  m.def(
      "linear_topk_backward(Tensor grad, Tensor slope, Tensor hidden, Tensor weight,"
      " Tensor index, Tensor? weight_mean, bool through_mean, Tensor(a!)? grad_hidden,"
      " Tensor(b!)? grad_weight, Tensor(c!)? grad_bias) -> ()");

  m.def("cross_entropy_(Tensor(a!) logits, Tensor labels, Tensor row_weight) -> Tensor");
  m.def("kl_div_(Tensor(a!) logits, Tensor ref_logits, Tensor row_weight, bool reverse) -> Tensor");

  m.def(
      "adamw_(Tensor(a!) weight, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? low_bits,"
      " Tensor? clip_factor, int step, float rate, float weight_decay, float beta1, float beta2, float eps) -> ()");

  // The argument checks alone, for kernels that are not written in C++: the arguments are the op's, in its order.
  using at::Tensor;
  using Optional = std::optional<Tensor>;
  // A schema of its own has what torch cannot infer: a default, which the dispatcher does not pass on.
  m.def("_check_prefix_mask(Tensor labels, int n, int? eos_token_id=None) -> ()",
        [](const Tensor& labels, int64_t n, std::optional<int64_t>) { palu::check_prefix_mask(labels, n); });
  m.def("_check_topk_mse", [](const Tensor& logits, const Tensor& index, std::string_view target, double) {
    palu::check_topk_mse(logits, index, target);
  });
  m.def("_check_topk_unlikelihood", palu::check_topk_unlikelihood);
  m.def("_check_topk_backward",
        [](const Tensor& grad, const Tensor& slope, const Tensor& index, bool, const Tensor& grad_logits) {
          palu::check_topk_backward(grad, slope, index, grad_logits);
        });
  m.def("_check_linear_topk_mse",
        [](const Tensor& hidden, const Tensor& weight, const Tensor& index, const Optional& bias,
           const Optional& weight_mean, std::string_view target,
           double) { palu::check_linear_topk_mse(hidden, weight, index, bias, weight_mean, target); });
  m.def("_check_linear_topk_unlikelihood", palu::check_linear_topk_unlikelihood);
  m.def("_check_linear_topk_backward", palu::check_linear_topk_backward);
  m.def("_check_cross_entropy_", palu::check_cross_entropy_);
  m.def("_check_kl_div_", [](const Tensor& logits, const Tensor& ref_logits, const Tensor& row_weight, bool) {
    palu::check_kl_div_(logits, ref_logits, row_weight);
  });
  m.def("_check_adamw_",
        [](const Tensor& weight, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
           const Optional& low_bits, const Optional& clip_factor, int64_t step, double, double, double, double,
           double) { palu::check_adamw_(weight, grad, exp_avg, exp_avg_sq, low_bits, clip_factor, step); });
}

TORCH_LIBRARY_IMPL(palu, FuncTorchDynamicLayerFrontMode, m) { palu::register_for_all<&palu::refuse_transform>(m); }
TORCH_LIBRARY_IMPL(palu, Batched, m) { palu::register_for_all<&palu::refuse_transform>(m); }  // is_grads_batched
TORCH_LIBRARY_IMPL(palu, ADInplaceOrView, m) { palu::register_for_all<&palu::refuse_tangent>(m); }

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.doc() = "Registers the torch.ops.palu operators when imported."; }
