// What CUDA C++ sources see when g++ compiles them for the emulation: the keywords, the built-in
// variables, the intrinsics and the part of the runtime API that they use. The machine behind it,
// fibers for threads and the checks, is emulate.cpp; rewrite.py turns what is not C++ (launches,
// shared variables, inline assembly) into calls of what is declared here.
#pragma once

#include <math.h>

#include <bit>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <tuple>
#include <type_traits>

#ifndef __CUDA_ARCH__
#error "define __CUDA_ARCH__ (800, 900, ...) for the architecture to emulate"
#endif

#define __global__
#define __device__
#define __launch_bounds__(...)

// ---- built-in types and variables ----

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// Set whenever a fiber is entered.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

// ---- the machine ----

namespace emu {

using Where = std::source_location;

struct Config {
  dim3 grid, block;
  size_t shared = 0;  // dynamic
  unsigned cluster = 1;
};

// Runs body(arguments) for every thread of the grid.
void launch(const char* kernel, const Config& config, void (*body)(const void*), const void* arguments, size_t size);

enum class Kind : int { kRead, kWrite, kAtomic };
void access(const void* address, size_t size, Kind kind, const void* pc);

void block_barrier(Where where);
int block_barrier_or(int predicate, Where where);
void cluster_barrier(Where where);
unsigned cluster_blocks();
unsigned cluster_rank();

// All lanes of the mask must come to the same place. `value` becomes that of lane `from`.
void shuffle(unsigned mask, void* value, size_t size, unsigned from, Where where);
unsigned ballot(unsigned mask, int predicate, Where where);

[[noreturn]] void fail(const char* what, Where where);
void store_16(void* at, unsigned x, unsigned y, unsigned z, unsigned w, const void* pc);

void* static_shared(const void* key, size_t size, size_t alignment);
void* dynamic_shared();
void* remote_shared(const void* own, unsigned rank, Where where);

void set_shared_limit(size_t bytes);

inline unsigned largest_cluster = 8;  // that the device has room for

template <typename T, typename Key>
T& shared_variable(Key) {
  static const char key = 0;  // one for each variable of each instance of a template
  return *static_cast<T*>(static_shared(&key, sizeof(T), alignof(T)));
}

// Every instance of a kernel template that was compiled, and whether a launch has reached it. rewrite.py
// puts the call at the beginning of each kernel, with a lambda that returns __PRETTY_FUNCTION__.
bool add_instance(const char* kernel, const bool* launched);
template <typename F>
struct Instance {
  static inline bool launched = false;
  static inline const bool known = add_instance(F{}(), &launched);
};
template <typename F>
__attribute__((noinline, no_sanitize("thread"))) void kernel_entered(F) {
  static_cast<void>(&Instance<F>::known);
  Instance<F>::launched = true;
}

template <typename F>
struct Launcher {
  const char* kernel;
  Config config;
  F call;
  template <typename... Args>
  void operator()(Args... args) const {
    using Arguments = std::tuple<Args...>;
    const Arguments arguments(args...);
    const auto body = [](const void* packed) { std::apply(F{}, *static_cast<const Arguments*>(packed)); };
    launch(kernel, config, body, &arguments, sizeof(arguments));
  }
};
// kernel<<<grid, block, shared, stream>>>(...) becomes launcher("kernel", calls it, grid, block, ...)(...).
template <typename F>
Launcher<F> launcher(const char* kernel, F call, dim3 grid, dim3 block, size_t shared = 0, void* = nullptr) {
  return {kernel, {grid, block, shared, 1}, call};
}

inline unsigned lane() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32; }

}  // namespace emu

// ---- synchronisation, votes, shuffles ----

inline void __syncthreads(emu::Where where = emu::Where::current()) { emu::block_barrier(where); }
inline int __syncthreads_or(int predicate, emu::Where where = emu::Where::current()) {
  return emu::block_barrier_or(predicate, where);
}
template <typename T>
T __shfl_sync(unsigned mask, T x, int from, int = 32, emu::Where where = emu::Where::current()) {
  static_assert(sizeof(T) <= 8);
  emu::shuffle(mask, &x, sizeof(T), from & 31, where);
  return x;
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T x, int lanes, int = 32, emu::Where where = emu::Where::current()) {
  return __shfl_sync(mask, x, emu::lane() ^ lanes, 32, where);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, emu::Where where = emu::Where::current()) {
  return emu::ballot(mask, predicate, where);
}

// ---- atomics: access() may let other threads run, nothing after it does ----

#define EMU_ATOMIC(name, result)                                                              \
  template <typename T>                                                                       \
  __attribute__((noinline, no_sanitize("thread"))) T name(T* at, std::type_identity_t<T> x) { \
    emu::access(at, sizeof(T), emu::Kind::kAtomic, __builtin_return_address(0));              \
    const T old = *at;                                                                        \
    *at = result;                                                                             \
    return old;                                                                               \
  }
EMU_ATOMIC(atomicOr, old | x)
EMU_ATOMIC(atomicAnd, old& x)
#undef EMU_ATOMIC

// ---- integers and bits ----

inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline double __hiloint2double(int high, int low) {
  return std::bit_cast<double>(static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32 | static_cast<uint32_t>(low));
}
inline int __double2hiint(double x) { return static_cast<int>(std::bit_cast<uint64_t>(x) >> 32); }
inline int __double2loint(double x) { return static_cast<int>(std::bit_cast<uint64_t>(x)); }

// ---- 16-bit floats, rounded to nearest even ----

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t bits) { return {bits}; }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }

inline float __half2float(__half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, rest = x.bits & 0x7FFFu;
  if (rest >= 0x7C00u) return std::bit_cast<float>(sign | 0x7F800000u | (rest & 0x3FFu) << 13);
  if (rest < 0x400u) {  // zero or subnormal: rest * 2^-24 is exact
    const float magnitude = static_cast<float>(rest) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return std::bit_cast<float>(sign | ((rest << 13) + (112u << 23)));
}
inline __half __float2half_rn(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), rest = bits & 0x7FFFFFFFu;
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  if (rest > 0x7F800000u) return {0x7FFF};
  if (rest >= 0x477FF000u) return {static_cast<uint16_t>(sign | 0x7C00u)};  // 65520 and more round to infinity
  if (rest < 0x38800000u) {                                                 // below 2^-14: in units of 2^-24
    const float units = std::bit_cast<float>(rest) * 0x1p24f;               // exact; nearbyint rounds to even
    return {static_cast<uint16_t>(sign | static_cast<uint32_t>(nearbyintf(units)))};
  }
  const uint32_t rebased = rest - (112u << 23);
  return {static_cast<uint16_t>(sign | (rebased + 0xFFFu + (rebased >> 13 & 1u)) >> 13)};
}
inline float __bfloat162float(__nv_bfloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16)};
}

// ---- PTX; rewrite.py turns asm("a.b.c ...") into ptx::a_b_c(operands, outputs first) ----

template <typename T>
T* __cvta_generic_to_global(T* p) {
  return p;
}

namespace ptx {

inline float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; }

inline void ex2_approx_ftz_f32(float& y, float x) { y = flushed(exp2f(flushed(x))); }

template <typename T>
__attribute__((noinline)) void st_global_v4_b32(T* at, unsigned x, unsigned y, unsigned z, unsigned w) {
  emu::store_16(at, x, y, z, w, __builtin_return_address(0));
}

}  // namespace ptx

// ---- clusters ----

namespace cooperative_groups {

struct cluster_group {
  unsigned num_blocks() const { return emu::cluster_blocks(); }
  unsigned block_rank() const { return emu::cluster_rank(); }
  void sync(emu::Where where = emu::Where::current()) const { emu::cluster_barrier(where); }
  template <typename T>
  T* map_shared_rank(T* own, int rank, emu::Where where = emu::Where::current()) const {
    return static_cast<T*>(emu::remote_shared(own, rank, where));
  }
};
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups

// ---- runtime API ----

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;

struct cudaFuncAttributes {
  int ptxVersion;
};
template <typename F>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, F) {
  *attributes = {__CUDA_ARCH__ / 10};
  return cudaSuccess;
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <typename F>
cudaError_t cudaFuncSetAttribute(F, cudaFuncAttribute, int bytes) {
  emu::set_shared_limit(bytes);
  return cudaSuccess;
}

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};
template <typename F>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, F, const cudaLaunchConfig_t* config) {
  *clusters = config->attrs[0].val.clusterDim.x <= emu::largest_cluster;
  return cudaSuccess;
}

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args... args) {
  unsigned cluster = 1;
  for (unsigned n = 0; n < config->numAttrs; ++n) {
    if (config->attrs[n].id == cudaLaunchAttributeClusterDimension) cluster = config->attrs[n].val.clusterDim.x;
  }
  using Arguments = std::tuple<void (*)(Params...), Params...>;
  const Arguments arguments(kernel, static_cast<Params>(args)...);
  const auto body = [](const void* packed) {
    std::apply([](auto f, auto... a) { f(a...); }, *static_cast<const Arguments*>(packed));
  };
  emu::launch(__PRETTY_FUNCTION__, {config->gridDim, config->blockDim, config->dynamicSmemBytes, cluster}, body,
              &arguments, sizeof(arguments));
  return cudaSuccess;
}

#define C10_CUDA_CHECK(call) static_cast<void>(call)
#define C10_CUDA_KERNEL_LAUNCH_CHECK() static_cast<void>(0)
#define CUDA_KERNEL_ASSERT(condition) \
  static_cast<void>((condition) || (::emu::fail("device assertion: " #condition, ::emu::Where::current()), 0))
