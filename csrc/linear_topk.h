// topk_mse and topk_unlikelihood of logits = hidden @ weight^T + bias, without forming the logits.
//
//   z[r,k] = hidden[r] . weight[i_rk] + bias[i_rk]
//   loss, slope and targets as in topk.h.
//
// The mean of a row of logits needs no logits: a linear head maps h to the mean
//
//   (1/V) sum_v (h . W[v] + b[v]) = h . w_mean + mean(b),   w_mean = (1/V) sum_v W[v].
//
// Gradient, of either loss. With g[r,k] = dL/dloss[r] slope[r,k], and s[r] = -(1/V) sum_k g[r,k] where the gradient flows
// through the global mean (otherwise s = 0), dL/dz[r,v] = s[r] + sum_{k: i_rk=v} g[r,k] as in topk.h. Through
// z = h W^T + b:
//
//   dL/dh[r] = sum_k g[r,k] W[i_rk] + V s[r] w_mean        since sum_v s[r] W[v] = V s[r] w_mean
//   dL/dW[v] = sum_{(r,k): i_rk=v} g[r,k] h[r] + sum_r s[r] h[r]
//   dL/db[v] = sum_{(r,k): i_rk=v} g[r,k]      + sum_r s[r]
//
// T, A and I, index, loss, grad and slope are as in topk.h; every sum is in A.
//
//   hidden, grad_hidden   T [R,d]
//   weight, grad_weight   T [V,d]
//   bias, grad_bias       T [V]     optional
//   weight_mean           A [d]     w_mean, which the caller computes
//
// The backward kernels add to grad_hidden, grad_weight and grad_bias, those that are asked for. Every
// sum is finished in A and rounded once into the buffer.
//
// linear_topk_mse_frozen (CPU) gives dL/dh[r] / (dL/dloss[r]) with the loss: of a head without gradient it is all that
// the backward pass needs, and the kept rows of W are read once instead of twice. Unlikelihood has no such form: its
// slope is known only when all logits of the row are.
#pragma once

#include "topk.h"
