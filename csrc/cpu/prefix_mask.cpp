// Onset mask; its definition is in csrc/prefix_mask.h.
#include "../prefix_mask.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common.h"

namespace palu::cpu {
namespace {

at::Tensor prefix_mask(const at::Tensor& labels, int64_t n, std::optional<int64_t> eos_token_id) {
  check_prefix_mask(labels, n);
  const at::Tensor mask = at::empty(labels.sizes(), labels.options().dtype(at::kBool));
  const int64_t* label_of = labels.const_data_ptr<int64_t>();
  bool* masked = mask.mutable_data_ptr<bool>();
  const int64_t length = labels.size(1), batch_stride = labels.stride(0), token_stride = labels.stride(1);
  const int64_t eos = eos_token_id.value_or(-1);  // negative: no label is end-of-sequence
  at::parallel_for(0, labels.size(0), row_grain(length), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      int64_t run = 0;  // sensitive labels seen in the current span
      for (int64_t t = 0; t < length; ++t) {
        const int64_t label = label_of[b * batch_stride + t * token_stride];
        run = label >= 0 && label != eos ? run + 1 : 0;
        masked[b * length + t] = run > 0 && (n == -1 || run <= n);
      }
    }
  });
  return mask;
}

}  // namespace
}  // namespace palu::cpu

TORCH_LIBRARY_IMPL(palu, CPU, m) { m.impl("prefix_mask", palu::cpu::prefix_mask); }
