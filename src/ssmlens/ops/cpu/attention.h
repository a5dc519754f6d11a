// Linear attention with decay, per sequence and head, in chunks of tokens:
//   H_t = diag(a_t) H_{t-1} + k_t v_tᵀ      y_t = H_tᵀ q_t, or with a bonus (H_{t-1} + diag(bonus) k_t v_tᵀ)ᵀ q_t
// Within a chunk: y = scores v + rows S, and the next chunk's S = diag(keep) S + colsᵀ v, where
//   score_ts = Σ_d q_td k_sd exp(Σ_{r=s+1..t} log_a_rd)   (s < t; r up to t - 1 where there is a bonus; score_tt = q_t k_t or with it)
//   rows_t = q_t times the decay since the chunk's beginning, cols_s = k_s times that until its end, keep that over all of it
//
// q, k (batch, length, groups, d_key)   v, y (batch, length, heads, d_value)   log_a (batch, length, heads, d_key or 1)
// H, S (batch, heads, d_key, d_value)   bonus (batch, heads, d_key)   reset (batch, length)
//
// Decays are never divided by, and sums of log_a never subtracted, so a = 0 and a = 1 are exact and nothing overflows, whatever the
// decays. A decay for each key: blocks of `base` tokens pair by pair; two neighbouring blocks of b tokens as one product of what is
// decayed since the middle (the second's q) with what is decayed until it (the first's k), for b = base, 2 base, .. chunk / 2; the
// gradient to log_a goes back along the same tree, as a sum of what passes over each token. A decay for each head: a matrix of
// decays, times the scores without them. See ops/chunked/decay.py, which does the same with PyTorch's operations.
//
// Where there are sequences and groups for all threads, each goes through time on its own, its state in cache. Else chunks are shared
// by the threads in three steps, for a segment of them at a time: what each writes, the states from one to the next, what each
// reads. Both do the same arithmetic: results are bitwise the same.
#pragma once
#include "products.h"
#include "rows.h"

namespace ssmlens {

template <class T> struct Attention {
  static constexpr int width = Simd<T>::width;
  static constexpr int64_t base = 8, levels = 3, chunk = base << levels;
  using V = Vec<T>;

  int64_t batch, length, groups, heads, d_key, d_value;
  bool per_key;                   // log_a has a number for each key
  Rows q, k, v, log_a, reset;     // a row: all groups or heads of a token; reset may be absent
  const T *bonus, *h0;            // may be null

  int64_t chunks() const { return (length + chunk - 1) / chunk; }
  int64_t decays() const { return per_key ? d_key : 1; }
  int64_t state_size() const { return d_key * d_value; }
  // Whether to share sequences and groups among the threads, and not chunks.
  bool whole_sequences(int64_t sequences, int64_t threads) const {
    const int64_t units = sequences * groups;
    return units % threads == 0 || units >= 4 * threads || chunks() == 1;
  }
  // Chunks in a segment, of this many sequences.
  int64_t segment(int64_t sequences) const {
    const int64_t few = (int64_t(1) << 20) / std::max<int64_t>(1, sequences * heads * state_size());
    return std::min(chunks(), std::max({few, 32 / std::max<int64_t>(1, sequences * groups), int64_t(1)}));
  }

  // `steps` rows of `d` numbers from `from` on, (size, pitch), zeros elsewhere; and the other way.
  NOINLINE static void read_tokens(const Rows& rows, int64_t b, int64_t start, int64_t steps, int64_t size, int64_t from, int64_t d,
                                   int64_t pitch, T* to) {
    with_format<T>(rows.format, [&](auto format) {
      constexpr Format f = decltype(format)::value;
      for (int64_t i = 0; i < steps; ++i) {
        const char* row = rows.at(b, start + i) + from * bytes<T>(f);
        for (int64_t j = 0; j < pitch; j += width)
          store<T>(to + i * pitch + j,
                   j < d ? load_as<T, f>(row + j * bytes<T>(f), int(std::min<int64_t>(width, d - j))) : V{});
      }
    });
    std::fill(to + steps * pitch, to + size * pitch, T(0));
  }
  NOINLINE static void write_tokens(const OutRows& rows, int64_t b, int64_t start, int64_t steps, int64_t from, int64_t d,
                                    int64_t pitch, const T* numbers) {
    with_format<T>(rows.format, [&](auto format) {
      constexpr Format f = decltype(format)::value;
      for (int64_t i = 0; i < steps; ++i) {
        char* row = rows.at(b, start + i) + from * bytes<T>(f);
        for (int64_t j = 0; j < d; j += width)
          store_as<T, f>(row + j * bytes<T>(f), load<T>(numbers + i * pitch + j), int(std::min<int64_t>(width, d - j)));
      }
    });
  }
  // A state, with its rows and columns padded by zeros; and the other way.
  void read_state(const T* state, int64_t K, int64_t W, T* to) const {
    for (int64_t i = 0; i < d_key; ++i)
      for (int64_t j = 0; j < W; j += width)
        store<T>(to + i * W + j, j < d_value ? load<T>(state + i * d_value + j, int(std::min<int64_t>(width, d_value - j))) : V{});
    std::fill(to + d_key * W, to + K * W, T(0));
  }
  void write_state(const T* from, int64_t W, T* state) const {
    for (int64_t i = 0; i < d_key; ++i)
      for (int64_t j = 0; j < d_value; j += width)
        store<T>(state + i * d_value + j, load<T>(from + i * W + j), int(std::min<int64_t>(width, d_value - j)));
  }

  // ---------------------------------------------------------------- one chunk: of a group, then of each of its heads
  // Arrays (size or chunk, K) and (.., W) hold tokens by rows, with d_key padded to K and d_value to W.
  struct Array {
    Scratch<V> memory;
    void allot(int64_t numbers) { memory.resize(size_t(numbers / width + 1)); }
    operator T*() { return reinterpret_cast<T*>(memory.data()); }
  };
  enum Part { only_rows, only_cols, with_scores, with_gradients };  // of a chunk: what is wanted of it
  struct Work {
    const Attention& op;
    const int64_t K = padded<T>(std::max<int64_t>(op.d_key, 1)), W = padded<T>(op.d_value);
    const bool inclusive = !op.bonus;  // the state is read after it is written
    int64_t b = 0, start = 0, steps = 0, size = 0;  // tokens; and a power of two of them, at least `base`
    Array q, k, all_q;               // all_q: with the rows that see no state, since it has just been emptied; q has zeros there
    Array a, over, rows, cols;       // over: the decay over blocks of base, 2 base, .. tokens, the last row that over the chunk
    Array f, g, mask, raw;           // of one decay a head: that since the beginning and until the end; for each pair; q kᵀ
    Array v, y, scores, state, written;
    Array dq, dk, dv, dlog_a, dbonus, dscores, drows, dcols, dstate, dover;
    Array level[levels];             // q of second and k of first halves of 2b tokens, decayed to the middle
    Part part = with_scores;
    T* keep = nullptr;               // (K), or one number

    Work(const Attention& attention, bool backward) : op(attention) {
      for (Array* x : {&q, &k, &all_q, &rows, &cols}) x->allot(chunk * K);
      for (Array* x : {&v, &y}) x->allot(chunk * W);
      for (Array* x : {&raw, &mask, &scores}) x->allot(chunk * chunk);
      for (Array* x : {&f, &g}) x->allot(chunk);
      a.allot(chunk * K), over.allot(2 * chunk / base * K);
      state.allot(op.heads / op.groups * K * W), written.allot(K * W);
      if (!backward) return;
      for (Array* x : {&dq, &dk, &dlog_a, &drows, &dcols, &level[0], &level[1], &level[2]}) x->allot(chunk * K);
      dover.allot(2 * chunk / base * K), dbonus.allot(K), dv.allot(chunk * W), dscores.allot(chunk * chunk);
      dstate.allot(op.heads / op.groups * K * W);
    }
    bool emptied(int64_t i) const { return op.reset && i < steps && *op.reset.at(b, start + i); }
    int64_t pairs(int64_t at) const { return at == levels ? 0 : size >> (at + 4); }  // of blocks of base << at tokens
    int64_t block(int64_t at, int64_t i) const {  // where its row is in `over`
      int64_t first = 0;
      for (int64_t l = 0; l < at; ++l) first += size / (base << l);
      return (first + i) * K;
    }

    void load_group(int64_t sequence, int64_t group, int64_t c, Part wanted) {
      part = wanted;
      b = sequence, start = c * chunk, steps = std::min(chunk, op.length - start);
      for (size = base; size < steps;) size *= 2;
      if (part != only_cols) read_tokens(op.q, b, start, steps, size, group * op.d_key, op.d_key, K, q);
      if (part != only_rows) read_tokens(op.k, b, start, steps, size, group * op.d_key, op.d_key, K, k);
      if (!inclusive && part != only_cols) {
        std::copy(&q[0], &q[size * K], &all_q[0]);
        for (int64_t i = 0; i < steps; ++i)
          if (emptied(i)) std::fill(&q[i * K], &q[(i + 1) * K], T(0));
      }
      if (part >= with_scores && !op.per_key) load_raw();
      if (part == with_gradients) std::fill(&dq[0], &dq[size * K], T(0)), std::fill(&dk[0], &dk[size * K], T(0));
    }
    // Scores without decays of heads that have only one, on and below the diagonal.
    void load_raw() {
      for (int64_t t = 0; t < size; t += 8) multiply_rows<T>(8, t + 8, K, q + t * K, K, k, K, raw + t * chunk, chunk);
    }

    // The decays of a head, and with them what is wanted of it, and keep.
    void load_head(int64_t head) {
      if (op.per_key) {
        load_decays(head);
        inclusive ? blocks<true>() : blocks<false>();
        tree();
      } else {
        load_decay(head);
      }
      if (part >= with_scores && !inclusive) diagonal(op.bonus + (b * op.heads + head) * op.d_key);
    }

    NOINLINE void load_decays(int64_t head) {
      read_tokens(op.log_a, b, start, steps, size, head * op.d_key, op.d_key, K, a);
      for (int64_t i = 0; i < steps; ++i)
        if (emptied(i)) std::fill(&a[i * K], &a[(i + 1) * K], -std::numeric_limits<T>::infinity());
      for (int64_t i = 0; i < size / base; ++i)
        for (int64_t d = 0; d < K; d += width) {
          V sum{};
          T* const at = a + i * base * K + d;
          for (int64_t t = 0; t < base; ++t) {
            const V log = load<T>(at + t * K);
            sum += log;
            store<T>(at + t * K, exp<T>(log));
          }
          store<T>(over + i * K + d, sum);
        }
      int64_t last = 0;
      for (int64_t at = 0; pairs(at); ++at)
        for (int64_t i = 0; i < pairs(at); ++i) {
          last = block(at + 1, i);
          for (int64_t d = 0; d < K; d += width)
            store<T>(over + last + d, load<T>(over + block(at, 2 * i) + d) + load<T>(over + block(at, 2 * i + 1) + d));
        }
      for (int64_t i = 0; i < last + K; i += width) store<T>(over + i, exp<T>(load<T>(over + i)));
      keep = over + last;
    }

    // rows and cols within blocks of `base` tokens, and their scores, pair by pair.
    template <bool inclusive> NOINLINE void blocks() {
      for (int64_t first = 0; first < size; first += base) {
        for (int64_t d = 0; d < K; d += width) {
          const int64_t at = first * K + d;
          V since = splat<T>(T(1)), until = since;
          for (int64_t t = 0; t < base && part != only_cols; ++t) {
            if (inclusive) since *= load<T>(a + at + t * K);
            store<T>(rows + at + t * K, load<T>(q + at + t * K) * since);
            if (!inclusive) since *= load<T>(a + at + t * K);
          }
          for (int64_t t = base - 1; t >= 0 && part != only_rows; --t) {
            store<T>(cols + at + t * K, load<T>(k + at + t * K) * until);
            until *= load<T>(a + at + t * K);
          }
        }
        if (part < with_scores) continue;
        unrolled<base>([&](int s) ALWAYS {
          V sum[base] = {};
          for (int64_t d = 0; d < K; d += width) {
            const int64_t at = first * K + d;
            V key = load<T>(k + at + s * K);
            if (inclusive) sum[s] += load<T>(q + at + s * K) * key;
            unrolled<base>([&](int t) ALWAYS {
              if (t <= s) return;
              if (inclusive) key *= load<T>(a + at + t * K);
              sum[t] += load<T>(q + at + t * K) * key;
              if (!inclusive) key *= load<T>(a + at + t * K);
            });
          }
          T column[base] = {};
          add_lane_sums<base, T>(column, sum);
          for (int64_t t = 0; t < base; ++t) scores[(first + t) * chunk + first + s] = column[t];
        });
      }
    }

    // From rows and cols of blocks to those of the chunk.
    NOINLINE void tree() {
      for (int64_t at = 0; pairs(at); ++at)
        for (int64_t i = 0; i < pairs(at); ++i) {
          const int64_t half = base << at, first = 2 * half * i, middle = first + half;
          T* const corner = scores + middle * chunk + first;
          if (part >= with_scores) multiply_rows<T>(half, half, K, rows + middle * K, K, cols + first * K, K, corner, chunk);
          if (part == with_gradients) {
            std::copy(&cols[first * K], &cols[middle * K], &level[at][first * K]);
            std::copy(&rows[middle * K], &rows[(middle + half) * K], &level[at][middle * K]);
          }
          if (part != only_cols) scale(rows + middle * K, half, over + block(at, 2 * i));
          if (part != only_rows) scale(cols + first * K, half, over + block(at, 2 * i + 1));
        }
    }
    void scale(T* x, int64_t count, const T* by) const {
      for (int64_t d = 0; d < K; d += width) {
        const V factor = load<T>(by + d);
        for (int64_t i = 0; i < count; ++i) store<T>(x + i * K + d, load<T>(x + i * K + d) * factor);
      }
    }

    // One decay: sums of logs in double precision, products of decays for the pairs.
    NOINLINE void load_decay(int64_t head) {
      read_tokens(op.log_a, b, start, steps, size, head, 1, 1, a);
      for (int64_t i = 0; i < steps; ++i)
        if (emptied(i)) a[i] = -std::numeric_limits<T>::infinity();
      double sum = 0;
      for (int64_t i = 0; i < size; ++i) {
        if (!inclusive) f[i] = T(sum);
        sum += double(a[i]);
        if (inclusive) f[i] = T(sum);
      }
      keep = over, keep[0] = T(sum);
      sum = 0;
      for (int64_t i = size - 1; i >= 0; --i) g[i] = T(sum), sum += double(a[i]);
      for (T* x : {&f[0], &g[0], &a[0]})
        for (int64_t i = 0; i < size; i += width) store<T>(x + i, exp<T>(load<T>(x + i)));
      store<T>(keep, exp<T>(load<T>(keep)));
      for (int64_t i = 0; i < size; ++i)
        for (int64_t d = 0; d < K; d += width) {
          if (part != only_cols) store<T>(rows + i * K + d, load<T>(q + i * K + d) * f[i]);
          if (part != only_rows) store<T>(cols + i * K + d, load<T>(k + i * K + d) * g[i]);
        }
      if (part < with_scores) return;
      constexpr int64_t most = chunk / width;
      V decay[most] = {};
      T* const here = reinterpret_cast<T*>(decay);
      for (int64_t t = 0; t < size; ++t) {
        const int64_t vectors = (t + width) / width;
        const T factor = a[t];
        if (inclusive) {
          for (int64_t j = 0; j < vectors; ++j) decay[j] *= factor;
          here[t] = T(1);
        }
        for (int64_t j = 0; j < vectors; ++j) {
          const int64_t at = t * chunk + j * width;
          store<T>(mask + at, decay[j]), store<T>(scores + at, decay[j] * load<T>(raw + at));
        }
        if (!inclusive) {
          for (int64_t j = 0; j < vectors; ++j) decay[j] *= factor;
          here[t] = T(1);
        }
        clear_block(scores + t * chunk, t);
      }
    }
    // Zeros right of the diagonal, as far as products within a block of 8 tokens read.
    static void clear_block(T* row, int64_t t) { std::fill(row + t + 1, row + (t / 8 + 1) * 8, T(0)); }

    // score_tt with a bonus
    NOINLINE void diagonal(const T* bonus) {
      for (int64_t i = 0; i < size; ++i) {
        V sum{};
        for (int64_t d = 0; d < op.d_key; d += width) {
          const V u = load<T>(bonus + d, int(std::min<int64_t>(width, op.d_key - d)));
          sum += load<T>(all_q + i * K + d) * load<T>(k + i * K + d) * u;
        }
        T* const at = scores + i * chunk + i;
        *at = T(0);
        add_lane_sums<1, T>(at, &sum);
      }
    }

    // y = scores v + rows S
    void read(const T* S) {
      for (int64_t t = 0; t < size; t += 8) multiply<T>(8, W, t + 8, {scores + t * chunk, chunk}, v, W, y + t * W, W, false);
      multiply<T>(size, W, K, {rows, K}, S, W, y, W, true);
    }

    // written = colsᵀ v: what is new in the state after the chunk; back: rowsᵀ dy, in the gradient to the state before it
    void write() { multiply<T>(K, W, size, {cols, 1, K}, v, W, written, W, false); }
    void write_back() { multiply<T>(K, W, size, {rows, 1, K}, y, W, written, W, false); }
    // state = written + keep · state
    NOINLINE void advance(T* S) {
      for (int64_t d = 0; d < K; ++d) {
        const T kept = keep[op.per_key ? d : 0];
        for (int64_t j = d * W; j < (d + 1) * W; j += width) store<T>(S + j, load<T>(written + j) + kept * load<T>(S + j));
      }
    }

    // ---------------------------------------------------------------- gradients
    // Given v, dy (in y), and S and dS, the state before and the gradient to that after: to v, q, k and log_a.
    NOINLINE void gradients(const T* S, const T* dS, const T* head_bonus) {
      T* const dy = y;
      for (int64_t s = 0; s < size; s += 8) {
        multiply_rows<T>(8, s + 8, W, dy + s * W, W, v, W, dscores + s * chunk, chunk);
        multiply<T>(8, W, size - s, {scores + s * chunk + s, 1, chunk}, dy + s * W, W, dv + s * W, W, false);
      }
      multiply<T>(size, W, K, {cols, K}, dS, W, dv, W, true);
      multiply_rows<T>(size, K, W, dy, W, S, W, drows, K);
      multiply_rows<T>(size, K, W, v, W, dS, W, dcols, K);
      if (!inclusive) bonus_gradients(head_bonus);
      if (op.per_key) {
        T* const dkeep = dover + (keep - over);
        row_products<T>(K, W, S, dS, dkeep);
        for (int64_t d = 0; d < K; d += width) store<T>(dkeep + d, load<T>(dkeep + d) * load<T>(keep + d));
        tree_gradients();
        for (int64_t first = 0; first < size; first += base)
          inclusive ? block_gradients<true>(first) : block_gradients<false>(first);
      } else {
        decay_gradients(S, dS);
      }
    }

    // Of the diagonal; and nothing else goes back to the q of a token before which the state is emptied.
    NOINLINE void bonus_gradients(const T* bonus) {
      std::fill(&dbonus[0], &dbonus[K], T(0));
      for (int64_t i = 0; i < size; ++i) {
        const T d_here = dscores[i * chunk + i];
        for (int64_t d = 0; d < op.d_key; d += width) {
          const V u = load<T>(bonus + d, int(std::min<int64_t>(width, op.d_key - d)));
          const V here_q = load<T>(all_q + i * K + d), here_k = load<T>(k + i * K + d);
          store<T>(dq + i * K + d, load<T>(dq + i * K + d) + d_here * u * here_k);
          store<T>(dk + i * K + d, load<T>(dk + i * K + d) + d_here * u * here_q);
          store<T>(dbonus + d, load<T>(dbonus + d) + d_here * here_q * here_k);
        }
        dscores[i * chunk + i] = T(0);
        if (!emptied(i)) continue;
        std::fill(&dscores[i * chunk], &dscores[i * chunk + i], T(0)), std::fill(&drows[i * K], &drows[(i + 1) * K], T(0));
      }
    }

    // From rows and cols of the chunk to those of blocks, and of `keep` to all of `over` (as gradients to logarithms).
    NOINLINE void tree_gradients() {
      int64_t at = 0;
      while (pairs(at)) ++at;
      while (at-- > 0)
        for (int64_t i = 0; i < pairs(at); ++i) {
          const int64_t half = base << at, first = 2 * half * i, middle = first + half;
          const T* const passed = dover + block(at + 1, i);
          pass(drows + middle * K, half, over + block(at, 2 * i), level[at] + middle * K, passed, dover + block(at, 2 * i));
          pass(dcols + first * K, half, over + block(at, 2 * i + 1), level[at] + first * K, passed, dover + block(at, 2 * i + 1));
          const T* const corner = dscores + middle * chunk + first;
          multiply<T>(half, K, half, {corner, chunk}, level[at] + first * K, K, drows + middle * K, K, true);
          multiply<T>(half, K, half, {corner, 1, chunk}, level[at] + middle * K, K, dcols + first * K, K, true);
        }
    }
    // x was multiplied by `by`: dx is too, and to the logarithm of it goes the sum of what has passed, beside what passes over both.
    void pass(T* dx, int64_t count, const T* by, const T* x, const T* passed, T* to) const {
      for (int64_t d = 0; d < K; d += width) {
        const V factor = load<T>(by + d);
        V sum = load<T>(passed + d);
        for (int64_t i = 0; i < count; ++i) {
          const V scaled = load<T>(dx + i * K + d) * factor;
          store<T>(dx + i * K + d, scaled);
          sum += scaled * load<T>(x + i * K + d);
        }
        store<T>(to + d, sum);
      }
    }
    // The rest, of tokens first .. first + base.
    template <bool inclusive> NOINLINE void block_gradients(int64_t first) {
      const T* const passed = dover + first / base * K;
      const T* const corner = dscores + first * chunk + first;
      for (int64_t d = 0; d < K; d += width) {
        const int64_t at = first * K + d;
        V as[base], qs[base], ks[base], to_q[base], to_k[base], to_log[base];
        V since = splat<T>(T(1)), until = since, sum = load<T>(passed + d);
        for (int64_t t = 0; t < base; ++t) {
          as[t] = load<T>(a + at + t * K), qs[t] = load<T>(q + at + t * K), ks[t] = load<T>(k + at + t * K);
          if (inclusive) since *= as[t];
          to_q[t] = load<T>(drows + at + t * K) * since;
          if (!inclusive) since *= as[t];
        }
        for (int64_t t = base - 1; t >= 0; --t) {
          to_k[t] = load<T>(dcols + at + t * K) * until;
          until *= as[t];
          if (inclusive) sum += to_q[t] * qs[t];
          to_log[t] = sum;
          if (!inclusive) sum += to_q[t] * qs[t];
        }
        sum = V{};
        for (int64_t t = 0; t < base; ++t) to_log[t] += sum, sum += to_k[t] * ks[t];
        unrolled<base>([&](int s) ALWAYS {
          V key[base], dkey{};
          key[s] = ks[s];
          unrolled<base>([&](int t) ALWAYS {
            if (t > s) key[t] = key[t - 1] * as[t];
          });
          unrolled<base>([&](int back) ALWAYS {
            const int t = base - 1 - back;
            if (t <= s) return;
            const T d_here = corner[t * chunk + s];
            if (inclusive) to_q[t] += d_here * key[t], dkey += d_here * qs[t];
            to_log[t] += dkey * key[t];
            dkey *= as[t];
            if (!inclusive) to_q[t] += d_here * key[t - 1], dkey += d_here * qs[t];
          });
          if (inclusive) {
            const T d_here = corner[s * chunk + s];
            to_q[s] += d_here * ks[s], dkey += d_here * qs[s];
          }
          to_k[s] += dkey;
        });
        for (int64_t t = 0; t < base; ++t) {
          store<T>(dq + at + t * K, load<T>(dq + at + t * K) + to_q[t]);
          store<T>(dk + at + t * K, load<T>(dk + at + t * K) + to_k[t]);
          store<T>(dlog_a + at + t * K, to_log[t]);
        }
      }
    }

    // Where a head has one decay: through the matrix of decays.
    NOINLINE void decay_gradients(const T* S, const T* dS) {
      constexpr int64_t most = chunk / width;
      V lane, later[most] = {};  // later: Σ dscore score of this token and later ones (without a bonus: of later ones)
      for (int i = 0; i < width; ++i) lane[i] = T(i);
      for (int64_t first = size - 8; first >= 0; first -= 8) {
        V passing[8];
        for (int64_t i = 7; i >= 0; --i) {
          const int64_t t = first + i;
          V sum{};
          for (int64_t j = 0; j * width <= t; ++j) {
            const int64_t at = t * chunk + j * width;
            const V before = lane < splat<T>(T(t - j * width)) ? splat<T>(T(1)) : V{}, d_here = load<T>(dscores + at);
            const V pair = before != T(0) ? d_here * load<T>(scores + at) : V{};
            if (inclusive) later[j] += pair;
            sum += before != T(0) ? later[j] : V{};
            if (!inclusive) later[j] += pair;
            store<T>(dscores + at, d_here * load<T>(mask + at));
          }
          clear_block(dscores + t * chunk, t);
          passing[i] = sum, dlog_a[t] = T(0);
        }
        add_lane_sums<8, T>(dlog_a + first, passing);
      }
      T past[chunk], future[chunk], of_keep[8] = {};
      row_products<T>(size, K, dcols, cols, past), row_products<T>(size, K, drows, rows, future);
      V sum[8] = {};
      for (int64_t i = 0; i < K * W; i += width) sum[0] += load<T>(S + i) * load<T>(dS + i);
      add_lane_sums<8, T>(of_keep, sum);
      double total = double(of_keep[0]) * double(keep[0]);
      for (int64_t t = size - 1; t >= 0; --t) {
        if (inclusive) total += double(future[t]);
        dlog_a[t] += T(total);
        if (!inclusive) total += double(future[t]);
      }
      total = 0;
      for (int64_t t = 0; t < size; ++t) dlog_a[t] += T(total), total += double(past[t]);
      for (int64_t t = 0; t < size; ++t)
        for (int64_t d = 0; d < K; d += width) {
          const int64_t at = t * K + d;
          store<T>(dq + at, load<T>(dq + at) + load<T>(drows + at) * f[t]);
          store<T>(dk + at, load<T>(dk + at) + load<T>(dcols + at) * g[t]);
        }
      for (int64_t t = 0; t < size; t += 8) {
        multiply<T>(8, K, t + 8, {dscores + t * chunk, chunk}, k, K, dq + t * K, K, true);
        multiply<T>(8, K, size - t, {dscores + t * chunk + t, 1, chunk}, q + t * K, K, dk + t * K, K, true);
      }
    }
  };

  // work(Work&, sequence, group)
  template <class Parallel, class F>
  void for_groups(int64_t sequences, bool backward, const Parallel& parallel, const F& work) const {
    parallel(sequences * groups, [&](int64_t begin, int64_t end) {
      const FlushSubnormal flush;
      Work w(*this, backward);
      for (; begin < end; ++begin) work(w, begin / groups, begin % groups);
    });
  }
  static void start_from(const T* given, int64_t count, T* to) {
    if (given) {
      std::copy(given, given + count, to);
    } else {
      std::fill(to, to + count, T(0));
    }
  }
  // work(Work&, sequence, group, i) for chunks i of a segment, neighbours in memory one after another.
  template <class Parallel, class F>
  void for_chunks(int64_t sequences, int64_t count, bool backward, const Parallel& parallel, const F& work) const {
    parallel(sequences * groups * count, [&](int64_t begin, int64_t end) {
      const FlushSubnormal flush;
      Work w(*this, backward);
      for (; begin < end; ++begin) work(w, begin / groups % sequences, begin % groups, begin / groups / sequences);
    });
  }
  // from (a state) times keep added to `to`, for every state of `sequences`: S of one chunk and the next
  template <class Parallel>
  void carry(int64_t sequences, int64_t count, const T* keeps, T* states, bool forward, const Parallel& parallel) const {
    const int64_t all = sequences * heads * d_key, each = decays();
    parallel(all, [&](int64_t begin, int64_t end) {
      const FlushSubnormal flush;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t c = forward ? i : count - 1 - i;
        const T* const from = states + (forward ? c : c + 1) * all * d_value;
        T* const to = states + (forward ? c + 1 : c) * all * d_value;
        for (int64_t row = begin; row < end; ++row) {
          const T kept = keeps[c * sequences * heads * each + (per_key ? row : row / d_key)];
          for (int64_t j = 0; j < d_value; j += width) {
            const int lanes = int(std::min<int64_t>(width, d_value - j));
            const int64_t at = row * d_value + j;
            store<T>(to + at, load<T>(to + at, lanes) + kept * load<T>(from + at, lanes), lanes);
          }
        }
      }
    });
  }

  // A head of a chunk, once the group is loaded.
  void load_values(Work& w, int64_t b, int64_t head) const {
    w.load_head(head);
    read_tokens(v, b, w.start, w.steps, w.size, head * d_value, d_value, w.W, w.v);
  }
  void load_dy(Work& w, const Rows& dy, int64_t b, int64_t head) const {
    read_tokens(dy, b, w.start, w.steps, w.size, head * d_value, d_value, w.W, w.y);
  }

  // y (batch, length, heads · d_value); final_state (batch, heads, d_key, d_value); saved (chunks + 1, batch, heads, d_key,
  // d_value): the states before each chunk and after the last, or null. threads: how many there may be.
  template <class Parallel>
  NOINLINE void forward(const OutRows& y, T* final_state, T* saved, int64_t threads, const Parallel& parallel) const {
    const int64_t one = batch * heads * state_size(), per_group = heads / groups;
    if (whole_sequences(batch, threads)) {
      for_groups(batch, false, parallel, [&](Work& w, int64_t b, int64_t group) {
        const int64_t from = (b * heads + group * per_group) * state_size();
        const auto keep_states = [&](T* to) {
          for (int64_t i = 0; i < per_group; ++i) write_state(w.state + i * w.K * w.W, w.W, to + from + i * state_size());
        };
        std::fill(&w.state[0], &w.state[per_group * w.K * w.W], T(0));
        for (int64_t i = 0; h0 && i < per_group; ++i) read_state(h0 + from + i * state_size(), w.K, w.W, w.state + i * w.K * w.W);
        for (int64_t c = 0; c < chunks(); ++c) {
          if (saved) keep_states(saved + c * one);
          w.load_group(b, group, c, with_scores);
          for (int64_t i = 0; i < per_group; ++i) {
            T* const S = w.state + i * w.K * w.W;
            load_values(w, b, group * per_group + i);
            w.read(S), w.write(), w.advance(S);
            write_tokens(y, b, w.start, w.steps, (group * per_group + i) * d_value, d_value, w.W, w.y);
          }
        }
        if (saved) keep_states(saved + chunks() * one);
        keep_states(final_state);
      });
      return;
    }
    const int64_t most = segment(batch);
    std::vector<T> keeps(size_t(most * batch * heads * decays())), own(saved ? 0 : size_t((most + 1) * one));
    T* const states = saved ? saved : own.data();
    start_from(h0, one, states);
    for (int64_t first = 0; first < chunks(); first += most) {
      const int64_t count = std::min(most, chunks() - first);
      T* const S = saved ? saved + first * one : states;
      for_chunks(batch, count, false, parallel, [&](Work& w, int64_t b, int64_t group, int64_t c) {
        w.load_group(b, group, first + c, only_cols);
        for (int64_t head = group * per_group; head < (group + 1) * per_group; ++head) {
          const int64_t which = (c * batch + b) * heads + head;
          load_values(w, b, head);
          w.write();
          std::copy(w.keep, w.keep + decays(), &keeps[which * decays()]);
          write_state(w.written, w.W, S + one + which * state_size());
        }
      });
      carry(batch, count, keeps.data(), S, true, parallel);
      for_chunks(batch, count, false, parallel, [&](Work& w, int64_t b, int64_t group, int64_t c) {
        w.load_group(b, group, first + c, with_scores);
        for (int64_t head = group * per_group; head < (group + 1) * per_group; ++head) {
          load_values(w, b, head);
          read_state(S + ((c * batch + b) * heads + head) * state_size(), w.K, w.W, w.state);
          w.read(w.state);
          write_tokens(y, b, w.start, w.steps, head * d_value, d_value, w.W, w.y);
        }
      });
      if (!saved) std::copy(S + count * one, S + (count + 1) * one, S);
    }
    const T* const last = saved ? saved + chunks() * one : states;
    std::copy(last, last + one, final_state);
  }

  // saved: what `forward` has. dy, dq, dk, dv, dlog_a (g.batch, length, ..); dfinal (may be null), dh0 (g.batch, heads, d_key,
  // d_value) and dbonus (g.batch, heads, d_key), null where there is no such input. g.batch may be a multiple of batch: several
  // gradients, one after another, through the same sequences.
  struct Gradients {
    int64_t batch;
    Rows dy;
    const T *saved, *dfinal;
    OutRows dq, dk, dv, dlog_a;
    T *dbonus, *dh0;
  };
  template <class Parallel> NOINLINE void backward(const Gradients& g, int64_t threads, const Parallel& parallel) const {
    const int64_t one = g.batch * heads * state_size(), per_group = heads / groups, keys = heads * d_key;
    if (whole_sequences(g.batch, threads)) {
      for_groups(g.batch, true, parallel, [&](Work& w, int64_t b, int64_t group) {
        const int64_t from = b * heads + group * per_group;
        std::fill(&w.dstate[0], &w.dstate[per_group * w.K * w.W], T(0));
        for (int64_t i = 0; g.dfinal && i < per_group; ++i)
          read_state(g.dfinal + (from + i) * state_size(), w.K, w.W, w.dstate + i * w.K * w.W);
        if (g.dbonus) std::fill(g.dbonus + from * d_key, g.dbonus + (from + per_group) * d_key, T(0));
        for (int64_t c = chunks() - 1; c >= 0; --c) {
          w.load_group(b % batch, group, c, with_gradients);
          for (int64_t i = 0; i < per_group; ++i) {
            T* const dS = w.dstate + i * w.K * w.W;
            head_gradients(w, g, b, group * per_group + i, c, dS, g.dbonus ? g.dbonus + (from + i) * d_key : nullptr);
            w.write_back(), w.advance(dS);
          }
          write_group(w, g, b, group);
        }
        for (int64_t i = 0; g.dh0 && i < per_group; ++i)
          write_state(w.dstate + i * w.K * w.W, w.W, g.dh0 + (from + i) * state_size());
      });
      return;
    }
    const FlushSubnormal flush;  // sums of dbonus over chunks are the same as above
    const int64_t most = segment(g.batch);
    std::vector<T> keeps(size_t(most * g.batch * heads * decays())), dstates(size_t((most + 1) * one));
    std::vector<T> dbonus(g.dbonus ? size_t(most * g.batch * keys) : 0);
    T* const dS = dstates.data();
    if (g.dbonus) std::fill(g.dbonus, g.dbonus + g.batch * keys, T(0));
    start_from(g.dfinal, one, dS);
    for (int64_t first = (chunks() - 1) / most * most; first >= 0; first -= most) {
      const int64_t count = std::min(most, chunks() - first);
      std::copy(dS, dS + one, dS + count * one);
      for_chunks(g.batch, count, false, parallel, [&](Work& w, int64_t b, int64_t group, int64_t c) {
        w.load_group(b % batch, group, first + c, only_rows);
        for (int64_t head = group * per_group; head < (group + 1) * per_group; ++head) {
          const int64_t which = (c * g.batch + b) * heads + head;
          w.load_head(head), load_dy(w, g.dy, b, head);
          w.write_back();
          std::copy(w.keep, w.keep + decays(), &keeps[which * decays()]);
          write_state(w.written, w.W, dS + which * state_size());
        }
      });
      carry(g.batch, count, keeps.data(), dS, false, parallel);
      std::fill(dbonus.begin(), dbonus.end(), T(0));
      for_chunks(g.batch, count, true, parallel, [&](Work& w, int64_t b, int64_t group, int64_t c) {
        w.load_group(b % batch, group, first + c, with_gradients);
        for (int64_t head = group * per_group; head < (group + 1) * per_group; ++head) {
          const int64_t which = (c * g.batch + b) * heads + head;
          read_state(dS + one + which * state_size(), w.K, w.W, w.dstate);
          head_gradients(w, g, b, head, first + c, w.dstate, g.dbonus ? &dbonus[which * d_key] : nullptr);
        }
        write_group(w, g, b, group);
      });
      if (g.dbonus)
        for (int64_t c = count - 1; c >= 0; --c)
          for (int64_t i = 0; i < g.batch * keys; ++i) g.dbonus[i] += dbonus[c * g.batch * keys + i];
    }
    if (g.dh0) std::copy(dS, dS + one, g.dh0);
  }
  // Of one head, once the group is loaded; dbonus is added to.
  void head_gradients(Work& w, const Gradients& g, int64_t b, int64_t head, int64_t c, const T* dS, T* dbonus) const {
    const int64_t source = b % batch, state = source * heads + head;
    load_values(w, source, head), load_dy(w, g.dy, b, head);
    read_state(g.saved + (c * batch * heads + state) * state_size(), w.K, w.W, w.state);
    w.gradients(w.state, dS, bonus ? bonus + state * d_key : nullptr);
    write_tokens(g.dv, b, w.start, w.steps, head * d_value, d_value, w.W, w.dv);
    write_tokens(g.dlog_a, b, w.start, w.steps, head * decays(), decays(), per_key ? w.K : 1, w.dlog_a);
    for (int64_t d = 0; dbonus && d < d_key; ++d) dbonus[d] += w.dbonus[d];
  }
  void write_group(Work& w, const Gradients& g, int64_t b, int64_t group) const {
    write_tokens(g.dq, b, w.start, w.steps, group * d_key, d_key, w.K, w.dq);
    write_tokens(g.dk, b, w.start, w.steps, group * d_key, d_key, w.K, w.dk);
  }
};

}  // namespace ssmlens
