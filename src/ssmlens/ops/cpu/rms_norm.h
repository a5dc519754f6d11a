// Every row over its root mean square:  y_i = w_i x_i r,  r = 1 / sqrt(mean_i x_i^2 + eps).
// x, y (batch, length, d)   w (d), or null: ones   inverse (batch, length): r, all that the backward pass is given of it
//
// Back, with g_i = w_i dy_i and n_i = x_i r:  dx_i = r (g_i - n_i mean_j g_j n_j),  dw_i = the sum over rows of dy_i n_i.
#pragma once
#include <cmath>
#include "rows.h"

namespace ssmlens {

template <class T> struct RmsNorm {
  static constexpr int lanes = Simd<T>::width;
  using V = Vec<T>;

  int64_t batch, length, d;
  Rows x;
  const T* weight;
  T eps;

  int64_t blocks() const { return (d + lanes - 1) / lanes; }
  INLINE V weights(const T* weight, int64_t k, int m) {
    return weight ? load<T>(weight + k * lanes, m) : splat<T>(T(1));
  }
  static T sum_of_lanes(const V& v) {
    T sum = 0;
    add_lane_sums<1, T>(&sum, &v);
    return sum;
  }

  template <class Parallel> NOINLINE void forward(const OutRows& y, T* inverse, const Parallel& parallel) const {
    parallel(batch * length, [&](int64_t begin, int64_t end) {
      Scratch<V> read(blocks()), write(blocks());
      for (int64_t row = begin; row < end; ++row) {
        const int64_t b = row / length, t = row % length;
        const T* from = row_of<T>(x, b, t, d, read.data());
        T* to = out_row<T>(y, b, t, write.data());
        V squares{};
        for_each_vector<T>(d, [&](int64_t k, auto m) ALWAYS {
          const V v = load<T>(from + k * lanes, m);
          squares += v * v;
        });
        const T r = inverse[row] = T(1) / std::sqrt(sum_of_lanes(squares) / T(d) + eps);
        for_each_vector<T>(d, [&](int64_t k, auto m) ALWAYS {
          store<T>(to + k * lanes, load<T>(from + k * lanes, m) * r * weights(weight, k, m), m);
        });
        written<T>(y, b, t, d, write.data());
      }
    });
  }

  // dy, dx (g.batch, length, d); dweight (samples, d), or null. g.batch may be a multiple of batch: several gradients, one
  // after another, through the same rows. A sample is g.batch / samples sequences whose gradients to the weight are added up.
  struct Gradients {
    int64_t batch, samples;
    Rows dy;
    const T* inverse;
    OutRows dx;
    T* dweight;
  };
  template <class Parallel> NOINLINE void backward(const Gradients& g, const Parallel& parallel) const {
    // Units per sample depend on the shape alone, so every sum has one order, whatever the number of threads.
    const int64_t per_sample = g.batch / g.samples * length, slabs = std::min<int64_t>(per_sample, 32), size = blocks();
    Scratch<V> sums(size_t(g.samples * slabs * size));
    parallel(g.samples * slabs, [&](int64_t begin, int64_t end) {
      Scratch<V> read(size), read_dy(size), write(size);
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t sample = unit / slabs, slab = unit % slabs;
        for (int64_t r = slab * per_sample / slabs; r < (slab + 1) * per_sample / slabs; ++r) {
          const int64_t b = (sample * per_sample + r) / length, t = r % length;
          backward_row(row_of<T>(x, b % batch, t, d, read.data()), g.inverse[b % batch * length + t],
                       row_of<T>(g.dy, b, t, d, read_dy.data()), out_row<T>(g.dx, b, t, write.data()), &sums[unit * size]);
          written<T>(g.dx, b, t, d, write.data());
        }
      }
    });
    if (!g.dweight) return;
    for (int64_t sample = 0; sample < g.samples; ++sample) {
      V* total = &sums[sample * slabs * size];
      for (int64_t slab = 1; slab < slabs; ++slab)
        for (int64_t k = 0; k < size; ++k) total[k] += total[slab * size + k];
      for_each_vector<T>(d, [&](int64_t k, auto m) { store<T>(g.dweight + sample * d + k * lanes, total[k], m); });
    }
  }
  void backward_row(const T* from, T r, const T* dy, T* dx, V* sums) const {
    V inner{};
    for_each_vector<T>(d, [&](int64_t k, auto m) ALWAYS {
      const V product = load<T>(dy + k * lanes, m) * (load<T>(from + k * lanes, m) * r);
      sums[k] += product;
      inner += product * weights(weight, k, m);
    });
    const T mean = sum_of_lanes(inner) / T(d);
    for_each_vector<T>(d, [&](int64_t k, auto m) ALWAYS {
      const V along = load<T>(from + k * lanes, m) * r * mean;
      store<T>(dx + k * lanes, (load<T>(dy + k * lanes, m) * weights(weight, k, m) - along) * r, m);
    });
  }
};

}  // namespace ssmlens
