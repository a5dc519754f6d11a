// h_t = a_t h_{t-1} + u_t, entry by entry.   a, u, h (batch, length, inner)   h0 (batch, inner)   reset (batch, length)
//
// Memory is what limits it, so a unit of work is a strip of several vectors: whole cache lines, in the order of memory.
#pragma once
#include <algorithm>
#include "rows.h"

namespace ssmlens {

template <class T> struct LinearScan {
  static constexpr int width = Simd<T>::width;
  static constexpr int64_t strip = 8 * width;
  using V = Vec<T>;

  int64_t batch, length, inner;
  Rows<const T> a;
  const T* h0;  // may be null
  Rows<const bool> reset;

  // work(b, first entry, number of entries) for every strip of `sequences` sequences.
  template <class Parallel, class Work>
  void for_each_strip(int64_t sequences, const Parallel& parallel, const Work& work) const {
    const int64_t strips = (inner + strip - 1) / strip;
    parallel(sequences * strips, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t from = unit % strips * strip;
        work(unit / strips, from, std::min(strip, inner - from));
      }
    });
  }
  // work(first entry, lanes, index) for every vector of a strip.
  template <class Work> INLINE void for_each_vector(int64_t entries, const Work& work) {
    for (int64_t i = 0; i < entries; i += width) work(i, int(std::min<int64_t>(width, entries - i)), i / width);
  }

  // h (batch, length, inner) contiguous.
  template <class Parallel> void forward(Rows<const T> u, T* h, const Parallel& parallel) const {
    for_each_strip(batch, parallel, [&](int64_t b, int64_t from, int64_t entries) {
      V state[strip / width] = {};
      if (h0)
        for_each_vector(entries, [&](int64_t i, int m, int64_t k) { state[k] = load<T>(h0 + b * inner + from + i, m); });
      for (int64_t t = 0; t < length; ++t) {
        if (reset && *reset.at(b, t)) std::fill(state, state + strip / width, V{});
        const T *at = a.at(b, t) + from, *ut = u.at(b, t) + from;
        T* to = h + (b * length + t) * inner + from;
        for_each_vector(entries, [&](int64_t i, int m, int64_t k) {
          state[k] = load<T>(at + i, m) * state[k] + load<T>(ut + i, m);
          store<T>(to + i, state[k], m);
        });
      }
    });
  }

  // h: what forward returned. dh, da, du (sequences, length, inner); dh0 (sequences, inner), may be null. `sequences` may be
  // a multiple of batch: several gradients, one after another, through the same sequences.
  // du_t = dh_t + a_{t+1} du_{t+1}, da_t = du_t h_{t-1}; at a reset h_{t-1} and a_t du_t are 0.
  template <class Parallel>
  void backward(int64_t sequences, Rows<const T> dh, const T* h, T* da, T* du, T* dh0, const Parallel& parallel) const {
    for_each_strip(sequences, parallel, [&](int64_t b, int64_t from, int64_t entries) {
      const int64_t source = b % batch;
      V carried[strip / width] = {};
      for (int64_t t = length - 1; t >= 0; --t) {
        const bool emptied = reset && *reset.at(source, t);
        const T *at = a.at(source, t) + from, *dht = dh.at(b, t) + from;
        const T* before = t > 0 ? h + (source * length + t - 1) * inner + from : h0 ? h0 + source * inner + from : nullptr;
        if (emptied) before = nullptr;
        const int64_t offset = (b * length + t) * inner + from;
        for_each_vector(entries, [&](int64_t i, int m, int64_t k) {
          const V gradient = carried[k] + load<T>(dht + i, m);
          store<T>(du + offset + i, gradient, m);
          store<T>(da + offset + i, before ? gradient * load<T>(before + i, m) : V{}, m);
          carried[k] = emptied ? V{} : gradient * load<T>(at + i, m);
        });
      }
      if (dh0)
        for_each_vector(entries, [&](int64_t i, int m, int64_t k) { store<T>(dh0 + b * inner + from + i, carried[k], m); });
    });
  }
};

}  // namespace ssmlens
