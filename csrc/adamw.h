// adamw_: a step of AdamW (arXiv 1711.05101, algorithm 2) on one parameter, in place.
//
// With g = clip_factor grad and t the number of the step, from 1:
//
//   m <- m + (1 - beta1) (g - m)
//   v <- v + (1 - beta2) (g^2 - v)
//   w <- w - rate weight_decay w - rate / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)
//
// A bfloat16 weight is the upper half of a float32 one, w, rounded; low_bits are the lower half, as a signed number, so
// that w as an integer is weight 2^16 + low_bits.
//
//   weight, grad, exp_avg m   T [n]       float32 or bfloat16; m is rounded to T, and then taken for the step
//   exp_avg_sq v              float [n]
//   low_bits                  int16 [n]   in the guise of bfloat16; of bfloat16 weights alone
//   clip_factor               float [1]   optional: 1
//
// What is written must be contiguous.
//
// Bytes: 22 for a bfloat16 weight (weight, low_bits, m and v read and written, grad read), 28 for a float32 one.
#pragma once
