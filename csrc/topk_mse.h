// Local entropy loss of one row of logits (PALU, arXiv 2601.03190: flatten the K logits that the
// reference model ranks highest towards a common target c).
//
//   residual[r,k] = z[r, i_rk] - c[r]          loss[r] = (1/K) sum_k residual[r,k]^2
//
//   target                 c[r]
//   global_mean            (1/V) sum_v z[r,v]; gradient flows through it
//   global_mean_detached   the same value, held constant
//   local_mean             (1/K) sum_k z[r, i_rk]
//   constant               the number given
//
// Gradient. With G[r] = dL/dloss[r] and g[r,k] = (2/K) G[r] residual[r,k]:
//
//   dL/dz[r,v] = sum_{k: i_rk = v} g[r,k] - (dc[r]/dz[r,v]) sum_k g[r,k]
//
//   global_mean:  dc/dz[r,v] = 1/V for every v, so each entry receives s[r] = -(1/V) sum_k g[r,k].
//   local_mean:   the residuals sum to zero, hence sum_k g[r,k] = 0 and the second term vanishes.
//   the others:   dc/dz = 0.
//
// An index that occurs twice in a row counts twice.
//
//   logits z, grad_logits   T [R,V]   float32, float64, bfloat16, on CUDA float16
//   index i                 I [R,K]   int32 or int64, every value in [0, V)
//   loss, grad G            A [R]     A is float64 for T = float64, else float32; every sum is in A
//   residual                A [R,K]
#pragma once

namespace palu {

// Where c comes from. Whether the gradient flows through it is a question for the backward pass alone.
enum class Center { kGlobalMean, kLocalMean, kConstant };

}  // namespace palu
