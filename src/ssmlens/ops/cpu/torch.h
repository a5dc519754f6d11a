// PyTorch's tensors and threads as the kernels see them. Only this file and those that register kernels know PyTorch, and only its
// stable ABI (PyTorch 2.10 and later). Callers have checked shapes, dtypes and layouts: tensors (batch, length, entries) are
// contiguous in their last dimension and may be in half precision; all others are contiguous and in the precision of the computation.
#pragma once
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 10) << 48))
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <optional>

#include "rows.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;
using namespace ssmlens;

// Every unit of work is large, so one per thread is enough to share; PyTorch's own pool, PyTorch's number of threads.
const auto parallel = [](int64_t units, const auto& work) { torch::stable::parallel_for(0, units, 1, work); };

// The same for recurrences and gradients, without subnormal numbers: a gradient that comes in at the last token alone fades along
// the sequence into them.
const auto fading = [](int64_t units, const auto& work) {
  parallel(units, [&](int64_t begin, int64_t end) {
    const FlushSubnormal flush;
    work(begin, end);
  });
};

template <class Byte> AnyRows<Byte> any_rows(const Tensor& t, Byte* data) {
  const ScalarType type = t.scalar_type();
  const int64_t size = t.element_size();
  return {data, t.stride(0) * size, t.stride(1) * size,
          type == ScalarType::BFloat16 ? Format::bfloat16 : type == ScalarType::Half ? Format::float16 : Format::full};
}
Rows rows(const Tensor& t) { return any_rows(t, static_cast<const char*>(t.const_data_ptr())); }
Rows rows(const Maybe& t) { return t ? rows(*t) : Rows{}; }
OutRows out_rows(const Tensor& t) { return any_rows(t, static_cast<char*>(t.mutable_data_ptr())); }
OutRows out_rows(const Maybe& t) { return t ? out_rows(*t) : OutRows{}; }
template <class T> const T* data(const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); }
template <class T> const T* data(const Maybe& t) { return t ? data<T>(*t) : nullptr; }
template <class T> T* out(const Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); }
template <class T> T* out(const Maybe& t) { return t ? out<T>(*t) : nullptr; }

template <class F> void dispatch(const Tensor& like, const F& f) {
  if (like.scalar_type() == ScalarType::Double) {
    f(double{});
  } else {
    f(float{});
  }
}

}  // namespace
