// The schema of every palu op, and the Python module whose import registers them.
// Kernels live in cpu/ and cuda/; fakes and autograd in palu/ops/library.py.
#include <pybind11/pybind11.h>
#include <torch/library.h>

TORCH_LIBRARY(palu, m) {
  m.def("prefix_mask(Tensor labels, int n, int? eos_token_id=None) -> Tensor");

  m.def(
      "topk_mse(Tensor logits, Tensor index, str target, float constant)"
      " -> (Tensor loss, Tensor residual)");
  m.def(
      "topk_mse_backward(Tensor grad, Tensor residual, Tensor index, bool through_mean,"
      " Tensor(a!) grad_logits) -> ()");

  m.def(
      "linear_topk_mse(Tensor hidden, Tensor weight, Tensor index, Tensor? bias,"
      " Tensor? weight_mean, str target, float constant) -> (Tensor loss, Tensor residual)");
  m.def(
      "linear_topk_mse_backward(Tensor grad, Tensor residual, Tensor hidden, Tensor weight,"
      " Tensor index, Tensor? weight_mean, bool through_mean, Tensor(a!)? grad_hidden,"
      " Tensor(b!)? grad_weight, Tensor(c!)? grad_bias) -> ()");

  m.def("cross_entropy_(Tensor(a!) logits, Tensor labels, Tensor row_weight) -> Tensor");
  m.def("kl_div_(Tensor(a!) logits, Tensor ref_logits, Tensor row_weight, bool reverse) -> Tensor");
  m.def("scale_(Tensor(a!) tensor, Tensor factor) -> ()");
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.doc() = "Registers the torch.ops.palu operators when imported."; }
