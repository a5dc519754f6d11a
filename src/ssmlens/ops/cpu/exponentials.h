// Only the exponentials of a selective scan with a real A, as many as it has elements, with nothing to wait for: each dt comes
// from the cache and each result goes into a sum. No scan that computes its own transitions can be faster; for measuring.
#pragma once
#include "rows.h"

namespace ssmlens {

// dt (batch, length, d), of which a few steps are used again and again; A (d, n); sums (d)
template <class T, class Parallel>
void exponentials(int64_t batch, int64_t length, int64_t d, int64_t d_state, const Rows& dt, const T* A, T* sums,
                  const Parallel& parallel) {
  constexpr int width = Simd<T>::width;
  constexpr int64_t chunk = 32;
  const int64_t blocks = (d + width - 1) / width;
  Scratch<Rate<Vec<T>, false>> rates(blocks * d_state);
  for (int64_t i = 0; i < d * d_state; ++i) {
    const T a = A[i];
    set_rate<T>(rates[i / d_state / width * d_state + i % d_state], int(i / d_state % width),
                a == -std::numeric_limits<T>::infinity() ? T(0) : a);
  }
  Scratch<Vec<T>> totals(batch * blocks);
  for_strips(batch, blocks, parallel, [&](int64_t b, int64_t first, int64_t count) {
    Vec<T> steps[chunk];
    for (int64_t block = first; block < first + count; ++block) {
      read_rows<T>(dt, b, 0, std::min(chunk, length), block * width, std::min<int64_t>(width, d - block * width), 0, steps);
      Vec<T> total{};
      for (int64_t start = 0; start < length; start += chunk)
        for (int64_t n = 0; n < d_state; ++n) {
          const Vec<T> high = rates[block * d_state + n].high, low = rates[block * d_state + n].low;
          for (int64_t i = 0; i < std::min(chunk, length - start); ++i) total += exp_of_product<T>(steps[i], high, low);
        }
      totals[b * blocks + block] = total;
    }
  });
  for (int64_t i = 0; i < d; ++i) {
    sums[i] = 0;
    for (int64_t b = 0; b < batch; ++b) sums[i] += totals[b * blocks + i / width][i % width];
  }
}

}  // namespace ssmlens
