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
// An index that occurs twice in a row counts twice. dtypes: T is the logits' dtype; A, float64 for
// float64 logits and float32 otherwise, holds every sum, the loss and the residual; I is int32 or int64.
#pragma once

#include <cstdint>

#include "checks.h"

namespace palu::cpu {

template <typename T, typename A, typename I>
void topk_mse(const T* logits,  // [R,V], rows row_stride apart, unit stride inside a row
              int64_t row_stride,
              const I* index,  // [R,K], contiguous, every value in [0, V)
              A* loss,         // [R]
              A* residual,     // [R,K], contiguous
              int64_t rows, int64_t vocab_size, int64_t k, Target target, A constant);

// Overwrites every element of grad_logits.
template <typename T, typename A, typename I>
void topk_mse_backward(const A* grad,      // [R]
                       const A* residual,  // [R,K], contiguous
                       const I* index,     // [R,K], contiguous, every value in [0, V)
                       T* grad_logits,     // [R,V], rows row_stride apart, unit stride inside a row
                       int64_t row_stride, int64_t rows, int64_t vocab_size, int64_t k, bool through_mean);

}  // namespace palu::cpu
