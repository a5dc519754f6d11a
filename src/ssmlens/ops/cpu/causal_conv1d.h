// The short depthwise convolution, and its activation:  pre_t = bias + sum_j w_j x_{t-j},  y = pre or silu(pre),  j < width.
// (w_j is the weight's column width - 1 - j.)  x, y (batch, length, d)   weight (d, width)   bias (d)
// initial (batch, width - 1, d): the tokens before x, oldest first   reset (batch, length): no tap reaches across such a token
//
// A unit of work is a run of whole rows: memory is read in its own order.
#pragma once
#include <algorithm>
#include "rows.h"

namespace ssmlens {

template <class T> struct CausalConv1d {
  static constexpr int lanes = Simd<T>::width;
  using V = Vec<T>;

  int64_t batch, length, d, width;
  bool silu;
  Rows<const T> x, initial;  // initial may be absent: zeros
  const T *weight, *bias;    // bias may be null
  Rows<const bool> reset;
  std::vector<T> taps;      // (width, d): w_j
  std::vector<int> reach;  // (batch, length): how far back a tap may reach, at most width - 1

  int64_t rows_per_run, runs;

  void prepare() {
    taps.resize(size_t(width * d));
    for (int64_t j = 0; j < width; ++j)
      for (int64_t i = 0; i < d; ++i) taps[j * d + i] = weight[i * width + width - 1 - j];
    if (reset) {
      reach.resize(size_t(batch * length));
      for (int64_t b = 0; b < batch; ++b) {
        int64_t far = width - 1;
        for (int64_t t = 0; t < length; ++t) {
          far = *reset.at(b, t) ? 0 : std::min(far + 1, width - 1);
          reach[b * length + t] = int(far);
        }
      }
    }
    rows_per_run = std::max<int64_t>(4 * width, 16384 / d);
    runs = (length + rows_per_run - 1) / rows_per_run;
  }
  int64_t reach_at(int64_t b, int64_t t) const { return reset ? reach[b * length + t] : width - 1; }

  // The row of token t >= 1 - width, or null where it is zero.
  const T* row(int64_t b, int64_t t) const {
    return t >= 0 ? x.at(b, t) : initial ? initial.at(b, t + width - 1) : nullptr;
  }
  INLINE V preactivation(const CausalConv1d& c, const T* const* rows, int64_t count, int64_t i, int m) {
    V sum = c.bias ? load<T>(c.bias + i, m) : V{};
    for (int64_t j = 0; j < count; ++j)
      if (rows[j]) sum += load<T>(&c.taps[j * c.d + i], m) * load<T>(rows[j] + i, m);
    return sum;
  }
  int64_t rows_of(int64_t b, int64_t t, const T** rows) const {
    const int64_t count = reach_at(b, t) + 1;
    for (int64_t j = 0; j < count; ++j) rows[j] = row(b, t - j);
    return count;
  }

  // y (batch, length, d) contiguous.
  template <class Parallel> void forward(T* y, const Parallel& parallel) const {
    parallel(batch * runs, [&](int64_t begin, int64_t end) {
      std::vector<const T*> rows(width);
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t b = unit / runs, from = unit % runs * rows_per_run, to = std::min(length, from + rows_per_run);
        for (int64_t t = from; t < to; ++t) {
          const int64_t count = rows_of(b, t, rows.data());
          T* out = y + (b * length + t) * d;
          for (int64_t i = 0; i < d; i += lanes) {
            const int m = int(std::min<int64_t>(lanes, d - i));
            const V pre = preactivation(*this, rows.data(), count, i, m);
            store<T>(out + i, silu ? pre * sigmoid<T>(pre) : pre, m);
          }
        }
      }
    });
  }

  // dy, dx (g.batch, length, d); dweight (samples, d, width); dbias (samples, d) or null; dinitial (g.batch, width - 1, d) or
  // null. g.batch may be a multiple of batch: several gradients, one after another, through the same sequences. A sample is
  // g.batch / samples sequences whose parameter gradients are added up.
  struct Gradients {
    int64_t batch, samples;
    Rows<const T> dy;
    T *dx, *dweight, *dbias, *dinitial;
  };
  template <class Parallel> void backward(const Gradients& g, const Parallel& parallel) const {
    // Units per sample depend on the shape alone, so every sum has one order, whatever the number of threads.
    const int64_t per_sample = g.batch / g.samples * runs, slabs = std::min<int64_t>(per_sample, 32);
    const int64_t sums_size = (width + 1) * d;  // taps, then bias
    std::vector<T> sums(size_t(g.samples * slabs * sums_size));
    parallel(g.samples * slabs, [&](int64_t begin, int64_t end) {
      std::vector<T> dpre(size_t((rows_per_run + width) * d));
      std::vector<const T*> rows(width);
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t sample = unit / slabs, slab = unit % slabs;
        for (int64_t r = slab * per_sample / slabs; r < (slab + 1) * per_sample / slabs; ++r) {
          const int64_t run = sample * per_sample + r;
          backward_run(run / runs, run % runs * rows_per_run, g, &sums[unit * sums_size], dpre.data(), rows.data());
        }
      }
    });
    for (int64_t sample = 0; sample < g.samples; ++sample) {
      T* total = &sums[sample * slabs * sums_size];
      for (int64_t slab = 1; slab < slabs; ++slab)
        for (int64_t k = 0; k < sums_size; ++k) total[k] += total[slab * sums_size + k];
      for (int64_t j = 0; j < width; ++j)
        for (int64_t i = 0; i < d; ++i) g.dweight[(sample * d + i) * width + width - 1 - j] = total[j * d + i];
      if (g.dbias) std::copy(total + width * d, total + sums_size, g.dbias + sample * d);
    }
  }

  // Rows from .. from + rows_per_run of sequence b; sums (width + 1, d). dpre holds these rows and the width - 1 after them,
  // which also read from these.
  void backward_run(int64_t b, int64_t from, const Gradients& g, T* sums, T* dpre, const T** rows) const {
    const int64_t source = b % batch;
    const int64_t to = std::min(length, from + rows_per_run), seen = std::min(length, to + width - 1);
    for (int64_t t = from; t < seen; ++t) {
      const int64_t count = rows_of(source, t, rows);
      const T* dy = g.dy.at(b, t);
      for (int64_t i = 0; i < d; i += lanes) {
        const int m = int(std::min<int64_t>(lanes, d - i));
        V gradient = load<T>(dy + i, m);
        if (silu) {
          const V pre = preactivation(*this, rows, count, i, m), s = sigmoid<T>(pre);
          gradient *= s * (T(1) + pre * (T(1) - s));
        }
        store<T>(dpre + (t - from) * d + i, gradient, m);
        if (t >= to) continue;  // the next run adds it up
        for (int64_t j = 0; j < count; ++j) {
          if (!rows[j]) continue;
          T* sum = sums + j * d + i;
          store<T>(sum, load<T>(sum, m) + gradient * load<T>(rows[j] + i, m), m);
        }
        T* sum = sums + width * d + i;
        store<T>(sum, load<T>(sum, m) + gradient, m);
      }
    }
    for (int64_t t = from == 0 && g.dinitial ? 1 - width : from; t < to; ++t) {
      T* dx = t >= 0 ? g.dx + (b * length + t) * d : g.dinitial + (b * (width - 1) + t + width - 1) * d;
      for (int64_t i = 0; i < d; i += lanes) {
        const int m = int(std::min<int64_t>(lanes, d - i));
        V sum{};
        for (int64_t j = std::max<int64_t>(0, -t); j < width && t + j < seen; ++j)
          if (j <= reach_at(source, t + j)) sum += load<T>(&taps[j * d + i], m) * load<T>(dpre + (t + j - from) * d + i, m);
        store<T>(dx + i, sum, m);
      }
    }
  }
};

}  // namespace ssmlens
