// A tensor (batch, length, channels) as the kernels see it: its last dimension is contiguous, or has no meaning (flags).
#pragma once
#include "simd.h"

namespace ssmlens {

template <class T> struct Rows {
  T* data = nullptr;  // null where an optional tensor is absent
  int64_t batch_stride = 0, time_stride = 0;
  T* at(int64_t b, int64_t t) const { return data + b * batch_stride + t * time_stride; }
  explicit operator bool() const { return data != nullptr; }
};

}  // namespace ssmlens
