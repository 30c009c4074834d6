// scale_: tensor *= factor, in place; nothing is read or written where the factor is 1. For a loss scale,
// which nearly always is: the gradients that the losses formed in their forward pass are multiplied by
// what their backward pass receives.
//
//   tensor   T, any shape, contiguous   float32, float64, bfloat16, on CUDA float16
//   factor   float32 or float64, a scalar tensor on the same device
#pragma once
