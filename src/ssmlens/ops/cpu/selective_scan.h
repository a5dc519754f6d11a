// The selective scan with a real diagonal A, per sequence b, inner channel d and state channel n:
//   dt = softplus(dt_raw + dt_bias)    a = exp(dt A)    h_t = a_t h_{t-1} + dt_t B_t x_t    y = (sum_n C h + D x) silu(z)
//
// x, dt, z, y (batch, length, d)   A (d, n)   B, C (batch, length, n) or (d, n)   h (batch, d, n)   reset (batch, length)
//
// A block is one vector of inner channels. Time goes in chunks of `chunk` steps, state channels in tiles of at most
// `tile`: for one chunk and tile the transitions a fit the L1 cache, so they are computed first, in a loop of their own
// that skips the pinned ones (A = 0: a = 1, A = -inf: a = 0); the recurrence then knows nothing about pinning.
// The forward pass can save the state at the start of every chunk; the backward pass computes the rest again from there.
#pragma once
#include <algorithm>
#include "rows.h"

namespace ssmlens {

constexpr int tile = 32;
// Blocks that go through time side by side: their rows are neighbours in memory, a single one would touch a page per row.
constexpr int64_t together = 8;

template <class T> struct SelectiveScan {
  static constexpr int width = Simd<T>::width;
  using V = Vec<T>;

  int64_t batch, length, d_inner, d_state;
  bool dt_softplus, B_varies, C_varies;  // varies: (batch, length, n) rather than (d, n)
  Rows<const T> x, dt, z, B, C;
  const T *A, *D, *dt_bias, *h0, *B_fixed, *C_fixed;  // D, dt_bias, h0 may be null
  Rows<const bool> reset;

  int64_t chunk;  // steps between saved states; the caller chooses
  int64_t chunks, blocks;
  // Per block and state channel, one vector over the block's inner channels.
  Scratch<T> high, low, finite, live, B_block, C_block;
  enum Kind : uint8_t { general, one, zero, mixed };
  std::vector<Kind> kind;

  int lanes(int64_t block) const { return int(std::min<int64_t>(width, d_inner - block * width)); }

  // Lane i of vector n holds element (d, n) of a (d, n) matrix.
  NOINLINE void gather(const T* matrix, int64_t block, V* to) const {
    for (int64_t n = 0; n < d_state; ++n) {
      to[n] = V{};
      for (int i = 0; i < lanes(block); ++i) to[n][i] = matrix[(block * width + i) * d_state + n];
    }
  }
  NOINLINE void scatter(const V* from, int64_t block, T* matrix) const {
    for (int64_t n = 0; n < d_state; ++n)
      for (int i = 0; i < lanes(block); ++i) matrix[(block * width + i) * d_state + n] = from[n][i];
  }

  NOINLINE void prepare() {
    chunks = (length + chunk - 1) / chunk;
    blocks = (d_inner + width - 1) / width;
    const size_t size = size_t(blocks * d_state);
    high.resize(size), low.resize(size), finite.resize(size), live.resize(size), kind.resize(size);
    if (!B_varies) B_block.resize(size);
    if (!C_varies) C_block.resize(size);
    const T minus_infinity = -std::numeric_limits<T>::infinity();
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t base = block * d_state;
      if (!B_varies) gather(B_fixed, block, &B_block[base]);
      if (!C_varies) gather(C_fixed, block, &C_block[base]);
      gather(A, block, &finite[base]);
      for (int64_t k = base; k < base + d_state; ++k) {
        int ones = 0, zeros = 0;
        for (int i = 0; i < width; ++i) {
          T& a = (&finite[k])[0][i < lanes(block) ? i : 0];
          const bool is_zero = a == minus_infinity;
          ones += a == T(0), zeros += is_zero;
          const Split<T> split = is_zero ? Split<T>{0, 0} : times_log2e<T>(a);
          high[k][i] = split.high, low[k][i] = split.low, live[k][i] = is_zero ? T(0) : T(1);
        }
        for (int i = 0; i < width; ++i)
          if (live[k][i] == T(0)) finite[k][i] = T(0);
        kind[k] = ones == width ? one : zeros == width ? zero : zeros ? mixed : general;
      }
    }
  }

  // One chunk of the element-wise inputs of one block.
  struct Inputs {
    Scratch<T> dt, dt_slope, x, u;  // dt_slope: the derivative of dt by what it was before softplus
    explicit Inputs(int64_t chunk) : dt(chunk), dt_slope(chunk), x(chunk), u(chunk) {}
  };
  NOINLINE void read(int64_t b, int64_t block, int64_t start, int64_t steps, Inputs& in) const {
    const int m = lanes(block);
    const int64_t d = block * width;
    const V bias = dt_bias ? load<T>(dt_bias + d, m) : V{};
    for (int64_t i = 0; i < steps; ++i) {
      const V raw = load<T>(dt.at(b, start + i) + d, m) + bias;
      in.dt[i] = dt_softplus ? softplus<T>(raw, in.dt_slope[i]) : raw;
      in.x[i] = load<T>(x.at(b, start + i) + d, m);
      in.u[i] = in.dt[i] * in.x[i];
    }
  }

  // a[i * count + n] for steps i of a chunk and state channels first .. first + count.
  NOINLINE void transitions(const V* dt_steps, int64_t steps, int64_t block, int64_t first, int64_t count, V* a) const {
    for (int64_t n = 0; n < count; ++n) {
      const int64_t k = block * d_state + first + n;
      const V hi = high[k], lo = low[k];
      switch (kind[k]) {
        case one:
          for (int64_t i = 0; i < steps; ++i) a[i * count + n] = splat<T>(T(1));
          break;
        case zero:
          for (int64_t i = 0; i < steps; ++i) a[i * count + n] = V{};
          break;
        case general:
          for (int64_t i = 0; i < steps; ++i) a[i * count + n] = exp_of_product<T>(dt_steps[i], hi, lo);
          break;
        case mixed: {
          const V alive = live[k];
          for (int64_t i = 0; i < steps; ++i) {
            const V e = exp_of_product<T>(dt_steps[i], hi, lo);
            a[i * count + n] = alive == T(0) ? V{} : e;
          }
        }
      }
    }
  }

  // Where the next chunk of work lies: rows are far apart in memory, which the hardware does not foresee.
  struct Next {
    int64_t b, block, start;
  };
  void prefetch(const Next& next, int64_t i) const {
    const int64_t t = std::min(next.start + i, length - 1), d = next.block * width;
    __builtin_prefetch(x.at(next.b, t) + d);
    __builtin_prefetch(dt.at(next.b, t) + d);
    if (z) __builtin_prefetch(z.at(next.b, t) + d);
  }

  bool is_reset(int64_t b, int64_t t) const { return reset && *reset.at(b, t); }

  // B or C of one step: a number per state channel, the same for all lanes, or a vector.
  template <bool varies> INLINE auto coefficients(const Rows<const T>& rows, const Scratch<T>& fixed, int64_t b,
                                                  int64_t t, int64_t at_block) {
    if constexpr (varies) {
      return rows.at(b, t);
    } else {
      return &fixed[at_block];
    }
  }

  // ---------------------------------------------------------------- forward
  // y (batch, length, d) contiguous; final_state (batch, d, n); saved (batch, blocks, chunks, n) vectors, or null.
  struct Output {
    T *y, *final_state;
    V* saved;
  };
  template <class Parallel> void forward(const Output& out, const Parallel& parallel) const {
    if (B_varies && C_varies) return forward_with<true, true>(out, parallel);
    if (B_varies) return forward_with<true, false>(out, parallel);
    if (C_varies) return forward_with<false, true>(out, parallel);
    forward_with<false, false>(out, parallel);
  }
  template <bool Bv, bool Cv, class Parallel> void forward_with(const Output& out, const Parallel& parallel) const {
    const int64_t groups = std::max((blocks + together - 1) / together, std::min(blocks, 16 / batch));
    parallel(batch * groups, [&](int64_t begin, int64_t end) {
      Inputs in(chunk);
      Scratch<T> a(chunk * tile), y(chunk), h(together * d_state);
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t b = unit / groups, group = unit % groups;
        const int64_t first = group * blocks / groups, last = (group + 1) * blocks / groups - 1, matrix = b * d_inner * d_state;
        std::fill(h.begin(), h.end(), V{});
        if (h0)
          for (int64_t block = first; block <= last; ++block) gather(h0 + matrix, block, &h[(block - first) * d_state]);
        for (int64_t c = 0; c < chunks; ++c)
          for (int64_t block = first; block <= last; ++block) {
            const Next next = block < last ? Next{b, block + 1, c * chunk} : Next{b, first, (c + 1) * chunk};
            forward_chunk<Bv, Cv>(b, block, c, next, out, in, a.data(), y.data(), &h[(block - first) * d_state]);
          }
        for (int64_t block = first; block <= last; ++block)
          scatter(&h[(block - first) * d_state], block, out.final_state + matrix);
      }
    });
  }
  template <bool Bv, bool Cv>
  void forward_chunk(int64_t b, int64_t block, int64_t c, const Next& next, const Output& out, Inputs& in, V* a, V* y,
                     V* h) const {
    const V skip = D ? load<T>(D + block * width, lanes(block)) : V{};
    const int64_t start = c * chunk, steps = std::min(chunk, length - start);
    read(b, block, start, steps, in);
    for (int64_t i = 0; i < steps; ++i) y[i] = skip * in.x[i];
    if (out.saved) std::copy(h, h + d_state, out.saved + ((b * blocks + block) * chunks + c) * d_state);
    for (int64_t first = 0; first < d_state; first += tile) {
      const int64_t count = std::min<int64_t>(tile, d_state - first);
      transitions(in.dt.data(), steps, block, first, count, a);
      V* ht = h + first;
      for (int64_t i = 0; i < steps; ++i) {
        const auto Bt = coefficients<Bv>(B, B_block, b, start + i, block * d_state) + first;
        const auto Ct = coefficients<Cv>(C, C_block, b, start + i, block * d_state) + first;
        if (is_reset(b, start + i)) std::fill(ht, ht + count, V{});
        if (first == 0) prefetch(next, i);
        const V u = in.u[i], *at = a + i * count;
        V sum = y[i];
        for (int64_t n = 0; n < count; ++n) {
          const V state = at[n] * ht[n] + u * Bt[n];
          ht[n] = state;
          sum += state * Ct[n];
        }
        y[i] = sum;
      }
    }
    write_y(b, block, start, steps, y, out.y);
  }

  NOINLINE void write_y(int64_t b, int64_t block, int64_t start, int64_t steps, V* y, T* out) const {
    const int m = lanes(block);
    const int64_t d = block * width;
    for (int64_t i = 0; i < steps; ++i) {
      if (z) {
        const V gate = load<T>(z.at(b, start + i) + d, m);
        y[i] *= gate * sigmoid<T>(gate);
      }
      store<T>(out + (b * length + start + i) * d_inner + d, y[i], m);
    }
  }

  // ---------------------------------------------------------------- backward
  // dy, dx, ddt, dz (g.batch, length, d); dfinal, dh0 (g.batch, d, n), may be null; dA, dB_fixed, dC_fixed (samples, d, n);
  // dD, ddt_bias (samples, d), may be null; dB, dC (g.batch, length, n), zero on entry.
  // g.batch may be a multiple of batch: several gradients, one after another, through the same sequences. A sample is
  // g.batch / samples sequences whose parameter gradients are added up.
  struct Gradients {
    int64_t batch, samples;
    Rows<const T> dy;
    const V* saved;
    const T* dfinal;
    T *dx, *ddt, *dz, *dA, *dB, *dC, *dD, *ddt_bias, *dh0;
  };
  // What is added up over time and sequences, per block: vectors dA (n), dB (n), dC (n), dD, ddt_bias.
  struct Sums {
    V *dA, *dB, *dC, *dD, *ddt_bias;
    Sums(V* at, int64_t n) : dA(at), dB(at + n), dC(at + 2 * n), dD(at + 3 * n), ddt_bias(at + 3 * n + 1) {}
  };
  int64_t sums_size() const { return 3 * d_state + 2; }

  template <class Parallel> void backward(const Gradients& g, const Parallel& parallel) const {
    if (B_varies && C_varies) return backward_with<true, true>(g, parallel);
    if (B_varies) return backward_with<true, false>(g, parallel);
    if (C_varies) return backward_with<false, true>(g, parallel);
    backward_with<false, false>(g, parallel);
  }

  // A unit of work is a slab of sequences times a group of blocks. Their numbers depend on the shape alone, never on the
  // number of threads, so every sum has one order. Each group adds to its own copy of dB and dC.
  template <bool Bv, bool Cv, class Parallel> void backward_with(const Gradients& g, const Parallel& parallel) const {
    const int64_t per_sample = g.batch / g.samples;
    const int64_t slabs = std::min<int64_t>(per_sample, 32);
    int64_t copies = 4;  // a power of two, to share evenly; all of them together about as large as x
    while (2 * copies <= d_inner / (2 * d_state)) copies *= 2;
    const int64_t groups = std::min({blocks, copies, (int64_t(15) + g.samples * slabs) / (g.samples * slabs)});
    const int64_t rows = g.batch * length * d_state;
    std::vector<T> dB_copies(Bv ? (groups - 1) * rows : 0), dC_copies(Cv ? (groups - 1) * rows : 0);
    Scratch<T> sums(g.samples * slabs * blocks * sums_size());

    parallel(g.samples * slabs * groups, [&](int64_t begin, int64_t end) {
      Work work(*this);
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t group = unit % groups, slab = unit / groups % slabs, sample = unit / groups / slabs;
        Gradients mine = g;
        if (group > 0) {
          mine.dB = dB_copies.data() + (group - 1) * rows;
          mine.dC = dC_copies.data() + (group - 1) * rows;
        }
        const int64_t first = group * blocks / groups, last = (group + 1) * blocks / groups;
        V* sums_of_unit = &sums[(sample * slabs + slab) * blocks * sums_size()];
        for (int64_t i = slab * per_sample / slabs; i < (slab + 1) * per_sample / slabs; ++i)
          for (int64_t block = first; block < last; block += together)
            backward_blocks<Bv, Cv>(sample * per_sample + i, block, std::min(block + together, last), mine, sums_of_unit, work);
      }
    });

    if (groups > 1) {
      parallel(g.batch * length, [&](int64_t begin, int64_t end) {
        for (int64_t group = 1; group < groups; ++group)
          for (int64_t i = begin * d_state; i < end * d_state; ++i) {
            if (Bv) g.dB[i] += dB_copies[(group - 1) * rows + i];
            if (Cv) g.dC[i] += dC_copies[(group - 1) * rows + i];
          }
      });
    }
    parallel(g.samples * blocks, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t sample = unit / blocks, block = unit % blocks, d = block * width;
        V* total = &sums[(sample * slabs * blocks + block) * sums_size()];
        for (int64_t slab = 1; slab < slabs; ++slab)
          for (int64_t k = 0; k < sums_size(); ++k) total[k] += total[slab * blocks * sums_size() + k];
        const Sums sum(total, d_state);
        const int64_t matrix = sample * d_inner * d_state;
        scatter(sum.dA, block, g.dA + matrix);
        if (!Bv) scatter(sum.dB, block, g.dB + matrix);
        if (!Cv) scatter(sum.dC, block, g.dC + matrix);
        if (g.dD) store<T>(g.dD + sample * d_inner + d, *sum.dD, lanes(block));
        if (g.ddt_bias) store<T>(g.ddt_bias + sample * d_inner + d, *sum.ddt_bias, lanes(block));
      }
    });
  }

  struct Work {
    Inputs in;
    Scratch<T> a, h, products, y, dy, gate_slope, du, ddt, dh, sums;  // gate_slope: the gradient to z, but for y
    explicit Work(const SelectiveScan& s)
        : in(s.chunk), a(s.chunk * tile), h((s.chunk + 1) * tile), products(tile + width), y(s.chunk), dy(s.chunk),
          gate_slope(s.chunk), du(s.chunk), ddt(s.chunk), dh(together * s.d_state), sums(s.sums_size()) {}
  };
  // One chunk of one block: of sequence b among the gradients, which is sequence `source` among the inputs.
  struct Place {
    int64_t b, source, block, start, steps;
    Next next;  // its b counts gradients
  };

  template <bool Bv, bool Cv>
  void backward_blocks(int64_t b, int64_t first, int64_t last, const Gradients& g, V* sums, Work& w) const {
    const int64_t matrix = b * d_inner * d_state;
    std::fill(w.dh.begin(), w.dh.end(), V{});
    if (g.dfinal)
      for (int64_t block = first; block < last; ++block) gather(g.dfinal + matrix, block, &w.dh[(block - first) * d_state]);
    for (int64_t c = chunks - 1; c >= 0; --c)
      for (int64_t block = first; block < last; ++block) {
        const int64_t start = c * chunk;
        const Next next = block + 1 < last ? Next{b, block + 1, start} : Next{b, first, std::max<int64_t>(0, start - chunk)};
        const Place at{b, b % batch, block, start, std::min(chunk, length - start), next};
        backward_chunk<Bv, Cv>(at, g, Sums(&sums[block * sums_size()], d_state), &w.dh[(block - first) * d_state], w);
      }
    if (g.dh0)
      for (int64_t block = first; block < last; ++block) scatter(&w.dh[(block - first) * d_state], block, g.dh0 + matrix);
  }

  template <bool Bv, bool Cv>
  void backward_chunk(const Place& at, const Gradients& g, const Sums& total, V* dh, Work& w) const {
    std::fill(w.sums.begin(), w.sums.end(), V{});  // of this chunk alone: shorter sums, smaller rounding errors
    const Sums sum(w.sums.data(), d_state);
    read(at.source, at.block, at.start, at.steps, w.in);
    begin_chunk(at, g, w);
    for (int64_t first = 0; first < d_state; first += tile) {
      const int64_t count = std::min<int64_t>(tile, d_state - first);
      const V* saved = g.saved + ((at.source * blocks + at.block) * chunks + at.start / chunk) * d_state + first;
      transitions(w.in.dt.data(), at.steps, at.block, first, count, w.a.data());
      std::copy(saved, saved + count, w.h.data());
      recompute_states<Bv, Cv>(at, first, count, g, sum, w);
      backward_states<Bv, Cv>(at, first, count, g, sum, dh + first, w);
    }
    finish_chunk(at, g, sum, w);
    for (int64_t k = 0; k < sums_size(); ++k) total.dA[k] += w.sums[k];
  }

  NOINLINE void begin_chunk(const Place& p, const Gradients& g, Work& w) const {
    const int m = lanes(p.block);
    const int64_t d = p.block * width;
    const V skip = D ? load<T>(D + d, m) : V{};
    for (int64_t i = 0; i < p.steps; ++i) {
      w.dy[i] = load<T>(g.dy.at(p.b, p.start + i) + d, m);
      if (z) {
        const V gate = load<T>(z.at(p.source, p.start + i) + d, m), s = sigmoid<T>(gate);
        w.gate_slope[i] = w.dy[i] * s * (T(1) + gate * (T(1) - s));
        w.dy[i] *= gate * s;
      }
      w.y[i] = skip * w.in.x[i];
      w.du[i] = V{}, w.ddt[i] = V{};
    }
  }

  NOINLINE void finish_chunk(const Place& p, const Gradients& g, const Sums& sum, Work& w) const {
    const int m = lanes(p.block);
    const int64_t d = p.block * width;
    const V skip = D ? load<T>(D + d, m) : V{};
    for (int64_t i = 0; i < p.steps; ++i) {
      const int64_t at = (p.b * length + p.start + i) * d_inner + d;
      if (z) store<T>(g.dz + at, w.gate_slope[i] * w.y[i], m);
      const V dx = w.du[i] * w.in.dt[i] + skip * w.dy[i];
      V ddt = w.ddt[i] + w.du[i] * w.in.x[i];
      if (dt_softplus) ddt *= w.in.dt_slope[i];
      *sum.dD += w.dy[i] * w.in.x[i];
      *sum.ddt_bias += ddt;
      store<T>(g.dx + at, dx, m);
      store<T>(g.ddt + at, ddt, m);
    }
  }

  // Forward through one chunk and tile: the states again (h[i + 1] after step i), y, and the gradient to C.
  template <bool Bv, bool Cv>
  void recompute_states(const Place& p, int64_t first, int64_t count, const Gradients& g, const Sums& sum, Work& w) const {
    for (int64_t i = 0; i < p.steps; ++i) {
      const int64_t t = p.start + i;
      const auto Bt = coefficients<Bv>(B, B_block, p.source, t, p.block * d_state) + first;
      const auto Ct = coefficients<Cv>(C, C_block, p.source, t, p.block * d_state) + first;
      V *a = &w.a[i * count], *before = &w.h[i * count], *after = before + count, *product = w.products.data();
      if (is_reset(p.source, t)) {  // a = 0 from here on, so nothing flows back through this step either
        std::fill(a, a + count, V{});
        std::fill(before, before + count, V{});
      }
      if (first == 0) {
        prefetch({p.next.b % batch, p.next.block, p.next.start}, i);
        __builtin_prefetch(g.dy.at(p.next.b, std::min(p.next.start + i, length - 1)) + p.next.block * width);
        const int64_t at_row = (p.b * length + t) * d_inner + p.block * width;
        __builtin_prefetch(g.dx + at_row, 1), __builtin_prefetch(g.ddt + at_row, 1);
      }
      const V u = w.in.u[i], dy = w.dy[i];
      V y = w.y[i];
      for (int64_t n = 0; n < count; ++n) {
        const V state = a[n] * before[n] + u * Bt[n];
        after[n] = state;
        y += state * Ct[n];
        if constexpr (Cv) {
          product[n] = dy * state;
        } else {
          sum.dC[first + n] += dy * state;
        }
      }
      w.y[i] = y;
      if constexpr (Cv) add_lane_sums<T>(g.dC + (p.b * length + t) * d_state + first, product, int(count));
    }
  }

  // Back through one chunk and tile: dh is the gradient to the state, first after, then before the step.
  template <bool Bv, bool Cv>
  void backward_states(const Place& p, int64_t first, int64_t count, const Gradients& g, const Sums& sum, V* dh,
                       Work& w) const {
    const V* A_tile = &finite[p.block * d_state + first];
    V *dA = sum.dA + first, *product = w.products.data();
    for (int64_t i = p.steps - 1; i >= 0; --i) {
      const int64_t t = p.start + i;
      const auto Bt = coefficients<Bv>(B, B_block, p.source, t, p.block * d_state) + first;
      const auto Ct = coefficients<Cv>(C, C_block, p.source, t, p.block * d_state) + first;
      const V *a = &w.a[i * count], *before = &w.h[i * count];
      const V u = w.in.u[i], dy = w.dy[i], dt_i = w.in.dt[i];
      V du = w.du[i], ddt = w.ddt[i];
      for (int64_t n = 0; n < count; ++n) {
        V gradient = dh[n] + dy * Ct[n];
        du += gradient * Bt[n];
        if constexpr (Bv) {
          product[n] = gradient * u;
        } else {
          sum.dB[first + n] += gradient * u;
        }
        gradient *= a[n];
        dh[n] = gradient;
        const V exponent = gradient * before[n];  // the gradient to dt A
        ddt += exponent * A_tile[n];
        dA[n] += exponent * dt_i;
      }
      w.du[i] = du, w.ddt[i] = ddt;
      if (is_reset(p.source, t)) std::fill(dh, dh + count, V{});
      if constexpr (Bv) add_lane_sums<T>(g.dB + (p.b * length + t) * d_state + first, product, int(count));
    }
  }
};

}  // namespace ssmlens
