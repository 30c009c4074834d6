// cross_entropy_ and kl_div_; formulas are in csrc/softmax_loss.h.
//
// The reverse gradient needs its row's loss first. With D = softmax(d) the distribution that averages
// and O = softmax(o) the other,
//
//   loss = sum_v D_v ((d_v - lse_d) - (o_v - lse_o)) = sum_v D_v (d_v - o_v) - (lse_d - lse_o),
//
// so one pass collects m and S of both rows and sum_v exp(d_v - m_d) (d_v - o_v).
//
// A team of blocks per row makes two passes: the first streams the row from device memory, the second
// finds it in L2 and writes the gradient. Device memory traffic: one read and one write of the
// logits, KL one more read for the reference.
#include "../softmax_loss.h"
#include "common.cuh"

namespace palu::cuda {
namespace {

constexpr int kUnroll = 4;    // packs per thread in flight
constexpr int kUnrollKl = 2;  // of each of two rows

// exp(x) for x <= 0 (2^-22 relative error in float32; denormal results are 0).
__device__ inline float fast_exp(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
}
__device__ inline double fast_exp(double x) { return exp(x); }

// max_v z_v and sum_v exp(z_v - max) of what has been seen of a row. The maximum starts at the lowest
// finite value instead of -inf, so that exp(z - max) is never exp(-inf + inf).
template <typename A>
struct Partition {
  A max = lowest<A>();
  A sum = 0;

  // Makes room for a larger maximum; returns the factor for sums taken relative to the old one.
  __device__ A raise(A z) {
    const A larger = fmax(max, z);
    const A factor = fast_exp(max - larger);
    max = larger;
    sum *= factor;
    return factor;
  }
};

// Joins the parts that the threads of a team hold.
template <typename A>
__device__ void join(Partition<A>& part) {
  A x[2] = {part.max, part.sum};
  const A nothing[2] = {lowest<A>(), A(0)};
  row_merge(x, nothing, [](A(&x)[2], const A(&y)[2]) {
    const A largest = fmax(x[0], y[0]);
    x[1] = x[1] * fast_exp(x[0] - largest) + y[1] * fast_exp(y[0] - largest);
    x[0] = largest;
  });
  part.max = x[0], part.sum = x[1];
}

// The same of two rows, with a sum that is relative to the maximum of p (of q).
template <bool kOfP, typename A>
__device__ void join(Partition<A>& p, Partition<A>& q, A& moment) {
  A x[5] = {p.max, p.sum, q.max, q.sum, moment};
  const A nothing[5] = {lowest<A>(), A(0), lowest<A>(), A(0), A(0)};
  row_merge(x, nothing, [](A(&x)[5], const A(&y)[5]) {
    const A p_max = fmax(x[0], y[0]), q_max = fmax(x[2], y[2]);
    const A px = fast_exp(x[0] - p_max), py = fast_exp(y[0] - p_max);
    const A qx = fast_exp(x[2] - q_max), qy = fast_exp(y[2] - q_max);
    x[1] = x[1] * px + y[1] * py;
    x[3] = x[3] * qx + y[3] * qy;
    x[4] = x[4] * (kOfP ? px : qx) + y[4] * (kOfP ? py : qy);
    x[0] = p_max, x[2] = q_max;
  });
  p.max = x[0], p.sum = x[1], q.max = x[2], q.sum = x[3], moment = x[4];
}

template <typename T, int U>
__device__ Acc<T> max_of(const uint4 (&packs)[U]) {
  Acc<T> largest = lowest<Acc<T>>();
#pragma unroll
  for (int u = 0; u < U; ++u) {
    Acc<T> z[kPack<T>];
    unpack(packs[u], z, T{});
#pragma unroll
    for (int n = 0; n < kPack<T>; ++n) largest = fmax(largest, z[n]);
  }
  return largest;
}

template <typename T>
__global__ __launch_bounds__(kRowThreads, 2) void cross_entropy_kernel(T* logits,  // [R,V]
                                                                       int64_t logits_stride,
                                                                       const int64_t* __restrict__ labels,     // [R]
                                                                       const Acc<T>* __restrict__ row_weight,  // [R]
                                                                       Acc<T>* __restrict__ loss,              // [R]
                                                                       int64_t vocab_size) {
  using A = Acc<T>;
  constexpr int N = kPack<T>;
  const RowTeam team = row_team();
  T* row = logits + team.row * logits_stride;
  const int64_t step = int64_t{team.threads} * N;
  const int64_t begin = int64_t{team.thread} * N - lead_of(row);

  const int64_t label = labels[team.row];
  CUDA_KERNEL_ASSERT(label >= 0 && label < vocab_size && "palu::cross_entropy_: label out of range");
  const A label_logit = to_acc(row[label]);  // read by all before any thread writes: join is between

  Partition<A> part;
  for (int64_t e = begin; e < vocab_size; e += kUnroll * step) {
    uint4 packs[kUnroll];
    load_packs(row, e, step, vocab_size, lowest<T>(), packs);
    part.raise(max_of<T>(packs));
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      A z[N];
      unpack(packs[u], z, T{});
#pragma unroll
      for (int n = 0; n < N; ++n) part.sum += fast_exp(z[n] - part.max);
    }
  }
  join(part);
  if (team.thread == 0) loss[team.row] = (part.max - label_logit) + log(part.sum);

  const A weight = row_weight[team.row];
  const A scale = weight / part.sum;
  for (int64_t e = begin; e < vocab_size; e += kUnroll * step) {
    uint4 packs[kUnroll];
    load_packs(row, e, step, vocab_size, lowest<T>(), packs);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      A z[N];
      unpack(packs[u], z, T{});
#pragma unroll
      for (int n = 0; n < N; ++n) z[n] = scale * fast_exp(z[n] - part.max);
      store_pack(row, e + u * step, vocab_size, z);
    }
  }
  // The thread that wrote the label's entry corrects it.
  if ((label + lead_of(row)) / N % team.threads == team.thread) {
    row[label] = from_acc<T>(scale * fast_exp(label_logit - part.max) - weight);
  }
}

template <typename T, bool kReverse>
__global__ __launch_bounds__(kRowThreads, 2) void kl_div_kernel(T* logits,  // [R,V]
                                                                int64_t logits_stride,
                                                                const T* __restrict__ ref_logits,  // [R,V]
                                                                int64_t ref_stride,
                                                                const Acc<T>* __restrict__ row_weight,  // [R]
                                                                Acc<T>* __restrict__ loss,              // [R]
                                                                int64_t vocab_size) {
  using A = Acc<T>;
  constexpr int N = kPack<T>;
  const RowTeam team = row_team();
  T* row = logits + team.row * logits_stride;
  const T* ref = ref_logits + team.row * ref_stride;
  const int64_t step = int64_t{team.threads} * N;
  const int64_t begin = int64_t{team.thread} * N - lead_of(row);

  Partition<A> p, q;
  A moment = 0;  // sum_v exp(d_v - m_d) (d_v - o_v)
  for (int64_t e = begin; e < vocab_size; e += kUnrollKl * step) {
    uint4 p_packs[kUnrollKl], q_packs[kUnrollKl];
    load_packs(row, e, step, vocab_size, lowest<T>(), p_packs);
    load_packs(ref, e, step, vocab_size, lowest<T>(), q_packs);
    const A raised_p = p.raise(max_of<T>(p_packs)), raised_q = q.raise(max_of<T>(q_packs));
    moment *= kReverse ? raised_p : raised_q;
#pragma unroll
    for (int u = 0; u < kUnrollKl; ++u) {
      A zp[N], zq[N];
      unpack(p_packs[u], zp, T{});
      unpack(q_packs[u], zq, T{});
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const A x = zp[n], y = zq[n];
        const A ex = fast_exp(x - p.max), ey = fast_exp(y - q.max);
        p.sum += ex;
        q.sum += ey;
        moment += kReverse ? ex * (x - y) : ey * (y - x);
      }
    }
  }
  join<kReverse>(p, q, moment);

  const A lse_difference = (p.max - q.max) + log(p.sum / q.sum);  // lse of logits - lse of ref_logits
  const A divergence = kReverse ? moment / p.sum - lse_difference : moment / q.sum + lse_difference;
  if (team.thread == 0) loss[team.row] = divergence;

  const A weight = row_weight[team.row];
  const A scale_p = weight / p.sum, scale_q = weight / q.sum;
  for (int64_t e = begin; e < vocab_size; e += kUnrollKl * step) {
    uint4 p_packs[kUnrollKl], q_packs[kUnrollKl];
    load_packs(row, e, step, vocab_size, lowest<T>(), p_packs);
    load_packs(ref, e, step, vocab_size, lowest<T>(), q_packs);
#pragma unroll
    for (int u = 0; u < kUnrollKl; ++u) {
      A zp[N], zq[N];
      unpack(p_packs[u], zp, T{});
      unpack(q_packs[u], zq, T{});
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const A x = zp[n], y = zq[n];
        const A wp = scale_p * fast_exp(x - p.max);
        zp[n] = kReverse ? wp * ((x - y) - lse_difference - divergence) : wp - scale_q * fast_exp(y - q.max);
      }
      store_pack(row, e + u * step, vocab_size, zp);
    }
  }
}

}  // namespace

void cross_entropy_(const CrossEntropy& p, cudaStream_t stream) {
  dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    using A = Acc<T>;
    launch_rows(cross_entropy_kernel<T>, p.rows, p.vocab_size * static_cast<int64_t>(sizeof(T)), stream,
                static_cast<T*>(p.logits), p.logits_stride, p.labels, static_cast<const A*>(p.row_weight),
                static_cast<A*>(p.loss), p.vocab_size);
  });
}

void kl_div_(const KlDiv& p, cudaStream_t stream) {
  dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    using A = Acc<T>;
    launch_rows(p.reverse ? kl_div_kernel<T, true> : kl_div_kernel<T, false>, p.rows,
                2 * p.vocab_size * static_cast<int64_t>(sizeof(T)), stream, static_cast<T*>(p.logits), p.logits_stride,
                static_cast<const T*>(p.ref_logits), p.ref_logits_stride, static_cast<const A*>(p.row_weight),
                static_cast<A*>(p.loss), p.vocab_size);
  });
}

}  // namespace palu::cuda
