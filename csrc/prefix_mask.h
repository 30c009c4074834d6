// Onset mask: the first n tokens of every sensitive span (PALU, arXiv 2601.03190: temporal sparsity).
//
//   sensitive[b,t] = labels[b,t] >= 0 and labels[b,t] != eos
//   A span is a maximal run of neighbouring sensitive labels in a row; padding, ordinary labels
//   (-100, -200, any negative) and eos end it.
//   mask[b,t] = sensitive[b,t] and fewer than n sensitive labels precede t in its span.
//   n = -1 keeps whole spans, n = 0 nothing. One pass over the tokens.
#pragma once

#include <cstdint>

namespace palu {

// What the kernels of both devices take.
struct PrefixMask {
  const int64_t* labels;  // [B,T]
  int64_t batch_stride;   // in elements
  int64_t token_stride;
  bool* mask;  // [B,T], contiguous
  int64_t batch;
  int64_t length;
  int64_t n;
  int64_t eos;  // a negative value: no label is end-of-sequence
};

}  // namespace palu
