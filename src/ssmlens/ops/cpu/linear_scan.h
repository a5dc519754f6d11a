// h_t = a_t h_{t-1} + u_t, entry by entry, real or complex.
// a, u, h (batch, length, inner)   h0 (batch, inner)   reset (batch, length)
//
// Memory is what limits it: a strip of several vectors goes through time side by side, chunk by chunk, so that memory is read
// in its own order. The forward pass can save the state at the start of every chunk; the backward pass computes the others
// again, since h itself may have been rounded to half precision.
#pragma once
#include "rows.h"

namespace ssmlens {

template <class T, bool is_complex = false> struct LinearScan {
  static constexpr int width = Simd<T>::width;
  static constexpr int64_t chunk = 32;  // steps between saved states
  static constexpr int64_t parts = is_complex ? 2 : 1;
  using N = Number<Vec<T>, is_complex>;  // a vector of numbers
  using K = Number<T, is_complex>;

  int64_t batch, length, inner;
  Rows a, u, reset;  // reset may be absent
  const K* h0;       // may be null

  int64_t chunks() const { return (length + chunk - 1) / chunk; }
  int64_t blocks() const { return (inner + width - 1) / width; }
  bool is_reset(int64_t b, int64_t t) const { return reset && *reset.at(b, t); }

  struct Strip {  // vectors first .. first + count of one sequence
    int64_t b, first, count, inner;
    int64_t from() const { return first * width; }
    int64_t entries() const { return std::min(inner, (first + count) * width) - from(); }
    int lanes(int64_t k) const { return int(std::min<int64_t>(width, inner - (first + k) * width)); }
    N load_from(const K* matrix, int64_t row, int64_t k) const {
      return matrix ? load_numbers<T>(matrix + row * inner + from() + k * width, lanes(k)) : N{};
    }
    void store_to(K* matrix, int64_t row, int64_t k, const N& v) const {
      if (matrix) store_numbers<T>(matrix + row * inner + from() + k * width, v, lanes(k));
    }
  };

  // h (batch, length, inner); final_state (batch, inner); saved (batch, chunks, inner), or null.
  template <class Parallel> NOINLINE void forward(const OutRows& h, K* final_state, K* saved, const Parallel& parallel) const {
    for_strips(batch, blocks(), parallel, [&](int64_t b, int64_t first, int64_t count) {
      const Strip s{b, first, count, inner};
      N state[together], as[together * chunk], hs[together * chunk];
      for (int64_t k = 0; k < count; ++k) state[k] = s.load_from(h0, b, k);
      for (int64_t c = 0; c < chunks(); ++c) {
        const int64_t start = c * chunk, steps = std::min(chunk, length - start);
        read_rows<T>(a, b, start, steps, s.from(), s.entries(), chunk, as);
        read_rows<T>(u, b, start, steps, s.from(), s.entries(), chunk, hs);
        const int64_t then = start + steps;
        Ahead ahead(std::min(chunk, length - then), s.from() * parts, (s.from() + s.entries()) * parts);
        ahead.add<T>(a, b, then), ahead.add<T>(u, b, then), ahead.add<T>(h, b, then);
        for (int64_t k = 0; k < count; ++k) {
          s.store_to(saved, b * chunks() + c, k, state[k]);
          for (int64_t i = 0; i < steps; ++i) {
            if (is_reset(b, start + i)) state[k] = N{};
            ahead.next();
            hs[k * chunk + i] = state[k] = product(as[k * chunk + i], state[k]) + hs[k * chunk + i];
          }
        }
        write_rows<T>(h, b, start, steps, s.from(), s.entries(), chunk, hs);
      }
      for (int64_t k = 0; k < count; ++k) s.store_to(final_state, b, k, state[k]);
    });
  }

  // dh, da, du (sequences, length, inner); dfinal, dh0 (sequences, inner), may be null. `sequences` may be a multiple of
  // batch: several gradients, one after another, through the same sequences.
  // du_t = dh_t + conj(a_{t+1}) du_{t+1}, da_t = du_t conj(h_{t-1}); at a reset h_{t-1} and a_t du_t are 0.
  struct Gradients {
    int64_t sequences;
    Rows dh;
    const K *dfinal, *saved;
    OutRows da, du;
    K* dh0;
  };
  template <class Parallel> NOINLINE void backward(const Gradients& g, const Parallel& parallel) const {
    for_strips(g.sequences, blocks(), parallel, [&](int64_t b, int64_t first, int64_t count) {
      const int64_t source = b % batch;
      const Strip s{b, first, count, inner};
      N carried[together], as[together * chunk], before[together * chunk], dus[together * chunk];
      for (int64_t k = 0; k < count; ++k) carried[k] = s.load_from(g.dfinal, b, k);
      for (int64_t c = chunks() - 1; c >= 0; --c) {
        const int64_t start = c * chunk, steps = std::min(chunk, length - start);
        read_rows<T>(a, source, start, steps, s.from(), s.entries(), chunk, as);
        read_rows<T>(u, source, start, steps, s.from(), s.entries(), chunk, before);
        read_rows<T>(g.dh, b, start, steps, s.from(), s.entries(), chunk, dus);
        Ahead ahead(c > 0 ? chunk : 0, s.from() * parts, (s.from() + s.entries()) * parts);
        ahead.add<T>(a, source, start - chunk), ahead.add<T>(u, source, start - chunk), ahead.add<T>(g.dh, b, start - chunk);
        ahead.add<T>(g.da, b, start - chunk), ahead.add<T>(g.du, b, start - chunk);
        for (int64_t k = 0; k < count; ++k) {
          N state = s.load_from(g.saved, source * chunks() + c, k);
          for (int64_t i = k * chunk; i < k * chunk + steps; ++i) {
            if (is_reset(source, start + i - k * chunk)) state = N{}, as[i] = N{};
            const N after = product(as[i], state) + before[i];
            before[i] = state, state = after;
          }
          for (int64_t i = k * chunk + steps - 1; i >= k * chunk; --i) {
            ahead.next();
            add(dus[i], carried[k]);
            carried[k] = product_conjugate(dus[i], as[i]);
            as[i] = product_conjugate(dus[i], before[i]);
          }
        }
        write_rows<T>(g.du, b, start, steps, s.from(), s.entries(), chunk, dus);
        write_rows<T>(g.da, b, start, steps, s.from(), s.entries(), chunk, as);
      }
      for (int64_t k = 0; k < count; ++k) s.store_to(g.dh0, b, k, carried[k]);
    });
  }
};

}  // namespace ssmlens
