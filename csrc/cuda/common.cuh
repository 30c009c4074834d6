// What the kernels share: dtypes, 16-byte packs of a row, reductions, and the cluster of blocks that
// works on one row.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "launch.h"

namespace palu::cuda {

// ---- dtypes ----

template <typename T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <typename T>
using Acc = typename AccOf<T>::type;

__device__ inline float to_acc(float x) { return x; }
__device__ inline double to_acc(double x) { return x; }
__device__ inline float to_acc(__half x) { return __half2float(x); }
__device__ inline float to_acc(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ T from_acc(Acc<T> x) {
  return x;
}
template <>
__device__ inline __half from_acc<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_acc<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// The lowest finite value: as a logit its softmax is 0, and unlike -inf it leaves no NaN in z - max.
template <typename T>
__device__ T lowest();
template <>
__device__ inline float lowest<float>() {
  return -3.402823466e+38f;
}
template <>
__device__ inline double lowest<double>() {
  return -1.7976931348623157e+308;
}
template <>
__device__ inline __half lowest<__half>() {
  return __ushort_as_half(0xFBFFu);
}
template <>
__device__ inline __nv_bfloat16 lowest<__nv_bfloat16>() {
  return __ushort_as_bfloat16(0xFF7Fu);
}

// Calls f with a value of the dtype's C++ type.
template <typename F>
void dispatch(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kFloat: return f(float{});
    case Dtype::kDouble: return f(double{});
    case Dtype::kHalf: return f(__half{});
    case Dtype::kBFloat16: return f(__nv_bfloat16{});
  }
}

template <typename F>
void dispatch_index(bool index64, F f) {
  if (index64) {
    f(int64_t{});
  } else {
    f(int32_t{});
  }
}

// ---- 16-byte packs ----

template <typename T>
constexpr int kPack = 16 / sizeof(T);  // elements moved by one 16-byte access

// A pack stays in four registers, as uint4, until it is used: kept as elements, packs of 2-byte types
// would take twice the registers.
__device__ inline void unpack(uint4 bits, float (&x)[4], float) {
  x[0] = __uint_as_float(bits.x), x[1] = __uint_as_float(bits.y);
  x[2] = __uint_as_float(bits.z), x[3] = __uint_as_float(bits.w);
}
__device__ inline void unpack(uint4 bits, double (&x)[2], double) {
  x[0] = __hiloint2double(bits.y, bits.x), x[1] = __hiloint2double(bits.w, bits.z);
}
template <typename T>  // __half or __nv_bfloat16
__device__ void unpack(uint4 bits, float (&x)[8], T) {
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const auto half = static_cast<uint16_t>(words[n / 2] >> 16 * (n % 2));
    x[n] = to_acc(reinterpret_cast<const T&>(half));
  }
}

__device__ inline uint4 pack(const float (&x)[4], float) {
  return make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3]));
}
__device__ inline uint4 pack(const double (&x)[2], double) {
  return make_uint4(__double2loint(x[0]), __double2hiint(x[0]), __double2loint(x[1]), __double2hiint(x[1]));
}
template <typename T>  // __half or __nv_bfloat16
__device__ uint4 pack(const float (&x)[8], T) {
  uint32_t words[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const T low = from_acc<T>(x[2 * w]), high = from_acc<T>(x[2 * w + 1]);
    words[w] = reinterpret_cast<const uint16_t&>(low) | static_cast<uint32_t>(reinterpret_cast<const uint16_t&>(high))
                                                            << 16;
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// A row may start anywhere (a slice, or an odd V), so packs are counted from the 16-byte boundary at
// or before it: pack p holds elements p*kPack - lead onwards, and only the first and the last pack
// can lie partly outside the row.
template <typename T>
__device__ int lead_of(const T* row) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
}

// A pack that lies partly outside its row of `size` elements, put together one element at a time,
// with `fill` for what is outside. Not unrolled: it is rare, and must not cost the common case
// registers.
template <typename T>
__device__ uint4 load_partial_pack(const T* row, int64_t e, int64_t size, T fill) {
  using Word = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
  using Bits = unsigned __int128;
  Bits bits = 0;
#pragma unroll 1
  for (int64_t at = e; at < e + kPack<T>; ++at) {
    const T x = at >= 0 && at < size ? row[at] : fill;
    bits = bits >> 8 * sizeof(T) | static_cast<Bits>(reinterpret_cast<const Word&>(x)) << (128 - 8 * sizeof(T));
  }
  return make_uint4(bits, bits >> 32, bits >> 64, bits >> 96);
}

template <typename T>
__device__ uint4 splat(T x) {
  Acc<T> all[kPack<T>];
#pragma unroll
  for (int n = 0; n < kPack<T>; ++n) all[n] = to_acc(x);
  return pack(all, T{});
}

// Loads U packs of a row of `size` elements, the first at element e and each `step` elements after
// the one before (step a multiple of kPack). Elements outside the row read as `fill`. All loads are
// issued before any is used.
template <int U, typename T>
__device__ void load_packs(const T* row, int64_t e, int64_t step, int64_t size, T fill, uint4 (&packs)[U]) {
  const bool aligned = reinterpret_cast<uintptr_t>(row + e) % 16 == 0;
  if (aligned && e >= 0 && e + (U - 1) * step + kPack<T> <= size) {
#pragma unroll
    for (int u = 0; u < U; ++u) packs[u] = *reinterpret_cast<const uint4*>(row + e + u * step);
    return;
  }
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const int64_t first = e + u * step;
    if (aligned && first >= 0 && first + kPack<T> <= size) {
      packs[u] = *reinterpret_cast<const uint4*>(row + first);
    } else {
      packs[u] = first < size ? load_partial_pack(row, first, size, fill) : splat(fill);
    }
  }
}

// Stores one 16-byte aligned pack at element e, leaving out what lies outside the row.
template <typename T>
__device__ void store_pack(T* row, int64_t e, int64_t size, const Acc<T> (&x)[kPack<T>]) {
  if (e >= 0 && e + kPack<T> <= size) {
    const uint4 bits = pack(x, T{});
    // In assembly, because the compiler splits a plain store of four equal words.
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(row + e)), "r"(bits.x),
                 "r"(bits.y), "r"(bits.z), "r"(bits.w)
                 : "memory");
    return;
  }
#pragma unroll
  for (int n = 0; n < kPack<T>; ++n) {
    const int64_t at = e + n;
    if (at >= 0 && at < size) row[at] = from_acc<T>(x[n]);
  }
}

// ---- N elements in one access ----

// kWidth is the number of elements per access: 16 bytes where every row starts on a 16-byte boundary
// and its length is a multiple, else 1.
template <typename T>
inline bool is_packed(const void* data, int64_t row_stride, int64_t row_size) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_stride % kPack<T> == 0 && row_size % kPack<T> == 0;
}

// Calls f with the integral constant kWidth.
template <typename T, typename F>
void dispatch_width(bool packed, F f) {
  if (packed) {
    f(std::integral_constant<int, kPack<T>>{});
  } else {
    f(std::integral_constant<int, 1>{});
  }
}

inline unsigned blocks_for(int64_t items, int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

template <typename T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T x[N];
};

template <int kWidth, typename T>
__device__ Pack<T, kWidth> load_pack(const T* row, int64_t pack) {
  return reinterpret_cast<const Pack<T, kWidth>*>(row)[pack];
}

// ---- reductions ----

struct Sum {
  template <typename A>
  __device__ A operator()(A a, A b) const {
    return a + b;
  }
};
struct Max {
  template <typename A>
  __device__ A operator()(A a, A b) const {
    return fmax(a, b);
  }
};

constexpr unsigned kWarpMask = 0xffffffffu;

// Every lane receives the result.
template <typename A, typename Op>
__device__ A warp_reduce(A x, Op op) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x = op(x, __shfl_xor_sync(kWarpMask, x, lanes));
  return x;
}

// Every thread of the block receives the result. blockDim.x is a multiple of 32.
template <typename A, typename Op>
__device__ A block_reduce(A x, A identity, Op op) {
  __shared__ A warp_result[32];
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  x = warp_reduce(x, op);
  if (lane == 0) warp_result[warp] = x;
  __syncthreads();
  x = warp_reduce(lane < blockDim.x / 32 ? warp_result[lane] : identity, op);
  __syncthreads();  // the next reduction writes warp_result
  return x;
}

// ---- unlikelihood of a token, from the margin of its logit over the logsumexp of the others ----

template <typename A>
struct LossAndProbability {
  A loss;         // -log(1 - probability), or 0 where the probability is not above the floor
  A probability;  // 0 there, too
};

template <typename A>
__device__ LossAndProbability<A> unlikelihood_of(A margin, A floor) {
  const A small = exp(-fabs(margin));  // in [0, 1]
  const A probability = (margin < 0 ? small : A(1)) / (1 + small);
  if (probability <= floor) return {0, 0};  // a NaN stays one
  return {fmax(margin, A(0)) + log1p(small), probability};
}

// ---- one row, several blocks ----

// On Hopper a cluster of up to 8 blocks, which run at the same time and read each other's shared
// memory, works on a row as if it were one large block. That keeps the number of rows in flight small
// enough for L2 to hold them all (a second look at the row costs no device memory traffic), and gives
// few rows many multiprocessors, without a second launch. Before Hopper the cluster is one block.
constexpr int kRowThreads = 512;
constexpr int64_t kRowBytesPerBlock = 64 * 1024;
constexpr int kMaxCluster = 8;  // the largest portable cluster

struct RowTeam {
  int64_t row;
  int thread;   // of this thread in the team
  int threads;  // in the team
};

__device__ inline RowTeam row_team() {
#if __CUDA_ARCH__ >= 900
  const auto cluster = cooperative_groups::this_cluster();
  const int blocks = cluster.num_blocks(), rank = cluster.block_rank();
#else
  const int blocks = 1, rank = 0;
#endif
  return {blockIdx.x / blocks, static_cast<int>(rank * blockDim.x + threadIdx.x),
          static_cast<int>(blocks * blockDim.x)};
}

// Merges N numbers of each lane; op(x, y) merges y into x. All lanes receive lane 0's bits: an op that the compiler
// contracts need not be symmetric in the last one.
template <int N, typename A, typename Op>
__device__ void warp_merge(A (&x)[N], Op op) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    A y[N];
#pragma unroll
    for (int n = 0; n < N; ++n) y[n] = __shfl_xor_sync(kWarpMask, x[n], lanes);
    op(x, y);
  }
#pragma unroll
  for (int n = 0; n < N; ++n) x[n] = __shfl_sync(kWarpMask, x[n], 0);
}

// The same for all threads of the team, in one exchange between its blocks. Once in a kernel: its shared memory is not
// for a second call.
template <int N, typename A, typename Op>
__device__ void row_merge(A (&x)[N], const A (&identity)[N], Op op) {
  __shared__ A warp_result[32][N];
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  warp_merge(x, op);
  if (lane == 0) {
#pragma unroll
    for (int n = 0; n < N; ++n) warp_result[warp][n] = x[n];
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n) x[n] = lane < blockDim.x / 32 ? warp_result[lane][n] : identity[n];
  warp_merge(x, op);
#if __CUDA_ARCH__ >= 900
  __shared__ A block_result[N];
  const auto cluster = cooperative_groups::this_cluster();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int n = 0; n < N; ++n) block_result[n] = x[n];
  }
  cluster.sync();
#pragma unroll
  for (int n = 0; n < N; ++n) {
    x[n] = lane < cluster.num_blocks() ? *cluster.map_shared_rank(&block_result[n], lane) : identity[n];
  }
  warp_merge(x, op);
  cluster.sync();  // no block leaves while another reads its result
#endif
}

// Launches a kernel that uses row_team, with enough blocks per row for `row_bytes` of traffic. The
// size of the cluster depends on the row and the device, so a row's result does not depend on the batch.
template <typename... Params, typename... Args>
void launch_rows(void (*kernel)(Params...), int64_t rows, int64_t row_bytes, cudaStream_t stream, Args... args) {
  if (rows == 0) return;
  // What the loaded code was compiled for, not what the device could do: PTX of an older
  // architecture contains the one-block version even on Hopper.
  cudaFuncAttributes attributes;
  C10_CUDA_CHECK(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)));
  unsigned blocks = 1;
  if (attributes.ptxVersion >= 90) {
    while (blocks < kMaxCluster && blocks * kRowBytesPerBlock < row_bytes) blocks *= 2;
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(kRowThreads);
  config.stream = stream;
  config.attrs = &cluster;
  for (int fit = 0;; blocks /= 2) {
    cluster.val.clusterDim.x = blocks;
    config.gridDim = dim3(static_cast<unsigned>(rows * blocks));
    config.numAttrs = blocks > 1 ? 1 : 0;
    if (blocks == 1) break;
    // A part of a GPU (MIG, a green context) may not have that many multiprocessors in one group.
    C10_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&fit, kernel, &config));
    if (fit > 0) break;
  }
  C10_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...));
}

}  // namespace palu::cuda
