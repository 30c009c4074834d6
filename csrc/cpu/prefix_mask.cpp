#include "../prefix_mask.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../checks.h"
#include "common.h"

namespace palu::cpu {

void prefix_mask(const int64_t* labels, const int64_t* strides, bool* mask, int64_t batch, int64_t length, int64_t n,
                 std::optional<int64_t> eos_token_id) {
  at::parallel_for(0, batch, row_grain(length), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      int64_t run = 0;  // sensitive labels seen in the current span
      for (int64_t t = 0; t < length; ++t) {
        const int64_t label = labels[b * strides[0] + t * strides[1]];
        run = label >= 0 && label != eos_token_id ? run + 1 : 0;
        mask[b * length + t] = run > 0 && (n == -1 || run <= n);
      }
    }
  });
}

namespace {

at::Tensor prefix_mask_op(const at::Tensor& labels, int64_t n, std::optional<int64_t> eos_token_id) {
  check_prefix_mask(labels, n);
  at::Tensor mask = at::empty(labels.sizes(), labels.options().dtype(at::kBool));
  prefix_mask(labels.const_data_ptr<int64_t>(), labels.strides().data(), mask.mutable_data_ptr<bool>(), labels.size(0),
              labels.size(1), n, eos_token_id);
  return mask;
}

}  // namespace
}  // namespace palu::cpu

TORCH_LIBRARY_IMPL(palu, CPU, m) { m.impl("prefix_mask", palu::cpu::prefix_mask_op); }
