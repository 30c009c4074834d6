// topk_mse of logits = hidden @ weight^T + bias from the K rows of weight that each row of hidden
// needs; formulas are in csrc/linear_topk_mse.h.
//
// The rows of weight are the traffic: R K d sizeof(T) bytes. Everything else is small.
#include "linear_topk_mse.cuh"

namespace palu::cuda {
namespace {

// logit[r,k] = hidden[r] . weight[i_rk] + bias[i_rk]; a warp per (r,k).
template <typename T, typename I, int kWidth>
__global__ __launch_bounds__(kThreads) void gather_dot_kernel(const T* __restrict__ hidden,  // [R,d]
                                                              const T* __restrict__ weight,  // [V,d]
                                                              int64_t weight_stride,
                                                              const I* __restrict__ index,  // [R,K]
                                                              const T* __restrict__ bias,   // [V] or null
                                                              Acc<T>* __restrict__ logit,   // [R,K]
                                                              int64_t pairs, int64_t vocab_size, int64_t hidden_size,
                                                              int64_t k) {
  using A = Acc<T>;
  const int lane = threadIdx.x % 32;
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (pair >= pairs) return;
  const int64_t at = index[pair];
  CUDA_KERNEL_ASSERT(at >= 0 && at < vocab_size && "palu::linear_topk_mse: index out of range");
  hidden += pair / k * hidden_size;
  weight += at * weight_stride;

  const int64_t packs = hidden_size / kWidth;
  A sum = 0;
  const auto add = [&](int64_t pack, const Pack<T, kWidth>& w) {
    const auto h = load_pack<kWidth>(hidden, pack);
#pragma unroll
    for (int n = 0; n < kWidth; ++n) sum += to_acc(h.x[n]) * to_acc(w.x[n]);
  };
  int64_t pack = lane;
  for (; pack + 32 * (kUnroll - 1) < packs; pack += 32 * kUnroll) {
    Pack<T, kWidth> w[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) w[u] = load_pack<kWidth>(weight, pack + 32 * u);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) add(pack + 32 * u, w[u]);
  }
  for (; pack < packs; pack += 32) add(pack, load_pack<kWidth>(weight, pack));
  sum = warp_reduce(sum, Sum());
  if (lane == 0) logit[pair] = bias ? sum + to_acc(bias[at]) : sum;
}

// Subtracts c[r] from a row of logits, in place, and forms its loss; a block per row.
template <typename T>
__global__ __launch_bounds__(kThreads) void center_kernel(
    const T* __restrict__ hidden,            // [R,d]
    const Acc<T>* __restrict__ weight_mean,  // [d]
    const Acc<T>* __restrict__ bias_mean,    // [1] or null
    Acc<T>* __restrict__ loss,               // [R]
    Acc<T>* __restrict__ residual,           // [R,K], logits when the kernel starts
    int64_t hidden_size, int64_t k, Center center, Acc<T> constant) {
  using A = Acc<T>;
  hidden += blockIdx.x * hidden_size;
  residual += blockIdx.x * k;

  A c = constant;
  if (center == Center::kGlobalMean) {
    A sum = 0;
#pragma unroll 4
    for (int64_t j = threadIdx.x; j < hidden_size; j += kThreads) {
      sum += to_acc(hidden[j]) * weight_mean[j];
    }
    c = block_reduce(sum, A(0), Sum());
    if (bias_mean) c += *bias_mean;
  } else if (center == Center::kLocalMean) {
    A sum = 0;
#pragma unroll 4
    for (int64_t j = threadIdx.x; j < k; j += kThreads) sum += residual[j];
    c = block_reduce(sum, A(0), Sum()) / static_cast<A>(k);
  }

  A sum = 0;
#pragma unroll 4
  for (int64_t j = threadIdx.x; j < k; j += kThreads) {
    const A difference = residual[j] - c;
    residual[j] = difference;
    sum += difference * difference;
  }
  sum = block_reduce(sum, A(0), Sum());
  if (threadIdx.x == 0) loss[blockIdx.x] = sum / static_cast<A>(k);
}

}  // namespace

void linear_topk_mse(const LinearTopkMse& p, cudaStream_t stream) {
  if (p.rows == 0) return;
  dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    using A = Acc<T>;
    const bool packed =
        is_packed<T>(p.hidden, p.hidden_size, p.hidden_size) && is_packed<T>(p.weight, p.weight_stride, p.hidden_size);
    dispatch_index(p.index64, [&](auto i) {
      using I = decltype(i);
      dispatch_width<T>(packed, [&](auto width) {
        gather_dot_kernel<T, I, decltype(width)::value>
            <<<blocks_for(p.rows * p.k, kThreads / 32), kThreads, 0, stream>>>(
                static_cast<const T*>(p.hidden), static_cast<const T*>(p.weight), p.weight_stride,
                static_cast<const I*>(p.index), static_cast<const T*>(p.bias), static_cast<A*>(p.residual),
                p.rows * p.k, p.vocab_size, p.hidden_size, p.k);
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      });
    });
    center_kernel<T><<<static_cast<unsigned>(p.rows), kThreads, 0, stream>>>(
        static_cast<const T*>(p.hidden), static_cast<const A*>(p.weight_mean), static_cast<const A*>(p.bias_mean),
        static_cast<A*>(p.loss), static_cast<A*>(p.residual), p.hidden_size, p.k, p.center, static_cast<A>(p.constant));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

}  // namespace palu::cuda
