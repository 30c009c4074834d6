#include "../prefix_mask.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../checks.h"
#include "common.h"

namespace palu::cpu {

namespace {

void prefix_mask(const PrefixMask& p) {
  at::parallel_for(0, p.batch, row_grain(p.length), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      int64_t run = 0;  // sensitive labels seen in the current span
      for (int64_t t = 0; t < p.length; ++t) {
        const int64_t label = p.labels[b * p.batch_stride + t * p.token_stride];
        run = label >= 0 && label != p.eos ? run + 1 : 0;
        p.mask[b * p.length + t] = run > 0 && (p.n == -1 || run <= p.n);
      }
    }
  });
}

at::Tensor prefix_mask_op(const at::Tensor& labels, int64_t n, std::optional<int64_t> eos_token_id) {
  check_prefix_mask(labels, n);
  at::Tensor mask = at::empty(labels.sizes(), labels.options().dtype(at::kBool));
  PrefixMask p{};
  p.labels = labels.const_data_ptr<int64_t>();
  p.batch_stride = labels.stride(0);
  p.token_stride = labels.stride(1);
  p.mask = mask.mutable_data_ptr<bool>();
  p.batch = labels.size(0);
  p.length = labels.size(1);
  p.n = n;
  p.eos = eos_token_id.value_or(-1);
  prefix_mask(p);
  return mask;
}

}  // namespace
}  // namespace palu::cpu

TORCH_LIBRARY_IMPL(palu, CPU, m) { m.impl("prefix_mask", palu::cpu::prefix_mask_op); }
