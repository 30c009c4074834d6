// The launchers of csrc/cuda/launch.h as C functions, for ctypes. machine.py reads the members of their structs from
// it; each function returns whether the struct has the size that was expected, and else does nothing.
#include "launch.h"

namespace palu::cuda {

#define PALU_LAUNCHER(launcher, Parameters)                                     \
  extern "C" bool palu_##launcher(const Parameters* p, int64_t size) {          \
    return size == sizeof(Parameters) && (launcher(*p, /*stream=*/nullptr), 1); \
  }

PALU_LAUNCHER(prefix_mask, PrefixMask)
PALU_LAUNCHER(topk_mse, TopkMse)
PALU_LAUNCHER(topk_backward, TopkBackward)
PALU_LAUNCHER(linear_topk_mse, LinearTopk)
PALU_LAUNCHER(linear_topk_unlikelihood, LinearTopk)
PALU_LAUNCHER(linear_grad_through_mean, LinearTopkBackward)
PALU_LAUNCHER(linear_grad_hidden, LinearTopkBackward)
PALU_LAUNCHER(linear_grad_weight, LinearTopkBackward)
PALU_LAUNCHER(cross_entropy_, CrossEntropy)
PALU_LAUNCHER(kl_div_, KlDiv)
PALU_LAUNCHER(adamw_, AdamW)

}  // namespace palu::cuda
