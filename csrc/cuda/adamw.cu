// adamw_; formulas and bytes are in csrc/adamw.h. A thread takes 16 bytes of the weights: a launch for each parameter.
#include "../adamw.h"
#include "common.cuh"

namespace palu::cuda {
namespace {

constexpr int kAdamWThreads = 256;

// The float32 weight of which T is the upper half.
__device__ inline float join(__nv_bfloat16 upper, int16_t lower) {
  return __uint_as_float((static_cast<uint32_t>(__bfloat16_as_ushort(upper)) << 16) + static_cast<uint32_t>(lower));
}
__device__ inline float join(float weight, int16_t) { return weight; }

__device__ inline void split(float w, __nv_bfloat16& upper, int16_t& lower) {
  const uint32_t bits = __float_as_uint(w);
  lower = static_cast<int16_t>(bits & 0xFFFFu);
  upper = __ushort_as_bfloat16(static_cast<uint16_t>((bits + 0x8000u) >> 16));
}
__device__ inline void split(float w, float& weight, int16_t&) { weight = w; }

template <typename T, int kWidth>
__global__ __launch_bounds__(kAdamWThreads) void adamw_kernel(T* __restrict__ weight,                 // [n]
                                                              int16_t* __restrict__ low_bits,         // [n] or null
                                                              const T* __restrict__ grad,             // [n]
                                                              T* __restrict__ exp_avg,                // [n]
                                                              float* __restrict__ exp_avg_sq,         // [n]
                                                              const float* __restrict__ clip_factor,  // [1] or null
                                                              int64_t packs, float step_size, float decay_factor,
                                                              float one_minus_beta1, float one_minus_beta2, float eps) {
  const int64_t pack = static_cast<int64_t>(blockIdx.x) * kAdamWThreads + threadIdx.x;
  if (pack >= packs) return;
  auto w = load_pack<kWidth>(weight, pack), m = load_pack<kWidth>(exp_avg, pack);
  const auto g = load_pack<kWidth>(grad, pack);
  auto v = load_pack<kWidth>(exp_avg_sq, pack);
  Pack<int16_t, kWidth> low{};
  if constexpr (!std::is_same_v<T, float>) low = load_pack<kWidth>(low_bits, pack);
  const float clip = clip_factor ? *clip_factor : 1.0f;
#pragma unroll
  for (int n = 0; n < kWidth; ++n) {
    const float gradient = clip * to_acc(g.x[n]), before = to_acc(m.x[n]);
    m.x[n] = from_acc<T>(before + one_minus_beta1 * (gradient - before));
    v.x[n] += one_minus_beta2 * (gradient * gradient - v.x[n]);
    const float moved = decay_factor * join(w.x[n], low.x[n]) - step_size * (to_acc(m.x[n]) / (sqrtf(v.x[n]) + eps));
    split(moved, w.x[n], low.x[n]);
  }
  reinterpret_cast<Pack<T, kWidth>*>(weight)[pack] = w;
  reinterpret_cast<Pack<T, kWidth>*>(exp_avg)[pack] = m;
  reinterpret_cast<Pack<float, kWidth>*>(exp_avg_sq)[pack] = v;
  if constexpr (!std::is_same_v<T, float>) reinterpret_cast<Pack<int16_t, kWidth>*>(low_bits)[pack] = low;
}

template <typename T>
void launch(const AdamW& p, cudaStream_t stream) {
  const auto aligned = [&](const void* tensor) { return is_packed<T>(tensor, 0, p.size); };
  const bool packed =
      aligned(p.weight) && aligned(p.low_bits) && aligned(p.grad) && aligned(p.exp_avg) && aligned(p.exp_avg_sq);
  dispatch_width<T>(packed, [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    const int64_t packs = p.size / kWidth;
    adamw_kernel<T, kWidth><<<blocks_for(packs, kAdamWThreads), kAdamWThreads, 0, stream>>>(
        static_cast<T*>(p.weight), static_cast<int16_t*>(p.low_bits), static_cast<const T*>(p.grad),
        static_cast<T*>(p.exp_avg), static_cast<float*>(p.exp_avg_sq), static_cast<const float*>(p.clip_factor), packs,
        static_cast<float>(p.step_size), static_cast<float>(p.decay_factor), static_cast<float>(p.one_minus_beta1),
        static_cast<float>(p.one_minus_beta2), static_cast<float>(p.eps));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

}  // namespace

void adamw_(const AdamW& p, cudaStream_t stream) {
  if (p.size == 0) return;
  if (p.dtype == Dtype::kBFloat16) {
    launch<__nv_bfloat16>(p, stream);
  } else {
    launch<float>(p, stream);
  }
}

}  // namespace palu::cuda
