// Onset mask: the first n tokens of every sensitive span (PALU, arXiv 2601.03190: temporal sparsity).
//
//   sensitive[b,t] = labels[b,t] >= 0 and labels[b,t] != eos
//   A span is a maximal run of neighbouring sensitive labels in a row; padding, ordinary labels
//   (-100, -200, any negative) and eos end it.
//   mask[b,t] = sensitive[b,t] and fewer than n sensitive labels precede t in its span.
//   n = -1 keeps whole spans, n = 0 nothing. One pass over the tokens.
#pragma once

#include <cstdint>
#include <optional>

namespace palu::cpu {

void prefix_mask(const int64_t* labels,   // [B,T], elements strides[0] and strides[1] apart
                 const int64_t* strides,  // [2]
                 bool* mask,              // [B,T], contiguous
                 int64_t batch, int64_t length, int64_t n, std::optional<int64_t> eos_token_id);

}  // namespace palu::cpu
