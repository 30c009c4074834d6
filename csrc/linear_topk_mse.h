// topk_mse of logits = hidden @ weight^T + bias, without forming the logits.
//
//   z[r,k] = hidden[r] . weight[i_rk] + bias[i_rk]
//   residual, loss and targets as in topk_mse.h.
//
// The mean of a row of logits needs no logits: a linear head maps h to the mean
//
//   (1/V) sum_v (h . W[v] + b[v]) = h . w_mean + mean(b),   w_mean = (1/V) sum_v W[v].
//
// Gradient. With g[r,k] = (2/K) dL/dloss[r] residual[r,k], and s[r] = -(1/V) sum_k g[r,k] where the
// gradient flows through the global mean (otherwise s = 0), dL/dz[r,v] = s[r] + sum_{k: i_rk=v} g[r,k]
// as in topk_mse.h. Through z = h W^T + b:
//
//   dL/dh[r] = sum_k g[r,k] W[i_rk] + V s[r] w_mean        since sum_v s[r] W[v] = V s[r] w_mean
//   dL/dW[v] = sum_{(r,k): i_rk=v} g[r,k] h[r] + sum_r s[r] h[r]
//   dL/db[v] = sum_{(r,k): i_rk=v} g[r,k]      + sum_r s[r]
//
// The pairs (r,k) are visited grouped by vocabulary entry (a stable counting sort), so each row of
// weight is read once and in address order, and every sum has one fixed order.
// dtypes: T is the dtype of hidden, weight and bias; A, float64 for float64 and float32 otherwise,
// holds every sum, w_mean, the loss and the residual; I is int32 or int64.
#pragma once

#include <cstdint>

#include "checks.h"

namespace palu::cpu {

template <typename T, typename A, typename I>
void linear_topk_mse(const A* hidden,  // [R,d], contiguous
                     const T* weight,  // [V,d], rows weight_stride apart, unit stride inside a row
                     int64_t weight_stride,
                     const I* index,        // [R,K], contiguous, every value in [0, V)
                     const int32_t* order,  // [R*K], positions in index, grouped by its value
                     const T* bias,         // [V] or null
                     const A* weight_mean,  // [d]; read for the two global targets only
                     A* loss,               // [R]
                     A* residual,           // [R,K], contiguous
                     int64_t rows, int64_t vocab_size, int64_t d, int64_t k, Target target, A constant);

// Adds to grad_hidden, grad_weight and grad_bias; a null one is not asked for. Every sum is finished
// in A and rounded once into the buffer.
template <typename T, typename A, typename I>
void linear_topk_mse_backward(
    const A* grad,      // [R]
    const A* residual,  // [R,K], contiguous
    const A* hidden,    // [R,d], contiguous
    const T* weight,    // [V,d], rows weight_stride apart, unit stride inside a row
    int64_t weight_stride,
    const I* index,            // [R,K], contiguous, every value in [0, V)
    const int32_t* order,      // [R*K], positions in index, grouped by its value
    const int32_t* group_end,  // [V]; the group of entry v is order[group_end[v-1] : group_end[v]]
    const A* weight_mean,      // [d]; read only if through_mean
    T* grad_hidden,            // [R,d], rows grad_hidden_stride apart, or null
    int64_t grad_hidden_stride,
    T* grad_weight,  // [V,d], rows grad_weight_stride apart, or null
    int64_t grad_weight_stride,
    T* grad_bias,  // [V], contiguous, or null
    int64_t rows, int64_t vocab_size, int64_t d, int64_t k, bool through_mean);

}  // namespace palu::cpu
