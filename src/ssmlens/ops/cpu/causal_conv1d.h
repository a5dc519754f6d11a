// The short depthwise convolution, and its activation:  pre_t = bias + sum_j w_j x_{t-j},  y = pre or silu(pre),  j < width.
// (w_j is the weight's column width - 1 - j.)  x, y (batch, length, d)   weight (d, width)   bias (d)
// initial (batch, width - 1, d): the tokens before x, oldest first   reset (batch, length): no tap reaches across such a token
//
// A unit of work is a run of whole rows: memory is read in its own order. Rows in half precision are converted into
// scratch memory, a run at a time.
#pragma once
#include "rows.h"

namespace ssmlens {

template <class T> struct CausalConv1d {
  static constexpr int lanes = Simd<T>::width;
  using V = Vec<T>;

  int64_t batch, length, d, width;
  bool silu;
  Rows x, initial, reset;  // initial may be absent: nothing came before; reset may be absent
  const T *weight, *bias;  // bias may be null

  int64_t blocks, rows_per_run, runs;
  Scratch<V> taps;         // (width + 1, blocks): w_j, then the bias
  std::vector<int> reach;  // (batch, length): how far back a tap may reach because of resets, at most width - 1

  void prepare() {
    blocks = (d + lanes - 1) / lanes;
    taps.assign(size_t((width + 1) * blocks), V{});
    for (int64_t i = 0; i < d; ++i) {
      for (int64_t j = 0; j < width; ++j) taps[j * blocks + i / lanes][i % lanes] = weight[i * width + width - 1 - j];
      if (bias) taps[width * blocks + i / lanes][i % lanes] = bias[i];
    }
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
  // The number of taps of token t.
  int64_t count(int64_t b, int64_t t) const {
    const int64_t far = reset ? reach[b * length + t] : width - 1;
    return 1 + (initial ? far : std::min(far, t));
  }

  // Rows of some tokens in succession: in their tensor, or converted.
  struct Window {
    int64_t first;
    Scratch<V> converted;
    std::vector<const T*> rows;  // null for those before the sequence where nothing came before
    const T* const* row(int64_t t) const { return &rows[t - first]; }
  };
  Window window(int64_t count) const { return {0, Scratch<V>(size_t(count * blocks)), std::vector<const T*>(size_t(count))}; }
  void read_window(int64_t b, int64_t from, int64_t to, Window& w) const {
    w.first = from;
    for (int64_t t = from; t < to; ++t) {
      const Rows& rows = t < 0 ? initial : x;
      const int64_t at = t < 0 ? t + width - 1 : t;
      w.rows[t - from] = rows ? row_of<T>(rows, b, at, d, &w.converted[(t - from) * blocks]) : nullptr;
    }
  }
  // rows[-j] is the row of tap j.
  INLINE V preactivation(const CausalConv1d& c, const T* const* rows, int64_t count, int64_t k, int m) {
    V sum = c.taps[c.width * c.blocks + k];
    for (int64_t j = 0; j < count; ++j) sum += c.taps[j * c.blocks + k] * load<T>(rows[-j] + k * lanes, m);
    return sum;
  }

  // y (batch, length, d)
  template <class Parallel> NOINLINE void forward(const OutRows& y, const Parallel& parallel) const {
    parallel(batch * runs, [&](int64_t begin, int64_t end) {
      Window seen = window(rows_per_run + width);
      Scratch<V> scratch(blocks);
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t b = unit / runs, from = unit % runs * rows_per_run, to = std::min(length, from + rows_per_run);
        read_window(b, from - width + 1, to, seen);
        for (int64_t t = from; t < to; ++t) {
          T* out = out_row<T>(y, b, t, scratch.data());
          const T* const* rows = seen.row(t);
          const int64_t taps_of_t = count(b, t);
          for_each_vector<T>(d, [&](int64_t k, auto m) ALWAYS {
            const V pre = preactivation(*this, rows, taps_of_t, k, m);
            store<T>(out + k * lanes, silu ? pre * sigmoid<T>(pre) : pre, m);
          });
          written<T>(y, b, t, d, scratch.data());
        }
      }
    });
  }

  // dy, dx (g.batch, length, d); dweight (samples, d, width); dbias (samples, d) or null; dinitial (g.batch, width - 1, d) or
  // absent. g.batch may be a multiple of batch: several gradients, one after another, through the same sequences. A sample is
  // g.batch / samples sequences whose parameter gradients are added up.
  struct Gradients {
    int64_t batch, samples;
    Rows dy;
    OutRows dx;
    T *dweight, *dbias;
    OutRows dinitial;
  };
  struct Backward {
    Window seen;
    Scratch<V> dpre, dy, dx;
  };
  template <class Parallel> NOINLINE void backward(const Gradients& g, const Parallel& parallel) const {
    // Units per sample depend on the shape alone, so every sum has one order, whatever the number of threads.
    const int64_t per_sample = g.batch / g.samples * runs, slabs = std::min<int64_t>(per_sample, 32);
    const int64_t sums_size = (width + 1) * blocks;  // as taps
    Scratch<V> sums(size_t(g.samples * slabs * sums_size));
    parallel(g.samples * slabs, [&](int64_t begin, int64_t end) {
      Backward work{window(rows_per_run + 2 * width), Scratch<V>((rows_per_run + width) * blocks), Scratch<V>(blocks),
                    Scratch<V>(blocks)};
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t sample = unit / slabs, slab = unit % slabs;
        for (int64_t r = slab * per_sample / slabs; r < (slab + 1) * per_sample / slabs; ++r) {
          const int64_t run = sample * per_sample + r;
          backward_run(run / runs, run % runs * rows_per_run, g, &sums[unit * sums_size], work);
        }
      }
    });
    for (int64_t sample = 0; sample < g.samples; ++sample) {
      V* total = &sums[sample * slabs * sums_size];
      for (int64_t slab = 1; slab < slabs; ++slab)
        for (int64_t k = 0; k < sums_size; ++k) total[k] += total[slab * sums_size + k];
      for (int64_t i = 0; i < d; ++i) {
        for (int64_t j = 0; j < width; ++j)
          g.dweight[(sample * d + i) * width + width - 1 - j] = total[j * blocks + i / lanes][i % lanes];
        if (g.dbias) g.dbias[sample * d + i] = total[width * blocks + i / lanes][i % lanes];
      }
    }
  }

  // Rows from .. from + rows_per_run of sequence b; sums as taps. dpre holds these rows and the width - 1 after them, which
  // also read from these.
  void backward_run(int64_t b, int64_t from, const Gradients& g, V* sums, Backward& w) const {
    const int64_t source = b % batch;
    const int64_t to = std::min(length, from + rows_per_run), end = std::min(length, to + width - 1);
    read_window(source, from - width + 1, end, w.seen);
    for (int64_t t = from; t < end; ++t) {
      const T* const* rows = w.seen.row(t);
      const T* dy = row_of<T>(g.dy, b, t, d, w.dy.data());
      V* dpre = &w.dpre[(t - from) * blocks];
      const int64_t taps_of_t = count(source, t);
      for_each_vector<T>(d, [&](int64_t k, auto m) ALWAYS {
        V gradient = load<T>(dy + k * lanes, m);
        if (silu) {
          const V pre = preactivation(*this, rows, taps_of_t, k, m), s = sigmoid<T>(pre);
          gradient *= s * (T(1) + pre * (T(1) - s));
        }
        dpre[k] = gradient;
        if (t >= to) return;  // the next run adds it up
        for (int64_t j = 0; j < taps_of_t; ++j) sums[j * blocks + k] += gradient * load<T>(rows[-j] + k * lanes, m);
        sums[width * blocks + k] += gradient;
      });
    }
    for (int64_t t = from == 0 && g.dinitial ? 1 - width : from; t < to; ++t) {
      const OutRows& rows = t < 0 ? g.dinitial : g.dx;
      const int64_t at = t < 0 ? t + width - 1 : t;
      T* dx = out_row<T>(rows, b, at, w.dx.data());
      const int64_t first = std::max<int64_t>(0, -t), last = std::min(width, end - t);
      for_each_vector<T>(d, [&](int64_t k, auto m) ALWAYS {
        V sum{};
        for (int64_t j = first; j < last; ++j)
          if (!reset || j < count(source, t + j)) sum += taps[j * blocks + k] * w.dpre[(t + j - from) * blocks + k];
        store<T>(dx + k * lanes, sum, m);
      });
      written<T>(rows, b, at, d, w.dx.data());
    }
  }
};

}  // namespace ssmlens
