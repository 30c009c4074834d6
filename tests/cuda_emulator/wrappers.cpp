// The launchers of csrc/cuda/launch.h as C functions, for ctypes.
#include "launch.h"

using palu::cuda::Center;
using palu::cuda::Dtype;

extern "C" {

void palu_prefix_mask(const int64_t* labels, int64_t batch_stride, int64_t token_stride, bool* mask, int64_t batch,
                      int64_t length, int64_t n, int64_t eos) {
  palu::cuda::prefix_mask(labels, batch_stride, token_stride, mask, batch, length, n, eos, nullptr);
}

void palu_topk_mse(int dtype, int index64, const void* logits, int64_t logits_stride, const void* index, void* loss,
                   void* residual, int64_t rows, int64_t vocab_size, int64_t k, int center, double constant) {
  palu::cuda::topk_mse(Dtype(dtype), index64, logits, logits_stride, index, loss, residual, rows, vocab_size, k,
                       Center(center), constant, nullptr);
}

void palu_topk_mse_backward(int dtype, int index64, const void* grad, const void* residual, const void* index,
                            void* grad_logits, int64_t grad_stride, int64_t rows, int64_t vocab_size, int64_t k,
                            int through_mean) {
  palu::cuda::topk_mse_backward(Dtype(dtype), index64, grad, residual, index, grad_logits, grad_stride, rows,
                                vocab_size, k, through_mean, nullptr);
}

void palu_linear_topk_mse(int dtype, int index64, const void* hidden, const void* weight, int64_t weight_stride,
                          const void* index, const void* bias, const void* weight_mean, const void* bias_mean,
                          void* loss, void* residual, int64_t rows, int64_t vocab_size, int64_t hidden_size, int64_t k,
                          int center, double constant) {
  palu::cuda::linear_topk_mse(Dtype(dtype), index64, hidden, weight, weight_stride, index, bias, weight_mean, bias_mean,
                              loss, residual, rows, vocab_size, hidden_size, k, Center(center), constant, nullptr);
}

void palu_linear_mean_shift(int dtype, const void* grad, const void* residual, void* shift, int64_t rows,
                            int64_t vocab_size, int64_t k) {
  palu::cuda::linear_mean_shift(Dtype(dtype), grad, residual, shift, rows, vocab_size, k, nullptr);
}

int64_t palu_linear_grad_hidden_slices(int64_t rows, int64_t k) {
  return palu::cuda::linear_grad_hidden_slices(rows, k);
}

void palu_linear_grad_hidden(int dtype, int index64, const void* grad, const void* residual, const void* weight,
                             int64_t weight_stride, const void* index, const void* weight_mean, const void* shift,
                             void* partial, void* grad_hidden, int64_t grad_hidden_stride, int64_t rows,
                             int64_t vocab_size, int64_t hidden_size, int64_t k) {
  palu::cuda::linear_grad_hidden(Dtype(dtype), index64, grad, residual, weight, weight_stride, index, weight_mean,
                                 shift, partial, grad_hidden, grad_hidden_stride, rows, vocab_size, hidden_size, k,
                                 nullptr);
}

void palu_linear_grad_weight(int dtype, int index64, const void* grad, const void* residual, const void* hidden,
                             const void* sorted_index, const int64_t* sorted_order, const void* shift, int64_t* offsets,
                             void* mean_row, void* grad_weight, int64_t grad_weight_stride, void* grad_bias,
                             int64_t rows, int64_t vocab_size, int64_t hidden_size, int64_t k) {
  palu::cuda::linear_grad_weight(Dtype(dtype), index64, grad, residual, hidden, sorted_index, sorted_order, shift,
                                 offsets, mean_row, grad_weight, grad_weight_stride, grad_bias, rows, vocab_size,
                                 hidden_size, k, nullptr);
}

void palu_cross_entropy(int dtype, void* logits, int64_t logits_stride, const int64_t* labels, const void* row_weight,
                        void* loss, int64_t rows, int64_t vocab_size) {
  palu::cuda::cross_entropy_(Dtype(dtype), logits, logits_stride, labels, row_weight, loss, rows, vocab_size, nullptr);
}

void palu_kl_div(int dtype, void* logits, int64_t logits_stride, const void* ref_logits, int64_t ref_stride,
                 const void* row_weight, void* loss, int64_t rows, int64_t vocab_size, int reverse) {
  palu::cuda::kl_div_(Dtype(dtype), logits, logits_stride, ref_logits, ref_stride, row_weight, loss, rows, vocab_size,
                      reverse, nullptr);
}

void palu_scale(int dtype, int factor64, void* tensor, const void* factor, int64_t n) {
  palu::cuda::scale_(Dtype(dtype), factor64, tensor, factor, n, nullptr);
}

}  // extern "C"
