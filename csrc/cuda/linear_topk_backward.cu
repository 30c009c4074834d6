// The gradients of linear_topk.cu's losses; formulas and their derivation are in csrc/linear_topk.h.
//
// The gradient of hidden reads R K d sizeof(T) bytes of weight. Everything else is small, or, where the gradient of
// weight flows through the global mean, one read and one write of the whole buffer.
#include "linear_topk.cuh"

namespace palu::cuda {
namespace {

// grad_through_mean[r] = -(1/V) sum_k g[r,k], with g[r,k] = grad[r] slope[r,k]; a block per row.
template <typename A>
__global__ __launch_bounds__(kThreads) void grad_through_mean_kernel(const A* __restrict__ grad,         // [R]
                                                                     const A* __restrict__ slope,        // [R,K]
                                                                     A* __restrict__ grad_through_mean,  // [R]
                                                                     int64_t vocab_size, int64_t k) {
  slope += blockIdx.x * k;
  A sum = 0;
#pragma unroll 4
  for (int64_t j = threadIdx.x; j < k; j += kThreads) sum += slope[j];
  sum = block_reduce(sum, A(0), Sum());
  if (threadIdx.x == 0) {
    grad_through_mean[blockIdx.x] = -grad[blockIdx.x] * sum / static_cast<A>(vocab_size);
  }
}

// The gradient of hidden in two steps, so that few rows still fill the GPU: a block sums one slice of
// the K terms for a stretch of columns, then a thread per element adds the slices in order.
constexpr int kChunk = 32;              // terms whose weights and places a block keeps at a time
constexpr int64_t kSliceBlocks = 1024;  // enough for any GPU

template <typename T, typename I, int kWidth>
__global__ __launch_bounds__(kThreads, 4) void grad_hidden_slice_kernel(const Acc<T>* __restrict__ grad,   // [R]
                                                                        const Acc<T>* __restrict__ slope,  // [R,K]
                                                                        const T* __restrict__ weight,      // [V,d]
                                                                        int64_t weight_stride,
                                                                        const I* __restrict__ index,   // [R,K]
                                                                        Acc<T>* __restrict__ partial,  // [slices,R,d]
                                                                        int64_t rows, int64_t slices,
                                                                        int64_t vocab_size, int64_t hidden_size,
                                                                        int64_t k) {
  using A = Acc<T>;
  __shared__ A g[kChunk];
  __shared__ int64_t place[kChunk];
  const int64_t r = blockIdx.x / slices, slice = blockIdx.x % slices;
  const int64_t begin = k * slice / slices, end = k * (slice + 1) / slices;
  const A scale = grad[r];
  index += r * k;
  slope += r * k;

  const int64_t packs = hidden_size / kWidth;
  const int64_t pack = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  Pack<A, kWidth> sum{};
  for (int64_t chunk = begin; chunk < end; chunk += kChunk) {
    __syncthreads();  // the last chunk has been read
    if (threadIdx.x < kChunk) {
      // Terms past the end weigh nothing and read an entry that exists.
      const int64_t j = chunk + threadIdx.x;
      const int64_t at = j < end ? index[j] : 0;
      CUDA_KERNEL_ASSERT(at >= 0 && at < vocab_size && "palu::linear_topk_backward: index out of range");
      place[threadIdx.x] = at * weight_stride;
      g[threadIdx.x] = j < end ? scale * slope[j] : A(0);
    }
    __syncthreads();
    if (pack >= packs) continue;
    for (int j = 0; j < kChunk && chunk + j < end; j += kUnroll) {
      Pack<T, kWidth> w[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) w[u] = load_pack<kWidth>(weight + place[j + u], pack);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
        for (int n = 0; n < kWidth; ++n) sum.x[n] += g[j + u] * to_acc(w[u].x[n]);
      }
    }
  }
  if (pack < packs) {
    reinterpret_cast<Pack<A, kWidth>*>(partial + (slice * rows + r) * hidden_size)[pack] = sum;
  }
}

template <typename T>
__global__ __launch_bounds__(kThreads) void grad_hidden_kernel(
    const Acc<T>* __restrict__ partial,            // [slices,R,d]
    const Acc<T>* __restrict__ weight_mean,        // [d]; read with grad_through_mean only
    const Acc<T>* __restrict__ grad_through_mean,  // [R] or null
    T* __restrict__ grad_hidden,                   // [R,d]
    int64_t grad_hidden_stride, int64_t rows, int64_t slices, int64_t vocab_size, int64_t hidden_size) {
  using A = Acc<T>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= rows * hidden_size) return;
  const int64_t r = i / hidden_size, column = i % hidden_size;
  A sum = grad_through_mean ? static_cast<A>(vocab_size) * grad_through_mean[r] * weight_mean[column] : A(0);
#pragma unroll 8
  for (int64_t s = 0; s < slices; ++s) sum += partial[s * rows * hidden_size + i];
  T& out = grad_hidden[r * grad_hidden_stride + column];
  out = from_acc<T>(to_acc(out) + sum);
}

// common_row = sum_r grad_through_mean[r] hidden[r], which every row of grad_weight receives; a thread per column.
template <typename T>
__global__ __launch_bounds__(kThreads) void common_row_kernel(const T* __restrict__ hidden,                  // [R,d]
                                                              const Acc<T>* __restrict__ grad_through_mean,  // [R]
                                                              Acc<T>* __restrict__ common_row,               // [d]
                                                              int64_t rows, int64_t hidden_size) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= hidden_size) return;
  Acc<T> sum = 0;
#pragma unroll 8
  for (int64_t r = 0; r < rows; ++r) sum += grad_through_mean[r] * to_acc(hidden[r * hidden_size + column]);
  common_row[column] = sum;
}

// offsets[v] = how many of the sorted indices are below v: entry v's own are offsets[v] .. offsets[v+1].
template <typename I>
__global__ __launch_bounds__(kThreads) void offsets_kernel(const I* __restrict__ sorted_index,  // [R*K]
                                                           int64_t* __restrict__ offsets,       // [V+1]
                                                           int64_t pairs, int64_t vocab_size) {
  const int64_t v = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (v > vocab_size) return;
  int64_t low = 0, high = pairs;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (sorted_index[middle] < v) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  offsets[v] = low;
}

// A block per vocabulary entry: adds its own terms in the order (r,k), then the common row.
template <typename T, int kWidth>
__global__ __launch_bounds__(kThreads) void grad_weight_kernel(const Acc<T>* __restrict__ grad,           // [R]
                                                               const Acc<T>* __restrict__ slope,          // [R,K]
                                                               const T* __restrict__ hidden,              // [R,d]
                                                               const int64_t* __restrict__ sorted_order,  // [R*K]
                                                               const int64_t* __restrict__ offsets,       // [V+1]
                                                               const Acc<T>* __restrict__ common_row,     // [d] or null
                                                               T* __restrict__ grad_weight,               // [V,d]
                                                               int64_t grad_weight_stride, int64_t hidden_size,
                                                               int64_t k) {
  using A = Acc<T>;
  const int64_t v = blockIdx.x;
  const int64_t begin = offsets[v], end = offsets[v + 1];
  if (begin == end && !common_row) return;
  auto* out = reinterpret_cast<Pack<T, kWidth>*>(grad_weight + v * grad_weight_stride);
  for (int64_t pack = threadIdx.x; pack < hidden_size / kWidth; pack += kThreads) {
    Pack<T, kWidth> buffer = out[pack];
    Pack<A, kWidth> sum{};
    if (common_row) sum = load_pack<kWidth>(common_row, pack);
    for (int64_t p = begin; p < end; ++p) {
      const int64_t pair = sorted_order[p], r = pair / k;
      const A g = grad[r] * slope[pair];
      const auto h = load_pack<kWidth>(hidden + r * hidden_size, pack);
#pragma unroll
      for (int n = 0; n < kWidth; ++n) sum.x[n] += g * to_acc(h.x[n]);
    }
#pragma unroll
    for (int n = 0; n < kWidth; ++n) buffer.x[n] = from_acc<T>(to_acc(buffer.x[n]) + sum.x[n]);
    out[pack] = buffer;
  }
}

// A thread per vocabulary entry, as above for the bias.
template <typename T>
__global__ __launch_bounds__(kThreads) void grad_bias_kernel(
    const Acc<T>* __restrict__ grad,               // [R]
    const Acc<T>* __restrict__ slope,              // [R,K]
    const int64_t* __restrict__ sorted_order,      // [R*K]
    const int64_t* __restrict__ offsets,           // [V+1]
    const Acc<T>* __restrict__ grad_through_mean,  // [R] or null
    T* __restrict__ grad_bias,                     // [V]
    int64_t rows, int64_t vocab_size, int64_t k) {
  using A = Acc<T>;
  A sum = 0;
  if (grad_through_mean) {
    for (int64_t r = threadIdx.x; r < rows; r += kThreads) sum += grad_through_mean[r];
    sum = block_reduce(sum, A(0), Sum());
  }
  const int64_t v = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (v >= vocab_size) return;
  for (int64_t p = offsets[v]; p < offsets[v + 1]; ++p) {
    const int64_t pair = sorted_order[p];
    sum += grad[pair / k] * slope[pair];
  }
  grad_bias[v] = from_acc<T>(to_acc(grad_bias[v]) + sum);
}

}  // namespace

void linear_grad_through_mean(const LinearTopkBackward& p, cudaStream_t stream) {
  if (p.rows == 0) return;
  dispatch(p.dtype, [&](auto t) {
    using A = Acc<decltype(t)>;
    grad_through_mean_kernel<A><<<static_cast<unsigned>(p.rows), kThreads, 0, stream>>>(
        static_cast<const A*>(p.grad), static_cast<const A*>(p.slope), static_cast<A*>(p.grad_through_mean),
        p.vocab_size, p.k);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

int64_t linear_grad_hidden_slices(int64_t rows, int64_t k) {
  const int64_t wanted = (kSliceBlocks + rows - 1) / rows, chunks = (k + kChunk - 1) / kChunk;
  return wanted < chunks ? wanted : chunks;
}

void linear_grad_hidden(const LinearTopkBackward& p, cudaStream_t stream) {
  if (p.rows == 0 || p.hidden_size == 0) return;
  const int64_t slices = linear_grad_hidden_slices(p.rows, p.k);
  dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    using A = Acc<T>;
    dispatch_index(p.index64, [&](auto i) {
      using I = decltype(i);
      dispatch_width<T>(is_packed<T>(p.weight, p.weight_stride, p.hidden_size), [&](auto width) {
        constexpr int kWidth = decltype(width)::value;
        const dim3 blocks(static_cast<unsigned>(p.rows * slices), blocks_for(p.hidden_size / kWidth, kThreads));
        grad_hidden_slice_kernel<T, I, kWidth><<<blocks, kThreads, 0, stream>>>(
            static_cast<const A*>(p.grad), static_cast<const A*>(p.slope), static_cast<const T*>(p.weight),
            p.weight_stride, static_cast<const I*>(p.index), static_cast<A*>(p.partial), p.rows, slices, p.vocab_size,
            p.hidden_size, p.k);
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      });
    });
    grad_hidden_kernel<T><<<blocks_for(p.rows * p.hidden_size, kThreads), kThreads, 0, stream>>>(
        static_cast<const A*>(p.partial), static_cast<const A*>(p.weight_mean),
        static_cast<const A*>(p.grad_through_mean), static_cast<T*>(p.grad_hidden), p.grad_hidden_stride, p.rows,
        slices, p.vocab_size, p.hidden_size);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

void linear_grad_weight(const LinearTopkBackward& p, cudaStream_t stream) {
  if (p.rows == 0) return;
  dispatch_index(p.index64, [&](auto i) {
    using I = decltype(i);
    offsets_kernel<I><<<blocks_for(p.vocab_size + 1, kThreads), kThreads, 0, stream>>>(
        static_cast<const I*>(p.sorted_index), p.offsets, p.rows * p.k, p.vocab_size);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    using A = Acc<T>;
    if (p.grad_weight && p.hidden_size > 0) {
      if (p.grad_through_mean) {
        common_row_kernel<T><<<blocks_for(p.hidden_size, kThreads), kThreads, 0, stream>>>(
            static_cast<const T*>(p.hidden), static_cast<const A*>(p.grad_through_mean), static_cast<A*>(p.common_row),
            p.rows, p.hidden_size);
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      }
      const bool packed = is_packed<T>(p.hidden, p.hidden_size, p.hidden_size) &&
                          is_packed<T>(p.grad_weight, p.grad_weight_stride, p.hidden_size);
      dispatch_width<T>(packed, [&](auto width) {
        grad_weight_kernel<T, decltype(width)::value><<<static_cast<unsigned>(p.vocab_size), kThreads, 0, stream>>>(
            static_cast<const A*>(p.grad), static_cast<const A*>(p.slope), static_cast<const T*>(p.hidden),
            p.sorted_order, p.offsets, p.grad_through_mean ? static_cast<const A*>(p.common_row) : nullptr,
            static_cast<T*>(p.grad_weight), p.grad_weight_stride, p.hidden_size, p.k);
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      });
    }
    if (p.grad_bias) {
      grad_bias_kernel<T><<<blocks_for(p.vocab_size, kThreads), kThreads, 0, stream>>>(
          static_cast<const A*>(p.grad), static_cast<const A*>(p.slope), p.sorted_order, p.offsets,
          static_cast<const A*>(p.grad_through_mean), static_cast<T*>(p.grad_bias), p.rows, p.vocab_size, p.k);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
  });
}

}  // namespace palu::cuda
