// cross_entropy_ and kl_div_: losses over whole rows of logits. Each returns the loss of every row [R]
// and overwrites the logits [R,V] with its gradient times row_weight[r].
//
// With m = max_v z_v and S = sum_v exp(z_v - m): lse = m + log S, softmax(z)_v = exp(z_v - m) / S.
//
// Cross-entropy, with P = softmax(z):
//                  loss = lse - z_label                     dloss/dz_v = P_v - [v = label]
//
// KL divergence, with P = softmax(z) and Q = softmax(z') of the reference logits z':
//   forward        loss = sum_v Q_v (log Q_v - log P_v)     dloss/dz_v = P_v - Q_v
//   reverse        loss = sum_v P_v (log P_v - log Q_v)     dloss/dz_v = P_v ((log P_v - log Q_v) - loss)
//   (reverse: dP_u/dz_v = P_u ([u = v] - P_v), and sum_u P_u dlog P_u/dz_v = 0)
//
//   logits z, ref_logits z'   T [R,V]     float32, float64, bfloat16, on CUDA float16
//   labels                    int64 [R]   every value in [0, V)
//   row_weight, loss          A [R]       A is float64 for T = float64, else float32; every sum is in A
//
// The loss is not weighted. No op here has an autograd formula: the gradient is formed here, in place.
#pragma once
