// topk_mse and topk_backward over rows of logits; formulas and the gradient's derivation are in csrc/topk.h.
//
// Both directions are bound by device memory. The least traffic per row, K indices of I bytes:
//
//   forward    V sizeof(T) read for the mean, K I read, K sizeof(A) written
//   backward   V sizeof(T) written, K (I + sizeof(A)) read
//
// What keeps the forward pass from that is latency between the loads, so the indices are asked for first,
// before the row, and stay in registers: all of them up to K = kKept * kBlock, beyond that they are read
// again. The gather reads single elements of a row that was just streamed, from L2; the scatter of the
// backward pass writes them into a tile of the row in shared memory.
#include "../topk.h"
#include "common.cuh"

namespace palu::cuda {
namespace {

constexpr int kBlock = 1024;
constexpr int kKept = 5;    // indices per thread in registers: enough for K = 5000
constexpr int kUnroll = 4;  // independent 16-byte loads per thread in flight

// Reads the indices at `first` and every kBlock after it; beyond the last, 0.
template <typename I>
__device__ void load_index(const I* __restrict__ index, int64_t first, int64_t k, int64_t vocab_size,
                           uint32_t (&at)[kKept]) {
#pragma unroll
  for (int u = 0; u < kKept; ++u) {
    const int64_t j = first + u * kBlock;
    const I entry = j < k ? index[j] : 0;
    CUDA_KERNEL_ASSERT(entry >= 0 && entry < vocab_size && "palu::topk_mse: index out of range");
    at[u] = static_cast<uint32_t>(entry);
  }
}

// A block per row: streams the row for its mean, then gathers.
template <typename T, typename I>
__global__ __launch_bounds__(kBlock, 1) void topk_mse_kernel(const T* __restrict__ logits,  // [R,V]
                                                             int64_t logits_stride,
                                                             const I* __restrict__ index,  // [R,K]
                                                             Acc<T>* __restrict__ loss,    // [R]
                                                             Acc<T>* __restrict__ slope,   // [R,K]
                                                             int64_t vocab_size, int64_t k, Center center,
                                                             Acc<T> constant) {
  using A = Acc<T>;
  const int64_t r = blockIdx.x;
  const T* row = logits + r * logits_stride;
  index += r * k;
  slope += r * k;

  uint32_t at[kKept];
  load_index(index, threadIdx.x, k, vocab_size, at);
  const auto gather = [&](auto f) {  // f(j, z) for this thread's share of the K logits
    for (int64_t first = threadIdx.x; first < k; first += kKept * kBlock) {
      if (k > kKept * kBlock) load_index(index, first, k, vocab_size, at);
      T z[kKept];
#pragma unroll
      for (int u = 0; u < kKept; ++u) z[u] = row[at[u]];
#pragma unroll
      for (int u = 0; u < kKept; ++u) {
        if (first + u * kBlock < k) f(first + u * kBlock, to_acc(z[u]));
      }
    }
  };

  A c = constant;
  if (center == Center::kGlobalMean) {
    constexpr int N = kPack<T>;
    constexpr int64_t step = kBlock * N;
    A sum = 0;
    for (int64_t e = int64_t{threadIdx.x} * N - lead_of(row); e < vocab_size; e += kUnroll * step) {
      uint4 packs[kUnroll];
      load_packs(row, e, step, vocab_size, from_acc<T>(0), packs);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        A z[N];
        unpack(packs[u], z, T{});
#pragma unroll
        for (int n = 0; n < N; ++n) sum += z[n];
      }
    }
    c = block_reduce(sum, A(0), Sum()) / static_cast<A>(vocab_size);
  } else if (center == Center::kLocalMean) {
    A sum = 0;
    gather([&](int64_t, A z) { sum += z; });
    c = block_reduce(sum, A(0), Sum()) / static_cast<A>(k);
  }

  A sum = 0;
  gather([&](int64_t j, A z) {
    const A difference = z - c;
    slope[j] = A(2) / static_cast<A>(k) * difference;
    sum += difference * difference;
  });
  sum = block_reduce(sum, A(0), Sum());
  if (threadIdx.x == 0) loss[r] = sum / static_cast<A>(k);
}

// A block per tile of a row: fills the tile with s[r] in shared memory, puts s[r] + g[r,k] at the
// indices that fall into it, and writes it out once. What is put is the answer only where the index is
// alone in its row: two bits per entry tell. Entries that occur more than once (none, for the indices
// of a top-K) get their sum from a warp that looks through all K indices, always in the same order.
//
// The smaller the tile, the more blocks overlap, but every tile of a row reads all K indices and, for
// s[r], all K slopes (from L2, after the first).
constexpr int kTileBytes = 56 * 1024;  // with its bits less than 64 KB, which is all that a T4 has
constexpr int kTileThreads = 512;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kTileBlocks = 2;  // of a multiprocessor: all of its threads
#else
constexpr int kTileBlocks = 3;
#endif
constexpr int kTileUnroll = 4;
template <typename T>
constexpr int kTile = kTileBytes / sizeof(T);  // elements
template <typename T>
constexpr int kTileShared = kTileBytes + 2 * kTile<T> / 8;

template <typename T, typename I>
__global__ __launch_bounds__(kTileThreads,
                             kTileBlocks) void topk_backward_kernel(const Acc<T>* __restrict__ grad,   // [R]
                                                                    const Acc<T>* __restrict__ slope,  // [R,K]
                                                                    const I* __restrict__ index,       // [R,K]
                                                                    T* __restrict__ grad_logits,       // [R,V]
                                                                    int64_t grad_stride, int64_t tiles,
                                                                    int64_t vocab_size, int64_t k, bool through_mean) {
  using A = Acc<T>;
  constexpr int N = kPack<T>;
  extern __shared__ uint4 shared[];
  T* tile = reinterpret_cast<T*>(shared);                           // [kTile]
  unsigned* occurs = reinterpret_cast<unsigned*>(tile + kTile<T>);  // [kTile / 32]
  unsigned* repeats = occurs + kTile<T> / 32;                       // [kTile / 32]

  const int64_t r = blockIdx.x / tiles;
  T* row = grad_logits + r * grad_stride;
  slope += r * k;
  index += r * k;
  // Tiles begin at a 16-byte boundary; the part before the row's first element is left out.
  const int64_t begin = blockIdx.x % tiles * kTile<T> - lead_of(row);

  const A scale = grad[r];  // g[r,k] = scale slope[r,k]
  for (int w = threadIdx.x; w < kTile<T> / 32; w += kTileThreads) occurs[w] = repeats[w] = 0;

  A grad_through_mean = 0;
  if (through_mean) {
    A sum = 0;
#pragma unroll 4
    for (int64_t j = threadIdx.x; j < k; j += kTileThreads) sum += slope[j];
    grad_through_mean = -scale * block_reduce(sum, A(0), Sum()) / static_cast<A>(vocab_size);
  }

  A fill[N];
#pragma unroll
  for (int n = 0; n < N; ++n) fill[n] = grad_through_mean;
  const uint4 fill_pack = pack(fill, T{});
#pragma unroll
  for (int p = threadIdx.x; p < kTile<T> / N; p += kTileThreads) shared[p] = fill_pack;
  __syncthreads();

  int repeated = 0;
  for (int64_t first = threadIdx.x; first < k; first += kTileUnroll * kTileThreads) {
    I at[kTileUnroll];
    A value[kTileUnroll];
#pragma unroll
    for (int u = 0; u < kTileUnroll; ++u) {
      const int64_t j = first + u * kTileThreads;
      at[u] = j < k ? index[j] : 0;
      value[u] = j < k ? slope[j] : A(0);
    }
#pragma unroll
    for (int u = 0; u < kTileUnroll; ++u) {
      if (first + u * kTileThreads >= k) break;
      CUDA_KERNEL_ASSERT(at[u] >= 0 && at[u] < vocab_size && "palu::topk_backward: index out of range");
      const int64_t place = at[u] - begin;
      if (place < 0 || place >= kTile<T>) continue;
      const unsigned bit = 1u << (place % 32);
      if (!(atomicOr(&occurs[place / 32], bit) & bit)) {
        tile[place] = from_acc<T>(grad_through_mean + scale * value[u]);
      } else {
        atomicOr(&repeats[place / 32], bit);
        repeated = 1;
      }
    }
  }
  if (__syncthreads_or(repeated)) {
    const int lane = threadIdx.x % 32;
    for (int64_t first = threadIdx.x - lane; first < k; first += kTileThreads) {
      const int64_t j = first + lane;
      const int64_t place = j < k ? index[j] - begin : -1;
      bool mine = false;  // whoever clears the bit takes the entry
      if (place >= 0 && place < kTile<T>) {
        const unsigned bit = 1u << (place % 32);
        mine = atomicAnd(&repeats[place / 32], ~bit) & bit;
      }
      for (unsigned owners = __ballot_sync(kWarpMask, mine); owners; owners &= owners - 1) {
        const int64_t entry = __shfl_sync(kWarpMask, place, __ffs(owners) - 1);
        A sum = 0;
#pragma unroll 4
        for (int64_t q = lane; q < k; q += 32) {
          if (index[q] == begin + entry) sum += slope[q];
        }
        sum = warp_reduce(sum, Sum());
        if (lane == 0) tile[entry] = from_acc<T>(grad_through_mean + scale * sum);
      }
    }
    __syncthreads();
  }

#pragma unroll 4
  for (int p = threadIdx.x; p < kTile<T> / N; p += kTileThreads) {
    const int64_t e = begin + int64_t{p} * N;
    if (e >= 0 && e + N <= vocab_size) {
      *reinterpret_cast<uint4*>(row + e) = shared[p];
    } else {
      for (int n = 0; n < N; ++n) {
        if (e + n >= 0 && e + n < vocab_size) row[e + n] = tile[p * N + n];
      }
    }
  }
}

}  // namespace

void topk_mse(const TopkMse& p, cudaStream_t stream) {
  if (p.rows == 0) return;
  dispatch(p.dtype, [&](auto t) {
    dispatch_index(p.index64, [&](auto i) {
      using T = decltype(t);
      using I = decltype(i);
      using A = Acc<T>;
      topk_mse_kernel<T, I><<<static_cast<unsigned>(p.rows), kBlock, 0, stream>>>(
          static_cast<const T*>(p.logits), p.logits_stride, static_cast<const I*>(p.index), static_cast<A*>(p.loss),
          static_cast<A*>(p.slope), p.vocab_size, p.k, p.center, static_cast<A>(p.constant));
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
}

void topk_backward(const TopkBackward& p, cudaStream_t stream) {
  if (p.rows == 0) return;
  dispatch(p.dtype, [&](auto t) {
    dispatch_index(p.index64, [&](auto i) {
      using T = decltype(t);
      using I = decltype(i);
      using A = Acc<T>;
      const int64_t tiles = (p.vocab_size + kPack<T> - 1 + kTile<T> - 1) / kTile<T>;  // at the largest lead
      C10_CUDA_CHECK(cudaFuncSetAttribute(topk_backward_kernel<T, I>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          kTileShared<T>));
      topk_backward_kernel<T, I><<<static_cast<unsigned>(p.rows * tiles), kTileThreads, kTileShared<T>, stream>>>(
          static_cast<const A*>(p.grad), static_cast<const A*>(p.slope), static_cast<const I*>(p.index),
          static_cast<T*>(p.grad_logits), p.grad_logits_stride, tiles, p.vocab_size, p.k, p.through_mean);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
}

}  // namespace palu::cuda
