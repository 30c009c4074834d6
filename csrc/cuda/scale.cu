// scale_, see csrc/scale.h, with the factor on the device: one that is 1 costs one tiny launch and neither
// a pass over the tensor nor a host synchronisation.
#include "../scale.h"
#include "common.cuh"

namespace palu::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kUnroll = 4;            // packs per thread in flight
constexpr int64_t kMaxBlocks = 1024;  // fills any GPU, and leaves quickly when there is nothing to do

template <typename T, typename F>
__global__ __launch_bounds__(kThreads) void scale_kernel(T* tensor,                     // [n]
                                                         const F* __restrict__ factor,  // [1]
                                                         int64_t n) {
  using A = Acc<T>;
  constexpr int N = kPack<T>;
  const F exact = *factor;
  if (exact == F(1)) return;
  const A by = static_cast<A>(exact);

  const int64_t step = int64_t{kThreads} * N;
  const int64_t begin = blockIdx.x * kUnroll * step + threadIdx.x * N - lead_of(tensor);
  for (int64_t e = begin; e < n; e += gridDim.x * kUnroll * step) {
    uint4 packs[kUnroll];
    load_packs(tensor, e, step, n, from_acc<T>(0), packs);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      A x[N];
      unpack(packs[u], x, T{});
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] *= by;
      store_pack(tensor, e + u * step, n, x);
    }
  }
}

}  // namespace

void scale_(const Scale& p, cudaStream_t stream) {
  if (p.n == 0) return;
  dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int64_t per_block = int64_t{kThreads} * kUnroll * kPack<T>;
    const int64_t needed = (p.n + kPack<T> - 1 + per_block - 1) / per_block;
    const auto blocks = static_cast<unsigned>(needed < kMaxBlocks ? needed : kMaxBlocks);
    auto* tensor = static_cast<T*>(p.tensor);
    if (p.factor64) {
      scale_kernel<<<blocks, kThreads, 0, stream>>>(tensor, static_cast<const double*>(p.factor), p.n);
    } else {
      scale_kernel<<<blocks, kThreads, 0, stream>>>(tensor, static_cast<const float*>(p.factor), p.n);
    }
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

}  // namespace palu::cuda
