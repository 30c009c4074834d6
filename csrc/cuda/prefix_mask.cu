// Onset mask; its definition is in csrc/prefix_mask.h.
//
// A warp per row takes 32 labels a step. One ballot gives the sensitive ones; a label's place in its
// span is its distance to the last lane before it that is not sensitive, plus, if there is none, the
// length of the span that the step before left open. The labels of 8 steps are loaded together, so
// that a long row does not wait for memory at every step. Bytes: 8 read and 1 written per label.
#include "../prefix_mask.h"
#include "common.cuh"

namespace palu::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kSteps = 8;

__global__ __launch_bounds__(32 * kWarps) void prefix_mask_kernel(const int64_t* __restrict__ labels,  // [B,T]
                                                                  int64_t batch_stride, int64_t token_stride,
                                                                  bool* __restrict__ mask,  // [B,T]
                                                                  int64_t batch, int64_t length, int64_t n,
                                                                  int64_t eos) {
  const int lane = threadIdx.x % 32;
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (b >= batch) return;
  labels += b * batch_stride;
  mask += b * length;

  int64_t open = 0;  // sensitive labels at the end of the steps so far
  for (int64_t t0 = lane; t0 - lane < length; t0 += 32 * kSteps) {
    int64_t label[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int64_t t = t0 + 32 * s;
      label[s] = t < length ? labels[t * token_stride] : -1;
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int64_t t = t0 + 32 * s;
      const bool sensitive = label[s] >= 0 && label[s] != eos;
      const unsigned others = ~__ballot_sync(kWarpMask, sensitive);
      const unsigned before = others & ((1u << lane) - 1);
      // How many sensitive labels of the same span precede this one.
      const int64_t place = before ? lane - 1 - (31 - __clz(before)) : lane + open;
      if (t < length) mask[t] = sensitive && (n < 0 || place < n);
      open = others ? __clz(others) : open + 32;
    }
  }
}

}  // namespace

void prefix_mask(const PrefixMask& p, cudaStream_t stream) {
  if (p.batch == 0 || p.length == 0) return;
  const auto blocks = static_cast<unsigned>((p.batch + kWarps - 1) / kWarps);
  prefix_mask_kernel<<<blocks, 32 * kWarps, 0, stream>>>(p.labels, p.batch_stride, p.token_stride, p.mask, p.batch,
                                                         p.length, p.n, p.eos);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace palu::cuda
