// Registers gated_linear_attention, which scan.cpp declares. Apart from it, so that the two are compiled at the same time.
#include "torch.h"

#include "attention.h"

namespace {

template <class T>
Attention<T> attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& log_a, const Maybe& bonus, const Maybe& h0,
                       const Maybe& reset, int64_t groups, int64_t heads) {
  const int64_t d_key = q.size(2) / groups, decays = log_a.size(2) / heads;
  return {v.size(0), v.size(1), groups, heads, d_key, v.size(2) / heads, decays != 1, rows(q), rows(k), rows(v), rows(log_a),
          rows(reset), data<T>(bonus), data<T>(h0)};
}
// q, k, v, log_a, y (batch, length, groups or heads times ..)
NOINLINE void gated_linear_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& log_a, const Maybe& bonus,
                            const Maybe& h0, const Maybe& reset, int64_t groups, int64_t heads, int64_t threads, Tensor y, Tensor final_state,
                            Tensor saved) {
  dispatch(final_state, [&](auto zero) {
    using T = decltype(zero);
    attention<T>(q, k, v, log_a, bonus, h0, reset, groups, heads)
        .forward(out_rows(y), out<T>(final_state), saved.numel() ? out<T>(saved) : nullptr, threads, fading);
  });
}
NOINLINE void gated_linear_attention_backward(const Tensor& dy, const Maybe& dfinal, const Tensor& saved, const Tensor& q,
                                     const Tensor& k, const Tensor& v, const Tensor& log_a, const Maybe& bonus, const Maybe& h0,
                                     const Maybe& reset, int64_t groups, int64_t heads, int64_t threads, Tensor dq, Tensor dk, Tensor dv,
                                     Tensor dlog_a, Maybe dbonus, Maybe dh0) {
  dispatch(saved, [&](auto zero) {
    using T = decltype(zero);
    attention<T>(q, k, v, log_a, bonus, h0, reset, groups, heads)
        .backward({dy.size(0), rows(dy), data<T>(saved), data<T>(dfinal), out_rows(dq), out_rows(dk), out_rows(dv),
                   out_rows(dlog_a), out<T>(dbonus), out<T>(dh0)},
                  threads, fading);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ssmlens_cpu, CPU, m) {
  m.impl("gated_linear_attention", TORCH_BOX(&gated_linear_attention));
  m.impl("gated_linear_attention_backward", TORCH_BOX(&gated_linear_attention_backward));
}
