// Losses of K chosen entries of each row of logits. Both return a row's loss and its slope, dloss[r]/dz of the chosen
// entries, from which one backward pass forms the gradient of either.
//
// topk_mse, the local entropy loss (PALU, arXiv 2601.03190: flatten the K logits that the reference model ranks highest
// towards a common target c):
//
//   loss[r] = (1/K) sum_k (z[r, i_rk] - c[r])^2          slope[r,k] = (2/K) (z[r, i_rk] - c[r])
//
//   target                 c[r]
//   global_mean            (1/V) sum_v z[r,v]; gradient flows through it
//   global_mean_detached   the same value, held constant
//   local_mean             (1/K) sum_k z[r, i_rk]
//   constant               the number given
//
// topk_unlikelihood: unlikelihood (arXiv 1908.04319, with a floor) of the true token, which is column 0 of the index,
// within the reference's candidates, which are the others (K > 1). A candidate that is the true token is left out.
//
//   a[r] = log sum_k exp(z[r, i_rk]) over the candidates     margin = z[r, i_r0] - a[r]     p = 1 / (1 + exp(-margin))
//   loss[r] = -log(1 - p) = log(1 + exp(margin))
//   slope[r,0] = p           slope[r,k] = -p exp(z[r, i_rk] - a[r]) for a candidate, 0 for one that is left out
//   (since dloss/dmargin = p, and dmargin/dz is 1 for the true token and minus the softmax for the candidates. As p
//   goes to 1 loss and slope stay exact: neither 1 - p nor p / (1 - p) is formed.)
//
//   A row with p <= floor has the loss 0 and the slope 0. So has a row whose candidates are all left out, or all have
//   the logit -inf: there is nothing to which the true token's mass could go.
//
// Gradient. With g[r,k] = dL/dloss[r] slope[r,k]:
//
//   dL/dz[r,v] = sum_{k: i_rk = v} g[r,k] + s[r]
//
//   s[r] = -(1/V) sum_k g[r,k] for the target global_mean, where dc/dz[r,v] = 1/V for every v, else 0. (local_mean: the
//   slopes sum to zero, so that nothing flows through the mean.) The kernels call it grad_through_mean.
//
// An index that occurs twice in a row counts twice.
//
//   logits z, grad_logits   T [R,V]   float32, float64, bfloat16, on CUDA float16
//   index i                 I [R,K]   int32 or int64, every value in [0, V)
//   loss, grad dL/dloss     A [R]     A is float64 for T = float64, else float32; every sum is in A
//   slope                   A [R,K]
//
// topk_unlikelihood has no kernel: beside the row of K logits that it gathers there is nothing to save, and plain torch
// (palu/eager.py) serves on every device. Its gradient is topk_backward, as that of topk_mse.
#pragma once

namespace palu {

// Where c comes from. Whether the gradient flows through it is a question for the backward pass alone.
enum class Center { kGlobalMean, kLocalMean, kConstant };

}  // namespace palu
