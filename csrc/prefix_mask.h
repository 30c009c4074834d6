// Onset mask: the first n tokens of every sensitive span (PALU, arXiv 2601.03190: temporal sparsity).
//
//   sensitive[b,t] = labels[b,t] >= 0 and labels[b,t] != eos
//   A span is a maximal run of neighbouring sensitive labels in a row; padding, ordinary labels
//   (-100, -200, any negative) and eos end it.
//   mask[b,t] = sensitive[b,t] and fewer than n sensitive labels precede t in its span.
//   n = -1 keeps whole spans, n = 0 nothing. One pass over the tokens.
#pragma once
