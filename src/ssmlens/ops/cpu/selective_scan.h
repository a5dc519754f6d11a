// The selective scan with a diagonal A, real or complex, per sequence b, inner channel d and state channel n:
//   dt = softplus(dt_raw + dt_bias)    a = exp(dt A)    h_t = a_t h_{t-1} + dt_t B_t x_t    y = (Re sum_n C h + D x) silu(z)
//
// x, dt, z, y (batch, length, d)   A (d, n)   B, C (batch, length, n) or (d, n)   h (batch, d, n)   reset (batch, length)
// A and h are complex together; B and C may then be complex or real. The other tensors are real.
//
// A block is one vector of inner channels, a strip some blocks that go through time side by side (their rows are neighbours
// in memory), a chunk some steps, a tile some state channels, so few that their states stay in registers for a whole chunk.
// Pinned state channels (A = 0: a = 1, A = -inf: a = 0) cost no exponential: a tile that holds one takes its transitions from
// a loop of their own; in any other tile the exponentials are computed where they are used, which is faster.
// The forward pass can save the state at the start of every chunk; the backward pass computes the rest again from there.
#pragma once

#include "rows.h"

namespace ssmlens {

template <class T, bool is_complex> struct SelectiveScan {
  static constexpr int width = Simd<T>::width;
  static constexpr int parts = is_complex ? 2 : 1;
  static constexpr int tile = 8 / parts;
  using V = Vec<T>;
  using N = Number<V, is_complex>;  // of the inner channels of a block
  using K = Number<T, is_complex>;  // of one inner channel, or of all alike
  using Element = T;
  using Exponent = Rate<V, is_complex>;

  // B or C
  struct Coefficients {
    bool varies = false;            // (batch, length, n): `rows`; else (d, n): `fixed`
    bool rows_are_complex = false;
    Rows rows;
    const K* fixed = nullptr;
    Scratch<N> of_block;            // fixed, as a vector per block and state channel
  };

  int64_t batch, length, d_inner, d_state;
  bool dt_softplus;
  Rows x, dt, z, reset;  // z and reset may be absent
  Coefficients B, C;
  const K *A, *h0;       // h0 may be null
  const T *D, *dt_bias;  // may be null
  int64_t chunk;         // steps between saved states; the caller chooses

  int64_t chunks, blocks, most_steps;  // most_steps: of a chunk
  // Per block and state channel.
  enum Kind : uint8_t { general, one, zero, mixed };
  std::vector<Kind> kind;
  Scratch<Exponent> rate;
  Scratch<N> finite;             // A, and 0 where it is -inf
  Scratch<V> live;               // 0 where A is -inf, else 1
  std::vector<bool> tile_pinned;  // whether there is a pinned one among the `tile` from here on

  int lanes(int64_t block) const { return int(std::min<int64_t>(width, d_inner - block * width)); }

  // Lane i of vector n holds element (d, n) of a (d, n) matrix.
  NOINLINE void gather(const K* matrix, int64_t block, N* to) const {
    for (int64_t n = 0; n < d_state; ++n) {
      to[n] = N{};
      for (int i = 0; i < lanes(block); ++i) set_lane(to[n], i, matrix[(block * width + i) * d_state + n]);
    }
  }
  NOINLINE void scatter(const N* from, int64_t block, K* matrix) const {
    for (int64_t n = 0; n < d_state; ++n)
      for (int i = 0; i < lanes(block); ++i) get_lane(from[n], i, matrix[(block * width + i) * d_state + n]);
  }

  NOINLINE void prepare() {
    chunks = (length + chunk - 1) / chunk;
    blocks = (d_inner + width - 1) / width;
    most_steps = std::min(chunk, length);
    const int64_t size = blocks * d_state;
    rate.resize(size), finite.resize(size), live.resize(size), kind.resize(size), tile_pinned.resize(size);
    for (Coefficients* m : {&B, &C}) {
      if (m->varies) continue;
      m->of_block.resize(size);
      for (int64_t block = 0; block < blocks; ++block) gather(m->fixed, block, &m->of_block[block * d_state]);
    }
    for (int64_t k = 0; k < size; ++k) {
      const int64_t block = k / d_state;
      int ones = 0, zeros = 0;
      for (int i = 0; i < width; ++i) {
        const int64_t d = block * width + (i < lanes(block) ? i : 0);
        const K a = A[d * d_state + k % d_state];
        const bool is_zero = real_part(a) == -std::numeric_limits<T>::infinity();
        ones += real_part(a) == T(0) && imaginary_part(a) == T(0), zeros += is_zero;
        set_rate<T>(rate[k], i, is_zero ? K{} : a);
        set_lane(finite[k], i, is_zero ? K{} : a);
        live[k][i] = is_zero ? T(0) : T(1);
      }
      kind[k] = ones == width ? one : zeros == width ? zero : zeros ? mixed : general;
      if (kind[k] != general)
        for (int64_t j = std::max(block * d_state, k - tile + 1); j <= k; ++j) tile_pinned[j] = true;
    }
  }

  // ---------------------------------------------------------------- one chunk of one block
  struct Inputs {
    Scratch<V> x, dt, dt_slope, u;  // dt_slope: the derivative of dt by what it was before softplus
    explicit Inputs(int64_t steps) : x(steps), dt(steps), dt_slope(steps), u(steps) {}
  };
  NOINLINE void read_inputs(int64_t b, int64_t block, int64_t start, int64_t steps, Inputs& in) const {
    read(x, b, block, start, steps, in.x);
    read(dt, b, block, start, steps, in.dt);
    const V bias = of_block(dt_bias, block);
    for (int64_t i = 0; i < steps; ++i) {
      const V raw = in.dt[i] + bias;
      in.dt[i] = dt_softplus ? softplus<T>(raw, in.dt_slope[i]) : raw;
      in.u[i] = in.dt[i] * in.x[i];
    }
  }
  void read(const Rows& rows, int64_t b, int64_t block, int64_t start, int64_t steps, Scratch<V>& to) const {
    read_rows<T>(rows, b, start, steps, block * width, lanes(block), 0, to.data());
  }
  void write(const OutRows& rows, int64_t b, int64_t block, int64_t start, int64_t steps, const Scratch<V>& from) const {
    write_rows<T>(rows, b, start, steps, block * width, lanes(block), 0, from.data());
  }
  V of_block(const T* vector, int64_t block) const {
    return vector ? load<T>(vector + block * width, lanes(block)) : V{};
  }
  bool is_reset(int64_t b, int64_t t) const { return reset && *reset.at(b, t); }

  // B or C of a chunk, row i at data + i * stride: of numbers for all inner channels alike (E = K) if both vary, else of vectors.
  template <class E> struct Steps {
    const E* data = nullptr;
    int64_t stride = 0;
  };
  template <bool alike> using Row = Steps<std::conditional_t<alike, K, N>>;
  struct Converted {  // scratch
    Scratch<K> numbers;
    Scratch<N> vectors;
  };
  NOINLINE Steps<K> number_rows(const Coefficients& m, int64_t b, int64_t start, int64_t steps, Scratch<K>& converted) const {
    if (m.rows.format == Format::full && m.rows_are_complex == is_complex)
      return {reinterpret_cast<const K*>(m.rows.at(b, start)), m.rows.time_stride / int64_t(sizeof(K))};
    converted.resize(size_t(most_steps * d_state));
    read_reals<T>(m.rows, b, start, steps, d_state, converted.data());
    return {converted.data(), d_state};
  }
  template <bool alike>
  NOINLINE Row<alike> chunk_rows(const Coefficients& m, int64_t b, int64_t start, int64_t steps, Converted& converted) const {
    if (!m.varies) return {};
    const Steps<K> numbers = number_rows(m, b, start, steps, converted.numbers);
    if constexpr (alike) {
      return numbers;
    } else {
      converted.vectors.resize(size_t(most_steps * d_state));
      for (int64_t i = 0; i < steps; ++i)
        for (int64_t n = 0; n < d_state; ++n)
          converted.vectors[i * d_state + n] = scaled(splat<T>(T(1)), numbers.data[i * numbers.stride + n]);
      return {converted.vectors.data(), d_state};
    }
  }
  template <bool alike> Row<alike> of_tile(const Coefficients& m, const Row<alike>& rows, int64_t first, int64_t at) const {
    if constexpr (alike) {
      return {rows.data + first, rows.stride};
    } else {
      return m.varies ? Row<alike>{rows.data + first, rows.stride} : Row<alike>{&m.of_block[at], 0};
    }
  }

  struct Place {  // `steps` steps of sequence b from `start` on, one block
    int64_t b, block, start, steps;
  };
  template <bool alike> struct Tile {
    int64_t first, at;  // its first state channel, in itself and among all blocks'
    Row<alike> B, C;
  };
  // work(Int<count>, tile, fused) for every tile of a block: whole tiles, then single state channels. Unless `fused`, the
  // transitions are in a[i * count + n].
  template <bool alike, int count = tile, class F>
  void for_tiles(const Place& p, int64_t first, const Row<alike>& B_rows, const Row<alike>& C_rows, const Inputs& in, N* a,
                 const F& work) const {
    for (; first + count <= d_state; first += count) {
      const int64_t at = p.block * d_state + first;
      const Tile<alike> t{first, at, of_tile<alike>(B, B_rows, first, at), of_tile<alike>(C, C_rows, first, at)};
      if constexpr (count == tile && alike) {
        if (!tile_pinned[at]) {
          work(Int<count>{}, t, std::true_type{});
          continue;
        }
      }
      transitions(in.dt.data(), p.steps, at, count, a);
      work(Int<count>{}, t, std::false_type{});
    }
    if constexpr (count > 1) for_tiles<alike, 1>(p, first, B_rows, C_rows, in, a, work);
  }
  NOINLINE void transitions(const V* dt_steps, int64_t steps, int64_t at, int64_t count, N* a) const {
    for (int64_t n = 0; n < count; ++n) {
      const Exponent& r = rate[at + n];
      const V alive = live[at + n];
      switch (kind[at + n]) {
        case one:
          for (int64_t i = 0; i < steps; ++i) a[i * count + n] = number_one<T, N>();
          break;
        case zero:
          for (int64_t i = 0; i < steps; ++i) a[i * count + n] = N{};
          break;
        case general:
          for (int64_t i = 0; i < steps; ++i) a[i * count + n] = exp_of_product<T>(dt_steps[i], r);
          break;
        case mixed:
          for (int64_t i = 0; i < steps; ++i) a[i * count + n] = only_where<T>(alive, exp_of_product<T>(dt_steps[i], r));
      }
    }
  }

  // ---------------------------------------------------------------- forward
  // y (batch, length, d); final_state (batch, d, n); saved (batch, blocks, chunks, n) vectors, or null.
  struct Output {
    OutRows y;
    K* final_state;
    N* saved;
  };
  template <class Parallel> NOINLINE void forward(const Output& out, const Parallel& parallel) const {
    for_strips(batch, blocks, parallel, [&](int64_t b, int64_t first, int64_t count) {
      Forward work(*this);
      if (B.varies && C.varies) {
        forward_strip<true>(b, first, count, out, work);
      } else {
        forward_strip<false>(b, first, count, out, work);
      }
    });
  }

  struct Forward {
    Inputs in;
    Scratch<V> y, z;
    Scratch<N> a, h;
    Converted B, C;
    explicit Forward(const SelectiveScan& s)
        : in(s.most_steps), y(s.most_steps), z(s.most_steps), a(s.most_steps * tile), h(together * s.d_state) {}
  };
  template <bool alike>
  NOINLINE void forward_strip(int64_t b, int64_t first, int64_t count, const Output& out, Forward& w) const {
    const int64_t matrix = b * d_inner * d_state;
    std::fill(w.h.begin(), w.h.end(), N{});
    if (h0)
      for (int64_t k = 0; k < count; ++k) gather(h0 + matrix, first + k, &w.h[k * d_state]);
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t start = c * chunk, steps = std::min(chunk, length - start), then = start + steps;
      const Row<alike> B_rows= chunk_rows<alike>(B, b, start, steps, w.B), C_rows = chunk_rows<alike>(C, b, start, steps, w.C);
      Ahead ahead(std::min(chunk, length - then), first * width, std::min(d_inner, (first + count) * width));
      ahead.add<T>(x, b, then), ahead.add<T>(dt, b, then), ahead.add<T>(z, b, then), ahead.add<T>(out.y, b, then);
      for (int64_t k = 0; k < count; ++k) {
        const Place p{b, first + k, start, steps};
        N* h = &w.h[k * d_state];
        if (out.saved) std::copy(h, h + d_state, out.saved + ((b * blocks + p.block) * chunks + c) * d_state);
        read_inputs(b, p.block, start, steps, w.in);
        const V skip = of_block(D, p.block);
        for (int64_t i = 0; i < steps; ++i) w.y[i] = skip * w.in.x[i];
        for_tiles<alike>(p, 0, B_rows, C_rows, w.in, w.a.data(), [&](auto size, const Tile<alike>& t, auto fused) {
          forward_tile<size, fused>(p, t, w.in, w.a.data(), h + t.first, w.y.data(), ahead);
        });
        gate(p, w);
        write(out.y, b, p.block, start, steps, w.y);
      }
    }
    for (int64_t k = 0; k < count; ++k) scatter(&w.h[k * d_state], first + k, out.final_state + matrix);
  }

  template <int count, bool fused, bool alike>
  NOINLINE void forward_tile(const Place& p, const Tile<alike>& t, const Inputs& in, const N* a, N* h, V* y, Ahead& ahead) const {
    const Exponent* rates = &rate[t.at];
    N state[count];
    unrolled<count>([&](int n) ALWAYS { state[n] = h[n]; });
    for (int64_t i = 0; i < p.steps; ++i) {
      const auto *Bi = t.B.data + i * t.B.stride;
      const auto *Ci = t.C.data + i * t.C.stride;
      if (is_reset(p.b, p.start + i)) unrolled<count>([&](int n) ALWAYS { state[n] = N{}; });
      if (t.first == 0) ahead.next();
      const V u = in.u[i], dt_i = in.dt[i];
      V sum = y[i];
      unrolled<count>([&](int n) ALWAYS {
        N transition;
        if constexpr (fused) {
          transition = exp_of_product<T>(dt_i, rates[n]);
        } else {
          transition = a[i * count + n];
        }
        state[n] = product(transition, state[n]) + scaled(u, Bi[n]);
        sum = add_product(sum, state[n], Ci[n]);
      });
      y[i] = sum;
    }
    unrolled<count>([&](int n) ALWAYS { h[n] = state[n]; });
  }

  NOINLINE void gate(const Place& p, Forward& w) const {
    if (!z) return;
    read(z, p.b, p.block, p.start, p.steps, w.z);
    for (int64_t i = 0; i < p.steps; ++i) w.y[i] *= w.z[i] * sigmoid<T>(w.z[i]);
  }

  // ---------------------------------------------------------------- backward
  // dy, dx, ddt, dz (g.batch, length, d); dfinal, dh0 (g.batch, d, n), may be null; dA (samples, d, n); dD, ddt_bias
  // (samples, d), may be null; dB, dC as B and C: (g.batch, length, n), or (samples, d, n).
  // g.batch may be a multiple of batch: several gradients, one after another, through the same sequences. A sample is
  // g.batch / samples sequences whose parameter gradients are added up.
  struct CoefficientGradient {
    OutRows rows;
    bool rows_are_complex;
    K* fixed;
  };
  struct Gradients {
    int64_t batch, samples;
    Rows dy;
    const N* saved;
    const K* dfinal;
    OutRows dx, ddt, dz;
    CoefficientGradient dB, dC;
    K* dA;
    T *dD, *ddt_bias;
    K* dh0;
  };

  // What is added up over time and the sequences of a slab, per block: n numbers each for dA, fixed dB and fixed dC, and one
  // vector each for dD and ddt_bias.
  struct Sums {
    N *dA, *dB, *dC;
    V *dD, *ddt_bias;
  };
  int64_t matrices() const { return 1 + !B.varies + !C.varies; }
  struct AllSums {  // of `count` blocks, one after another
    int64_t matrices, d_state;
    Scratch<N> numbers;
    Scratch<V> vectors;
    AllSums(const SelectiveScan& s, int64_t count)
        : matrices(s.matrices()), d_state(s.d_state), numbers(count * matrices * d_state), vectors(2 * count) {}
    Sums at(int64_t k) {
      N* from = &numbers[k * matrices * d_state];
      return {from, from + d_state, from + (matrices - 1) * d_state, &vectors[2 * k], &vectors[2 * k + 1]};
    }
  };

  // The plan of the work, which depends on the shape alone, never on the number of threads, so that every sum has one order.
  // A unit is a slab of sequences times a group of blocks. dB and dC sum over blocks: every group adds up its own, for a
  // segment of time, so that these copies stay small; they are added up before the next segment begins.
  struct Plan {
    int64_t per_sample, slabs, groups, row, segment;  // numbers in a row of a copy; chunks in a segment
    int64_t group_of(int64_t block, int64_t blocks) const { return ((block + 1) * groups - 1) / blocks; }
  };
  Plan plan(const Gradients& g) const {
    constexpr int64_t units = 16, copies = 1 << 18;
    Plan s;
    s.per_sample = g.batch / g.samples;
    s.slabs = std::min<int64_t>(s.per_sample, 32);
    s.groups = std::min(blocks, (units - 1 + g.samples * s.slabs) / (g.samples * s.slabs));
    s.row = (3 - matrices()) * d_state * parts;
    s.segment = std::min(chunks, std::max<int64_t>(1, copies / std::max<int64_t>(1, s.groups * g.batch * s.row * chunk)));
    return s;
  }
  struct Segment {
    const Plan& plan;
    int64_t first, last;  // chunks
    T* copies;            // (groups, batch, steps, row)
    int64_t steps;
    T* row(const Gradients& g, int64_t group, int64_t b, int64_t step) const {
      return copies + ((group * g.batch + b) * steps + step) * plan.row;
    }
  };

  template <class Parallel> NOINLINE void backward(const Gradients& g, const Parallel& parallel) const {
    const Plan s = plan(g);
    const int64_t slabs = g.samples * s.slabs;
    Scratch<T> copies(s.groups * g.batch * std::min(length, s.segment * chunk) * s.row);
    Scratch<N> dh(g.batch * blocks * d_state);
    AllSums sums(*this, slabs * blocks);
    for (int64_t last = chunks; last > 0; last -= s.segment) {
      const int64_t first = std::max<int64_t>(0, last - s.segment);
      const Segment segment{s, first, last, copies.data(), std::min(length, last * chunk) - first * chunk};
      parallel(slabs * s.groups, [&](int64_t begin, int64_t end) {
        Backward work(*this);
        while (begin < end) {
          const int64_t slab = begin / s.groups, group = begin % s.groups, groups = std::min(s.groups - group, end - begin);
          const int64_t sample = slab / s.slabs, part = slab % s.slabs;
          const int64_t to = (group + groups) * blocks / s.groups;
          for (int64_t i = part * s.per_sample / s.slabs; i < (part + 1) * s.per_sample / s.slabs; ++i) {
            const int64_t b = sample * s.per_sample + i;
            for (int64_t k = group; s.row && k < group + groups; ++k)
              std::fill(segment.row(g, k, b, 0), segment.row(g, k, b, segment.steps), T(0));
            for (int64_t block = group * blocks / s.groups; block < to; block += together) {
              const int64_t count = std::min(together, to - block);
              if (B.varies && C.varies) {
                backward_strip<true>(b, block, count, g, segment, &dh[b * blocks * d_state], sums, slab * blocks, work);
              } else {
                backward_strip<false>(b, block, count, g, segment, &dh[b * blocks * d_state], sums, slab * blocks, work);
              }
            }
          }
          begin += groups;
        }
      });
      if (s.row)
        parallel(g.batch * segment.steps, [&](int64_t begin, int64_t end) {
          for (int64_t k = begin; k < end; ++k) add_copies(k / segment.steps, k % segment.steps, g, segment);
        });
    }
    parallel(g.samples * blocks, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const int64_t first = k / blocks * s.slabs * blocks + k % blocks;
        const Sums total = sums.at(first);
        for (int64_t slab = 1; slab < s.slabs; ++slab) {
          const Sums more = sums.at(first + slab * blocks);
          for (int64_t n = 0; n < matrices() * d_state; ++n) add(total.dA[n], more.dA[n]);
          *total.dD += *more.dD, *total.ddt_bias += *more.ddt_bias;
        }
        finish_block(k / blocks, k % blocks, g, total);
      }
    });
    if (g.dh0)
      parallel(g.batch * blocks, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) scatter(&dh[k * d_state], k % blocks, g.dh0 + k / blocks * d_inner * d_state);
      });
  }
  NOINLINE void finish_block(int64_t sample, int64_t block, const Gradients& g, const Sums& total) const {
    const int64_t matrix = sample * d_inner * d_state, vector = sample * d_inner + block * width;
    scatter(total.dA, block, g.dA + matrix);
    if (!B.varies) scatter(total.dB, block, g.dB.fixed + matrix);
    if (!C.varies) scatter(total.dC, block, g.dC.fixed + matrix);
    if (g.dD) store<T>(g.dD + vector, *total.dD, lanes(block));
    if (g.ddt_bias) store<T>(g.ddt_bias + vector, *total.ddt_bias, lanes(block));
  }
  NOINLINE void add_copies(int64_t b, int64_t step, const Gradients& g, const Segment& s) const {
    T* total = s.row(g, 0, b, step);
    for (int64_t group = 1; group < s.plan.groups; ++group) {
      const T* more = s.row(g, group, b, step);
      for (int64_t k = 0; k < s.plan.row; ++k) total[k] += more[k];
    }
    const K* numbers = reinterpret_cast<const K*>(total);
    const int64_t t = s.first * chunk + step;
    if (B.varies) write_numbers<T>(g.dB.rows, g.dB.rows_are_complex, b, t, d_state, numbers);
    if (C.varies) write_numbers<T>(g.dC.rows, g.dC.rows_are_complex, b, t, d_state, numbers + B.varies * d_state);
  }

  struct Backward {
    Inputs in;
    Scratch<V> y, dy, gate_slope, du, ddt;  // gate_slope: the gradient to z, but for y
    Scratch<N> a, before;                   // before: the states before each step
    Converted B, C;
    explicit Backward(const SelectiveScan& s)
        : in(s.most_steps), y(s.most_steps), dy(s.most_steps), gate_slope(s.most_steps), du(s.most_steps),
          ddt(s.most_steps), a(s.most_steps * tile), before(s.most_steps * tile) {}
  };

  // dh: of sequence b, the gradient to the state after the segment, then before it.
  template <bool alike>
  NOINLINE void backward_strip(int64_t b, int64_t first, int64_t count, const Gradients& g, const Segment& segment, N* dh,
                      AllSums& all_sums, int64_t first_sums, Backward& w) const {
    const int64_t source = b % batch;
    if (segment.last == chunks && g.dfinal)
      for (int64_t block = first; block < first + count; ++block)
        gather(g.dfinal + b * d_inner * d_state, block, dh + block * d_state);
    for (int64_t c = segment.last - 1; c >= segment.first; --c) {
      const int64_t start = c * chunk, steps = std::min(chunk, length - start), then = start - chunk;
      const Row<alike> B_rows= chunk_rows<alike>(B, source, start, steps, w.B), C_rows = chunk_rows<alike>(C, source, start, steps, w.C);
      Ahead ahead(c > 0 ? chunk : 0, first * width, std::min(d_inner, (first + count) * width));
      ahead.add<T>(x, source, then), ahead.add<T>(dt, source, then), ahead.add<T>(z, source, then);
      ahead.add<T>(g.dy, b, then), ahead.add<T>(g.dx, b, then), ahead.add<T>(g.ddt, b, then), ahead.add<T>(g.dz, b, then);
      for (int64_t block = first; block < first + count; ++block) {
        const Place p{source, block, start, steps};
        const Sums sums = all_sums.at(first_sums + block);
        T* row = segment.row(g, segment.plan.group_of(block, blocks), b, start - segment.first * chunk);
        const N* saved = g.saved + ((source * blocks + block) * chunks + c) * d_state;
        begin_chunk(p, b, g, w);
        for_tiles<alike>(p, 0, B_rows, C_rows, w.in, w.a.data(), [&](auto size, const Tile<alike>& t, auto fused) {
          T* dB = row + t.first * parts;
          recompute_tile<size, fused>(p, t, saved + t.first, dB + B.varies * d_state * parts, sums, w, ahead);
          backward_tile<size>(p, t, dh + block * d_state + t.first, dB, sums, w);
        });
        finish_chunk(p, b, g, sums, w);
      }
    }
  }

  NOINLINE void begin_chunk(const Place& p, int64_t b, const Gradients& g, Backward& w) const {
    read_inputs(p.b, p.block, p.start, p.steps, w.in);
    read(g.dy, b, p.block, p.start, p.steps, w.dy);
    if (z) read(z, p.b, p.block, p.start, p.steps, w.gate_slope);
    const V skip = of_block(D, p.block);
    for (int64_t i = 0; i < p.steps; ++i) {
      if (z) {
        const V gate = w.gate_slope[i], s = sigmoid<T>(gate);
        w.gate_slope[i] = w.dy[i] * s * (T(1) + gate * (T(1) - s));
        w.dy[i] *= gate * s;
      }
      w.y[i] = skip * w.in.x[i];
      w.du[i] = V{}, w.ddt[i] = V{};
    }
  }

  NOINLINE void finish_chunk(const Place& p, int64_t b, const Gradients& g, const Sums& sums, Backward& w) const {
    const V skip = of_block(D, p.block);
    V dD{}, ddt_bias{};  // of this chunk alone: shorter sums, smaller rounding errors
    for (int64_t i = 0; i < p.steps; ++i) {
      V ddt = w.ddt[i] + w.du[i] * w.in.x[i];
      if (dt_softplus) ddt *= w.in.dt_slope[i];
      w.ddt[i] = ddt;
      dD += w.dy[i] * w.in.x[i], ddt_bias += ddt;
      w.du[i] = w.du[i] * w.in.dt[i] + skip * w.dy[i];
      w.gate_slope[i] *= w.y[i];
    }
    *sums.dD += dD, *sums.ddt_bias += ddt_bias;
    write(g.dx, b, p.block, p.start, p.steps, w.du);
    write(g.ddt, b, p.block, p.start, p.steps, w.ddt);
    if (z) write(g.dz, b, p.block, p.start, p.steps, w.gate_slope);
  }

  // The gradient of one step to B or C: over the block's inner channels if it varies in time, else over time.
  template <int count> INLINE void add_up(T* of_step, bool varies, const N* gradient, N* sums) {
    if (varies) {
      V lanes[count * parts];
      unrolled<count>([&](int n) ALWAYS { set_parts<V>(lanes + n * parts, gradient[n]); });
      add_lane_sums<count * parts, T>(of_step, lanes);
    } else {
      unrolled<count>([&](int n) ALWAYS { add(sums[n], gradient[n]); });
    }
  }

  // Forward through one chunk and tile: the transitions and states again, y, and the gradient to C.
  template <int count, bool fused, bool alike>
  NOINLINE void recompute_tile(const Place& p, const Tile<alike>& t, const N* saved, T* dC, const Sums& sums, Backward& w,
                               Ahead& ahead) const {
    const Exponent* rates = &rate[t.at];
    const int64_t row = (3 - matrices()) * d_state * parts;
    N state[count], dC_sum[count] = {};
    unrolled<count>([&](int n) ALWAYS { state[n] = saved[n]; });
    N *a = w.a.data(), *before = w.before.data();
    for (int64_t i = 0; i < p.steps; ++i, a += count, before += count, dC += row) {
      const auto *Bi = t.B.data + i * t.B.stride;
      const auto *Ci = t.C.data + i * t.C.stride;
      const bool emptied = is_reset(p.b, p.start + i);
      if (emptied) unrolled<count>([&](int n) ALWAYS { state[n] = N{}; });
      if (t.first == 0) ahead.next();
      const V u = w.in.u[i], dt_i = w.in.dt[i], dy = w.dy[i];
      V y = w.y[i];
      N gradient[count];
      unrolled<count>([&](int n) ALWAYS {
        if constexpr (fused) a[n] = exp_of_product<T>(dt_i, rates[n]);
        before[n] = state[n];
        state[n] = product(a[n], state[n]) + scaled(u, Bi[n]);
        y = add_product(y, state[n], Ci[n]);
        gradient[n] = scaled_conjugate(dy, state[n]);
      });
      w.y[i] = y;
      add_up<count>(dC, C.varies, gradient, dC_sum);
      if (emptied) unrolled<count>([&](int n) ALWAYS { a[n] = N{}; });  // nothing flows back through this step either
    }
    if (!C.varies) unrolled<count>([&](int n) ALWAYS { add(sums.dC[t.first + n], dC_sum[n]); });
  }

  // Back through one chunk and tile: dh is the gradient to the state, first after, then before it.
  template <int count, bool alike>
  NOINLINE void backward_tile(const Place& p, const Tile<alike>& t, N* dh, T* dB, const Sums& sums, Backward& w) const {
    const N* A_tile = &finite[t.at];
    const int64_t row = (3 - matrices()) * d_state * parts;
    N dstate[count], dA[count] = {}, dB_sum[count] = {};
    unrolled<count>([&](int n) ALWAYS { dstate[n] = dh[n]; });
    for (int64_t i = p.steps - 1; i >= 0; --i) {
      const auto *Bi = t.B.data + i * t.B.stride;
      const auto *Ci = t.C.data + i * t.C.stride;
      const N *a = &w.a[i * count], *before = &w.before[i * count];
      const V u = w.in.u[i], dy = w.dy[i], dt_i = w.in.dt[i];
      V du = w.du[i], ddt = w.ddt[i];
      N gradient[count];
      unrolled<count>([&](int n) ALWAYS {
        const N after = dstate[n] + scaled_conjugate(dy, Ci[n]);
        du = add_inner(du, after, Bi[n]);
        gradient[n] = scaled(u, after);
        dstate[n] = product_conjugate(after, a[n]);
        const N exponent = product_conjugate(dstate[n], before[n]);  // the gradient to dt A
        ddt = add_inner(ddt, exponent, A_tile[n]);
        add(dA[n], scaled(dt_i, exponent));
      });
      w.du[i] = du, w.ddt[i] = ddt;
      add_up<count>(dB + i * row, B.varies, gradient, dB_sum);
    }
    unrolled<count>([&](int n) ALWAYS {
      dh[n] = dstate[n];
      add(sums.dA[t.first + n], dA[n]);
    });
    if (!B.varies) unrolled<count>([&](int n) ALWAYS { add(sums.dB[t.first + n], dB_sum[n]); });
  }
};

}  // namespace ssmlens
