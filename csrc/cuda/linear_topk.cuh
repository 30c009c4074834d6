// What the forward passes of linear_topk.cu and the backward pass share.
#pragma once

#include "../linear_topk.h"
#include "common.cuh"

namespace palu::cuda {

constexpr int kThreads = 256;
constexpr int kUnroll = 8;  // loads of weight per thread in flight: registers for them are what the launch bounds leave

}  // namespace palu::cuda
