// What the forward passes of linear_topk.cu and the backward pass share: access to rows of weight.
//
// kWidth is the number of elements per access: 16 bytes where every row starts on a 16-byte boundary
// and d is a multiple, else 1.
#pragma once

#include "../linear_topk.h"
#include "common.cuh"

namespace palu::cuda {

constexpr int kThreads = 256;
constexpr int kUnroll = 8;  // loads of weight per thread in flight

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

}  // namespace palu::cuda
