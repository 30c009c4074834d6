// Launchers of the CUDA kernels, for register.cpp, and the structs of their arguments. The formulas are
// in csrc/*.h; here are pointers, sizes and strides only, so that the .cu files need no torch header
// beyond c10/cuda.
//
// T is the dtype of logits, hidden and weight (`Dtype`); A, float64 for float64 and float32 otherwise,
// holds every sum, loss and slope; I is the dtype of the index (int64 if `index64`, else int32).
// Strides count elements, from a row to the next; inside a row elements are neighbours. Every launcher
// accepts rows = 0. Every kernel is deterministic: sums are trees of one fixed shape, and no float is
// ever added atomically, so torch.use_deterministic_algorithms needs no special case.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../topk.h"

namespace palu::cuda {

enum class Dtype { kFloat, kDouble, kHalf, kBFloat16 };

struct PrefixMask {
  const int64_t* labels;               // [B,T]
  int64_t batch_stride, token_stride;  // of labels
  bool* mask;                          // [B,T], contiguous
  int64_t batch, length, n;
  int64_t eos;  // a negative value: no label is end-of-sequence
};
void prefix_mask(const PrefixMask& p, cudaStream_t stream);

struct TopkMse {
  Dtype dtype;
  bool index64;
  const void* logits;  // T [R,V]
  int64_t logits_stride;
  const void* index;  // I [R,K], contiguous
  void* loss;         // A [R]
  void* slope;        // A [R,K], contiguous
  int64_t rows, vocab_size, k;
  Center center;
  double constant;
};
void topk_mse(const TopkMse& p, cudaStream_t stream);

struct TopkBackward {
  Dtype dtype;
  bool index64;
  const void* grad;   // A [R], contiguous
  const void* slope;  // A [R,K], contiguous
  const void* index;  // I [R,K], contiguous
  void* grad_logits;  // T [R,V], every element is overwritten
  int64_t grad_logits_stride;
  int64_t rows, vocab_size, k;
  bool through_mean;
};
void topk_backward(const TopkBackward& p, cudaStream_t stream);

struct LinearTopk {
  Dtype dtype;
  bool index64;
  const void* hidden;  // T [R,d], contiguous
  const void* weight;  // T [V,d]
  int64_t weight_stride;
  const void* index;  // I [R,K], contiguous
  const void* bias;   // T [V], contiguous, or null
  void* loss;         // A [R]
  void* slope;        // A [R,K], contiguous
  int64_t rows, vocab_size, hidden_size, k;

  // linear_topk_mse only
  const void* weight_mean;  // A [d], contiguous; read for the global mean only
  const void* bias_mean;    // A [1], or null without bias; read for the global mean only
  Center center;
  double constant;

  // linear_topk_unlikelihood only
  double floor;  // a true token that is not more probable has neither loss nor gradient
};
void linear_topk_mse(const LinearTopk& p, cudaStream_t stream);
void linear_topk_unlikelihood(const LinearTopk& p, cudaStream_t stream);

// The gradients of either, in up to three steps.
struct LinearTopkBackward {
  Dtype dtype;
  bool index64;
  const void* grad;         // A [R], contiguous
  const void* slope;        // A [R,K], contiguous
  void* grad_through_mean;  // A [R], or null: the gradient does not flow through the mean
  int64_t rows, vocab_size, hidden_size, k;

  // linear_grad_hidden only
  const void* weight;  // T [V,d]
  int64_t weight_stride;
  const void* index;        // I [R,K], contiguous
  const void* weight_mean;  // A [d], contiguous; read with grad_through_mean only
  void* partial;            // A [slices,R,d], scratch
  void* grad_hidden;        // T [R,d]
  int64_t grad_hidden_stride;

  // linear_grad_weight only
  const void* hidden;           // T [R,d], contiguous
  const void* sorted_index;     // I [R*K], index.flatten() in ascending order
  const int64_t* sorted_order;  // [R*K], where each stood before a stable sort
  int64_t* offsets;             // [V+1], scratch
  void* common_row;             // A [d], scratch, or null where grad_through_mean or grad_weight is
  void* grad_weight;            // T [V,d], or null: not asked for
  int64_t grad_weight_stride;
  void* grad_bias;  // T [V], contiguous, or null: not asked for
};

// grad_through_mean[r] = s[r] = -(1/V) sum_k g[r,k]: what the global mean passes to every logit of row r. Before the
// others.
void linear_grad_through_mean(const LinearTopkBackward& p, cudaStream_t stream);

// grad_hidden[r] += sum_k g[r,k] weight[i_rk] + V s[r] weight_mean
void linear_grad_hidden(const LinearTopkBackward& p, cudaStream_t stream);

// How many slices of K the gradient of hidden is summed in (rows > 0); partial has this many.
int64_t linear_grad_hidden_slices(int64_t rows, int64_t k);

// grad_weight[v] += sum_{(r,k): i_rk=v} g[r,k] hidden[r] + sum_r s[r] hidden[r]
// grad_bias[v]   += sum_{(r,k): i_rk=v} g[r,k] + sum_r s[r]
void linear_grad_weight(const LinearTopkBackward& p, cudaStream_t stream);

struct CrossEntropy {
  Dtype dtype;
  void* logits;  // T [R,V], overwritten with the weighted gradient
  int64_t logits_stride;
  const int64_t* labels;   // [R], contiguous
  const void* row_weight;  // A [R], contiguous
  void* loss;              // A [R]
  int64_t rows, vocab_size;
};
void cross_entropy_(const CrossEntropy& p, cudaStream_t stream);

struct KlDiv {
  Dtype dtype;
  void* logits;  // T [R,V], overwritten with the weighted gradient
  int64_t logits_stride;
  const void* ref_logits;  // T [R,V]
  int64_t ref_logits_stride;
  const void* row_weight;  // A [R], contiguous
  void* loss;              // A [R]
  int64_t rows, vocab_size;
  bool reverse;
};
void kl_div_(const KlDiv& p, cudaStream_t stream);

struct AdamW {
  Dtype dtype;              // kFloat or kBFloat16
  void* weight;             // T [n]
  void* low_bits;           // int16 [n] of bfloat16 weights, else null
  const void* grad;         // T [n]
  void* exp_avg;            // T [n]
  void* exp_avg_sq;         // float [n]
  const void* clip_factor;  // float [1], or null: 1
  int64_t size;
  double step_size;                         // rate sqrt(1 - beta2^t) / (1 - beta1^t)
  double decay_factor;                      // 1 - rate weight_decay
  double one_minus_beta1, one_minus_beta2;  // in float32 beta2 itself would leave four digits of it
  double eps;                               // times sqrt(1 - beta2^t)
};
void adamw_(const AdamW& p, cudaStream_t stream);

}  // namespace palu::cuda
