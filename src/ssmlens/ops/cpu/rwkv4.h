// RWKV-4's normalised attention, per sequence and channel, with sums carried relative to a running maximum m:
//   y_t = σ(r) (p e^{m-q} + e^{u+k-q} v) / (s e^{m-q} + e^{u+k-q})            q = max(m, u + k), and 0 where nothing has weight
//   p ← p e^{f-m'} + e^{k-m'} v    s ← s e^{f-m'} + e^{k-m'}    m ← m'        f = m - w, m' = max(f, k, lowest)
//
// r, k, v, y (batch, length, d)   w, u (d)   the state p, s, m: each (batch, d)   reset (batch, length): the state is emptied
// Of two exponentials of a difference with a maximum one is always 1. The forward pass can save the state at the start of
// every chunk; the backward pass computes the others again from there.
#pragma once
#include "rows.h"

namespace ssmlens {

template <class T> struct Rwkv4 {
  static constexpr int width = Simd<T>::width;
  static constexpr int64_t chunk = 32;  // steps between saved states
  static constexpr T lowest = -std::numeric_limits<T>::max() / 4;  // m of no tokens: finite, so that m - m is 0
  using V = Vec<T>;

  int64_t batch, length, d;
  Rows r, k, v, reset;      // reset may be absent
  const T *w, *u;
  const T *p0, *s0, *m0;    // all null: no tokens yet

  int64_t chunks() const { return (length + chunk - 1) / chunk; }
  int64_t blocks() const { return (d + width - 1) / width; }
  int lanes(int64_t block) const { return int(std::min<int64_t>(width, d - block * width)); }
  V of_block(const T* rows, int64_t row, int64_t block) const {
    return rows ? load<T>(rows + row * d + block * width, lanes(block)) : V{};
  }
  void put(T* rows, int64_t row, int64_t block, const V& value) const {
    if (rows) store<T>(rows + row * d + block * width, value, lanes(block));
  }
  bool is_reset(int64_t b, int64_t t) const { return reset && *reset.at(b, t); }

  struct State {
    V p, s, m;
  };
  static State empty() { return {V{}, V{}, splat<T>(lowest)}; }
  State initial(int64_t b, int64_t block) const {
    return p0 ? State{of_block(p0, b, block), of_block(s0, b, block), of_block(m0, b, block)} : empty();
  }

  // e^{x - max(x, y)} and e^{y - max(x, y)}
  struct Weights {
    V x, y;
  };
  INLINE Weights weights(V x, V y) {
    const V e = exp<T>(negative_abs<T>(x - y)), one = splat<T>(T(1));
    return {x > y ? one : e, x > y ? e : one};
  }
  struct Mean {
    Weights weights;  // of the past, of the token
    V inverse, value;  // 1 / the sum of weights, and 0 for 0
  };
  INLINE Mean mean(const State& h, V here, V v) {
    const Weights e = weights(h.m, here);
    const V sum = e.x * h.s + e.y;
    const V inverse = sum == T(0) ? V{} : T(1) / sum;
    return {e, inverse, (e.x * h.p + e.y * v) * inverse};
  }
  struct Step {
    V top;             // max(f, lowest)
    Weights weights;   // of the past, of the token; below `lowest` (w is infinite) nothing is left of the past
  };
  INLINE Step step(const State& h, V w, V k) {
    const V f = h.m - w, low = splat<T>(lowest), top = f < low ? low : f;
    Weights e = weights(top, k);
    e.x = f < low ? V{} : e.x;
    return {top, e};
  }
  INLINE State after(const State& h, V w, V k, V v) {
    const Step s = step(h, w, k);
    return {s.weights.x * h.p + s.weights.y * v, s.weights.x * h.s + s.weights.y, s.top > k ? s.top : k};
  }

  // y (batch, length, d); p, s, m (batch, d); saved (batch, chunks, 3, d), or null.
  template <class Parallel>
  NOINLINE void forward(const OutRows& y, T* p, T* s, T* m, T* saved, const Parallel& parallel) const {
    for_strips(batch, blocks(), parallel, [&](int64_t b, int64_t first, int64_t count) {
      State states[together];
      V rs[chunk], ks[chunk], vs[chunk];
      for (int64_t j = 0; j < count; ++j) states[j] = initial(b, first + j);
      for (int64_t c = 0; c < chunks(); ++c) {
        const int64_t start = c * chunk, steps = std::min(chunk, length - start), then = start + steps;
        Ahead ahead(std::min(chunk, length - then), first * width, std::min(d, (first + count) * width));
        ahead.add<T>(r, b, then), ahead.add<T>(k, b, then), ahead.add<T>(v, b, then), ahead.add<T>(y, b, then);
        for (int64_t block = first; block < first + count; ++block) {
          State h = states[block - first];
          save(saved, b * chunks() + c, block, h);
          read(b, block, start, steps, rs, ks, vs);
          const V w_block = of_block(w, 0, block), u_block = of_block(u, 0, block);
          for (int64_t i = 0; i < steps; ++i) {
            ahead.next();
            if (is_reset(b, start + i)) h = empty();
            rs[i] = sigmoid<T>(rs[i]) * mean(h, u_block + ks[i], vs[i]).value;
            h = after(h, w_block, ks[i], vs[i]);
          }
          states[block - first] = h;
          write_rows<T>(y, b, start, steps, block * width, lanes(block), 0, rs);
        }
      }
      for (int64_t j = 0; j < count; ++j)
        put(p, b, first + j, states[j].p), put(s, b, first + j, states[j].s), put(m, b, first + j, states[j].m);
    });
  }
  void read(int64_t b, int64_t block, int64_t start, int64_t steps, V* rs, V* ks, V* vs) const {
    read_rows<T>(r, b, start, steps, block * width, lanes(block), 0, rs);
    read_rows<T>(k, b, start, steps, block * width, lanes(block), 0, ks);
    read_rows<T>(v, b, start, steps, block * width, lanes(block), 0, vs);
  }
  void save(T* saved, int64_t row, int64_t block, const State& h) const {
    put(saved, 3 * row, block, h.p), put(saved, 3 * row + 1, block, h.s), put(saved, 3 * row + 2, block, h.m);
  }

  // dy, dr, dk, dv (g.batch, length, d); dp, ds, dm: gradients to the final state (g.batch, d), may be null; dw, du (samples,
  // d); dp0, ds0, dm0 (g.batch, d), may be null. g.batch may be a multiple of batch: several gradients, one after another,
  // through the same sequences. A sample is g.batch / samples sequences whose parameter gradients are added up.
  struct Gradients {
    int64_t batch, samples;
    Rows dy;
    const T *saved, *dp, *ds, *dm;
    OutRows dr, dk, dv;
    T *dw, *du, *dp0, *ds0, *dm0;
  };
  template <class Parallel> NOINLINE void backward(const Gradients& g, const Parallel& parallel) const {
    std::vector<T> sums(size_t(2 * g.batch * d));  // dw and du of every sequence
    T *dw = sums.data(), *du = dw + g.batch * d;
    for_strips(g.batch, blocks(), parallel, [&](int64_t b, int64_t first, int64_t count) {
      State dh[together];
      V dws[together] = {}, dus[together] = {};
      for (int64_t j = 0; j < count; ++j)
        dh[j] = {of_block(g.dp, b, first + j), of_block(g.ds, b, first + j), of_block(g.dm, b, first + j)};
      for (int64_t c = chunks() - 1; c >= 0; --c) {
        const int64_t source = b % batch, then = (c - 1) * chunk;
        Ahead ahead(c > 0 ? chunk : 0, first * width, std::min(d, (first + count) * width));
        ahead.add<T>(r, source, then), ahead.add<T>(k, source, then), ahead.add<T>(v, source, then), ahead.add<T>(g.dy, b, then);
        ahead.add<T>(g.dr, b, then), ahead.add<T>(g.dk, b, then), ahead.add<T>(g.dv, b, then);
        for (int64_t j = 0; j < count; ++j) backward_chunk(b, first + j, c, g, dh[j], dws[j], dus[j], ahead);
      }
      for (int64_t j = 0; j < count; ++j) {
        put(dw, b, first + j, dws[j]), put(du, b, first + j, dus[j]);
        put(g.dp0, b, first + j, dh[j].p), put(g.ds0, b, first + j, dh[j].s), put(g.dm0, b, first + j, dh[j].m);
      }
    });
    const int64_t per_sample = g.batch / g.samples;
    for (int64_t sample = 0; sample < g.samples; ++sample)
      for (int64_t i = 0; i < d; ++i) {
        T *to_w = &g.dw[sample * d + i], *to_u = &g.du[sample * d + i];
        *to_w = *to_u = T(0);
        for (int64_t b = sample * per_sample; b < (sample + 1) * per_sample; ++b) *to_w += dw[b * d + i], *to_u += du[b * d + i];
      }
  }

  // dh: the gradient to the state after the chunk, then before it. What multiplies y by a common factor, q, has no gradient.
  NOINLINE void backward_chunk(int64_t b, int64_t block, int64_t c, const Gradients& g, State& dh, V& dw_sum, V& du_sum,
                               Ahead& ahead) const {
    const int64_t source = b % batch, start = c * chunk, steps = std::min(chunk, length - start);
    const int64_t row = 3 * (source * chunks() + c);
    const V w_block = of_block(w, 0, block), u_block = of_block(u, 0, block), one = splat<T>(T(1));
    State before[chunk], h{of_block(g.saved, row, block), of_block(g.saved, row + 1, block), of_block(g.saved, row + 2, block)};
    V rs[chunk], ks[chunk], vs[chunk], dys[chunk], dw{}, du{};
    read(source, block, start, steps, rs, ks, vs);
    read_rows<T>(g.dy, b, start, steps, block * width, lanes(block), 0, dys);
    for (int64_t i = 0; i < steps; ++i) {
      if (is_reset(source, start + i)) h = empty();
      before[i] = h;
      h = after(h, w_block, ks[i], vs[i]);
    }
    for (int64_t i = steps - 1; i >= 0; --i) {
      ahead.next();
      const V gate = sigmoid<T>(rs[i]), k_i = ks[i], v_i = vs[i];
      h = before[i];
      const Mean y = mean(h, u_block + k_i, v_i);
      const V dnumerator = dys[i] * gate * y.inverse, dsum = -dnumerator * y.value;
      const V dhere = (dnumerator * v_i + dsum) * y.weights.y, dm_read = (dnumerator * h.p + dsum * h.s) * y.weights.x;

      const auto [f, e] = step(h, w_block, k_i);
      const V df_weight = (dh.p * h.p + dh.s * h.s) * e.x, dk_weight = (dh.p * v_i + dh.s) * e.y;
      const V dtop = dh.m - df_weight - dk_weight;  // half to each of two equal ones
      const V share = f > k_i ? one : f == k_i ? one * T(0.5) : V{};
      const V df = df_weight + dtop * share;
      const V df_unclamped = h.m - w_block < splat<T>(lowest) ? V{} : df;

      rs[i] = dys[i] * y.value * gate * (T(1) - gate);
      ks[i] = dk_weight + dtop * (T(1) - share) + dhere;
      vs[i] = dnumerator * y.weights.y + dh.p * e.y;
      dw -= df_unclamped, du += dhere;
      dh = State{dh.p * e.x + dnumerator * y.weights.x, dh.s * e.x + dsum * y.weights.x, df_unclamped + dm_read};
      if (is_reset(source, start + i)) dh = State{};
    }
    dw_sum += dw, du_sum += du;
    write_rows<T>(g.dr, b, start, steps, block * width, lanes(block), 0, rs);
    write_rows<T>(g.dk, b, start, steps, block * width, lanes(block), 0, ks);
    write_rows<T>(g.dv, b, start, steps, block * width, lanes(block), 0, vs);
  }
};

}  // namespace ssmlens
