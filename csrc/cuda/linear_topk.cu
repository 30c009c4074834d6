// topk_mse and topk_unlikelihood of logits = hidden @ weight^T + bias from the K rows of weight that each row of hidden
// needs; formulas are in csrc/linear_topk.h.
//
// The rows of weight are the traffic: R K d sizeof(T) bytes. Everything else is small.
#include "linear_topk.cuh"

namespace palu::cuda {
namespace {

// logit[r,k] = hidden[r] . weight[i_rk] + bias[i_rk]; a warp per (r,k).
template <typename T, typename I, int kWidth>
__global__ __launch_bounds__(kThreads, 2) void gather_dot_kernel(const T* __restrict__ hidden,  // [R,d]
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
  CUDA_KERNEL_ASSERT(at >= 0 && at < vocab_size && "palu::linear_topk: index out of range");
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

// The mean square of a row of logits less c[r], and its slope in their place; a block per row.
template <typename T>
__global__ __launch_bounds__(kThreads) void mse_kernel(const T* __restrict__ hidden,            // [R,d]
                                                       const Acc<T>* __restrict__ weight_mean,  // [d]
                                                       const Acc<T>* __restrict__ bias_mean,    // [1] or null
                                                       Acc<T>* __restrict__ loss,               // [R]
                                                       Acc<T>* __restrict__ slope,  // [R,K], logits when it starts
                                                       int64_t hidden_size, int64_t k, Center center, Acc<T> constant) {
  using A = Acc<T>;
  hidden += blockIdx.x * hidden_size;
  slope += blockIdx.x * k;

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
    for (int64_t j = threadIdx.x; j < k; j += kThreads) sum += slope[j];
    c = block_reduce(sum, A(0), Sum()) / static_cast<A>(k);
  }

  A sum = 0;
#pragma unroll 4
  for (int64_t j = threadIdx.x; j < k; j += kThreads) {
    const A difference = slope[j] - c;
    slope[j] = A(2) / static_cast<A>(k) * difference;
    sum += difference * difference;
  }
  sum = block_reduce(sum, A(0), Sum());
  if (threadIdx.x == 0) loss[blockIdx.x] = sum / static_cast<A>(k);
}

// The unlikelihood of a row of logits, and its slope in their place; a block per row. All threads have read the first
// logit when thread 0 overwrites it: the reductions are between. The others each thread reads and writes alone.
template <typename A, typename I>
__global__ __launch_bounds__(kThreads) void unlikelihood_kernel(const I* __restrict__ index,  // [R,K]
                                                                A* __restrict__ loss,         // [R]
                                                                A* __restrict__ slope,  // [R,K], logits when it starts
                                                                int64_t k, A floor) {
  index += blockIdx.x * k;
  slope += blockIdx.x * k;
  const I true_token = index[0];
  const A true_logit = slope[0];
  const auto each_candidate = [&](auto f) {
    for (int64_t j = threadIdx.x; j < k; j += kThreads) {
      if (index[j] != true_token) f(slope[j]);
    }
  };

  A largest = lowest<A>();  // not -inf, which would leave NaN in z - largest
  each_candidate([&](A z) { largest = fmax(largest, z); });
  largest = block_reduce(largest, lowest<A>(), Max());
  A mass = 0;
  each_candidate([&](A z) { mass += exp(z - largest); });
  mass = block_reduce(mass, A(0), Sum());

  // Without a candidate the row is like one whose token is not above the floor.
  const A margin = mass == 0 ? lowest<A>() : (true_logit - largest) - log(mass);
  const LossAndProbability<A> of_true = unlikelihood_of(margin, floor);
  if (threadIdx.x == 0) loss[blockIdx.x] = of_true.loss;
  for (int64_t j = threadIdx.x; j < k; j += kThreads) {
    const bool pushed = index[j] != true_token && of_true.probability != 0;
    const A of_candidate = pushed ? -of_true.probability * exp(slope[j] - largest) / mass : A(0);
    slope[j] = j == 0 ? of_true.probability : of_candidate;
  }
}

// logit[r,k], in the place of the slopes.
template <typename T, typename I>
void gather_logits(const LinearTopk& p, cudaStream_t stream) {
  const bool packed =
      is_packed<T>(p.hidden, p.hidden_size, p.hidden_size) && is_packed<T>(p.weight, p.weight_stride, p.hidden_size);
  dispatch_width<T>(packed, [&](auto width) {
    gather_dot_kernel<T, I, decltype(width)::value><<<blocks_for(p.rows * p.k, kThreads / 32), kThreads, 0, stream>>>(
        static_cast<const T*>(p.hidden), static_cast<const T*>(p.weight), p.weight_stride,
        static_cast<const I*>(p.index), static_cast<const T*>(p.bias), static_cast<Acc<T>*>(p.slope), p.rows * p.k,
        p.vocab_size, p.hidden_size, p.k);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

}  // namespace

void linear_topk_mse(const LinearTopk& p, cudaStream_t stream) {
  if (p.rows == 0) return;
  dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    using A = Acc<T>;
    dispatch_index(p.index64, [&](auto i) { gather_logits<T, decltype(i)>(p, stream); });
    mse_kernel<T><<<static_cast<unsigned>(p.rows), kThreads, 0, stream>>>(
        static_cast<const T*>(p.hidden), static_cast<const A*>(p.weight_mean), static_cast<const A*>(p.bias_mean),
        static_cast<A*>(p.loss), static_cast<A*>(p.slope), p.hidden_size, p.k, p.center, static_cast<A>(p.constant));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

void linear_topk_unlikelihood(const LinearTopk& p, cudaStream_t stream) {
  if (p.rows == 0) return;
  dispatch(p.dtype, [&](auto t) {
    using A = Acc<decltype(t)>;
    dispatch_index(p.index64, [&](auto i) {
      using I = decltype(i);
      gather_logits<decltype(t), I>(p, stream);
      unlikelihood_kernel<A, I><<<static_cast<unsigned>(p.rows), kThreads, 0, stream>>>(
          static_cast<const I*>(p.index), static_cast<A*>(p.loss), static_cast<A*>(p.slope), p.k,
          static_cast<A>(p.floor));
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
}

}  // namespace palu::cuda
