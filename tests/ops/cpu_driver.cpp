// Runs every CPU kernel, forward and backward, over awkward shapes, on buffers of exactly the right size, so that the address
// and undefined-behaviour sanitizers see each access; checks against a plain loop. No PyTorch. See test_cpu_driver.py.
#include <cmath>
#include <complex>
#include <cstdio>
#include <cstdlib>

#include "attention.h"
#include "causal_conv1d.h"
#include "exponentials.h"
#include "linear_scan.h"
#include "rms_norm.h"
#include "rwkv4.h"
#include "selective_scan.h"

using namespace ssmlens;

int64_t most_units;  // of any call to `parallel` since it was set to 0
// As with that many threads: every unit to a thread of its own, or all of them to one.
bool many_threads;
const auto parallel = [](int64_t units, const auto& work) {
  most_units = std::max(most_units, units);
  if (!many_threads) return work(0, units);
  for (int64_t i = 0; i < units; ++i) work(i, i + 1);
};
template <class T> T random_number() { return T(std::rand()) / T(RAND_MAX) * 2 - 1; }
template <class T> std::vector<T> random_vector(int64_t size) {
  std::vector<T> v(size);
  for (T& x : v) x = random_number<T>();
  return v;
}
template <class T> void expect(const char* what, T actual, T wanted, double rounded = 0) {
  const T tolerance = std::max(T(rounded), sizeof(T) == 4 ? T(2e-4) : T(1e-10));
  if (!(std::abs(actual - wanted) <= tolerance * (1 + std::abs(wanted)))) {
    std::printf("%s: %g, not %g\n", what, double(actual), double(wanted));
    std::exit(1);
  }
}

// `count` numbers in some format, on a buffer of exactly the right size, and what they are worth.
template <class T> struct Stored {
  Format format;
  std::vector<char> bytes;
  std::vector<T> values;
  Stored(int64_t count, Format f, T (*make)()) : format(f), bytes(size_t(count * ssmlens::bytes<T>(f))), values(size_t(count)) {
    for (T& v : values) v = make();
    store();
    load();
  }
  void store() { convert(true); }
  void load() { convert(false); }
  Rows rows(int64_t length, int64_t width) const {
    const int64_t size = ssmlens::bytes<T>(format);
    return {bytes.data(), length * width * size, width * size, format};
  }
  OutRows out(int64_t length, int64_t width) {
    const int64_t size = ssmlens::bytes<T>(format);
    return {bytes.data(), length * width * size, width * size, format};
  }

 private:
  void convert(bool to_bytes) {
    for (size_t k = 0; k < values.size(); ++k) {
      Vec<T> v{};
      v[0] = values[k];
      if (to_bytes) {
        write_rows<T>(out(1, 1), 0, int64_t(k), 1, 0, 1, 1, &v);
      } else {
        read_rows<T>(rows(1, 1), 0, int64_t(k), 1, 0, 1, 1, &v);
        values[k] = v[0];
      }
    }
  }
};
template <class T> T number() { return random_number<T>(); }
template <class T> T positive() { return std::abs(random_number<T>()); }

template <class T> std::complex<T> standard(T a) { return a; }
template <class T> std::complex<T> standard(Complex<T> a) { return {a.re, a.im}; }
template <class T> T random_like(T) { return random_number<T>(); }
template <class T> Complex<T> random_like(Complex<T>) { return {random_number<T>(), random_number<T>()}; }
template <class T> T inner(T a, T b) { return a * b; }
template <class T> T inner(Complex<T> a, Complex<T> b) { return a.re * b.re + a.im * b.im; }

struct Shape {
  int64_t batch, length, d, n, probes;
  bool B_varies, C_varies, all;  // all: every option
  Format format;
};

template <class T, bool is_complex> void selective(const Shape& shape) {
  using Scan = SelectiveScan<T, is_complex>;
  using K = typename Scan::K;
  const auto [batch, length, d, n, probes, Bv, Cv, all, format] = shape;
  const auto random_numbers = [](int64_t size) {
    std::vector<K> v(size);
    for (K& k : v) k = random_like(k);
    return v;
  };
  // B and C that vary are complex if A is and format is full, else real.
  const bool complex_rows = is_complex && format == Format::full;
  const int parts = complex_rows ? 2 : 1;
  Scan s;
  s.batch = batch, s.length = length, s.d_inner = d, s.d_state = n, s.chunk = 32, s.dt_softplus = all;
  const Stored<T> x(batch * length * d, format, number), dt(batch * length * d, format, positive), z(batch * length * d, format, number);
  const Stored<T> B(batch * length * n * parts, format, number), C(batch * length * n * parts, format, number);
  const auto D = random_vector<T>(d), bias = random_vector<T>(d);
  auto A = random_numbers(d * n);
  const auto B_fixed = random_numbers(d * n), C_fixed = random_numbers(d * n), h0 = random_numbers(batch * d * n);
  for (K& a : A) {
    const T choice = random_number<T>(), re = -std::abs(real_part(a));
    if constexpr (is_complex) {
      a = choice > T(0.8) ? K{} : K{choice < T(-0.8) ? -std::numeric_limits<T>::infinity() : re, 5 * a.im};
    } else {
      a = choice > T(0.8) ? T(0) : choice < T(-0.8) ? -std::numeric_limits<T>::infinity() : re;
    }
  }
  std::vector<char> flags(batch * length);
  for (char& f : flags) f = std::rand() % 7 == 0;
  s.x = x.rows(length, d), s.dt = dt.rows(length, d), s.A = A.data();
  s.z = all ? z.rows(length, d) : Rows{};
  s.B.varies = Bv, s.C.varies = Cv, s.B.rows_are_complex = s.C.rows_are_complex = complex_rows;
  s.B.rows = B.rows(length, n * parts), s.C.rows = C.rows(length, n * parts);
  s.B.fixed = B_fixed.data(), s.C.fixed = C_fixed.data();
  s.D = all ? D.data() : nullptr, s.dt_bias = all ? bias.data() : nullptr, s.h0 = all ? h0.data() : nullptr;
  if (all) s.reset = {flags.data(), length, 1};
  s.prepare();

  const auto number_of = [&](const Stored<T>& rows, bool varies, const std::vector<K>& fixed, int64_t row, int64_t i, int64_t k) {
    if (!varies) return standard(fixed[i * n + k]);
    const int64_t at = (row * n + k) * parts;
    return std::complex<T>(rows.values[at], complex_rows ? rows.values[at + 1] : T(0));
  };
  Stored<T> y(batch * length * d, format, number);
  std::vector<K> last(batch * d * n);
  Scratch<typename Scan::N> saved(batch * s.blocks * s.chunks * n);
  most_units = 0;
  s.forward({y.out(length, d), last.data(), saved.data()}, parallel);
  if (most_units < batch * s.blocks) std::puts("forward is not parallel over blocks"), std::exit(1);
  const double rounded = format == Format::bfloat16 ? 5e-3 : format == Format::float16 ? 6e-4 : 0;
  y.load();
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i < d; ++i) {
      std::vector<std::complex<T>> h(n);
      for (int64_t k = 0; k < n; ++k) h[k] = all ? standard(h0[(b * d + i) * n + k]) : T(0);
      for (int64_t t = 0; t < length; ++t) {
        const int64_t row = b * length + t, at = row * d + i;
        const T step = all ? std::log1p(std::exp(dt.values[at] + bias[i])) : dt.values[at];
        T sum = all ? D[i] * x.values[at] : T(0);
        for (int64_t k = 0; k < n; ++k) {
          const std::complex<T> rate = standard(A[i * n + k]);
          const std::complex<T> a = std::isinf(rate.real()) ? std::complex<T>(0) : std::exp(step * rate);
          if (all && flags[row]) h[k] = 0;
          h[k] = a * h[k] + step * x.values[at] * number_of(B, Bv, B_fixed, row, i, k);
          sum += (h[k] * number_of(C, Cv, C_fixed, row, i, k)).real();
        }
        expect("selective_scan", y.values[at], all ? sum * z.values[at] / (1 + std::exp(-z.values[at])) : sum, rounded);
      }
      for (int64_t k = 0; k < n; ++k) {
        expect("final state", standard(last[(b * d + i) * n + k]).real(), h[k].real());
        expect("final state", standard(last[(b * d + i) * n + k]).imag(), h[k].imag());
      }
    }

  const int64_t sequences = batch * probes;
  const Stored<T> dy(sequences * length * d, format, number);
  const auto dlast = random_numbers(sequences * d * n);
  Stored<T> dx(sequences * length * d, format, number), ddt = dx, dz = dx;
  Stored<T> dB(sequences * length * n * parts, format, number), dC = dB;
  std::vector<K> dA(probes * d * n), dh0(dlast.size()), dB_fixed(dA.size()), dC_fixed(dA.size());
  std::vector<T> dD(probes * d), dbias(probes * d);
  most_units = 0;
  s.backward({sequences, probes, dy.rows(length, d), saved.data(), dlast.data(), dx.out(length, d), ddt.out(length, d),
              all ? dz.out(length, d) : OutRows{}, {dB.out(length, n * parts), complex_rows, dB_fixed.data()},
              {dC.out(length, n * parts), complex_rows, dC_fixed.data()}, dA.data(), all ? dD.data() : nullptr,
              all ? dbias.data() : nullptr, all ? dh0.data() : nullptr},
             parallel);
  if (most_units < std::min<int64_t>(s.blocks, 16)) std::puts("backward is not parallel over blocks"), std::exit(1);
  dx.load();
  for (T v : dx.values) expect("finite", v - v, T(0));
  for (K v : dA) expect("finite", real_part(v) - real_part(v) + imaginary_part(v) - imaginary_part(v), T(0));
  if (!all && format == Format::full) {  // y is linear in x: <dy, y> + <dh, h> = <dx, x>
    for (int64_t p = 0; p < probes; ++p) {
      double left = 0, right = 0;
      for (size_t k = 0; k < y.values.size(); ++k) {
        left += double(dy.values[p * y.values.size() + k]) * y.values[k];
        right += double(dx.values[p * y.values.size() + k]) * x.values[k];
      }
      for (size_t k = 0; k < last.size(); ++k) left += inner(dlast[p * last.size() + k], last[k]);
      expect("adjoint of the scan", T(right), T(left));
    }
  }
}

template <class T, bool is_complex = false> void linear(int64_t batch, int64_t length, int64_t d, int64_t probes, Format format) {
  using Scan = LinearScan<T, is_complex>;
  using K = typename Scan::K;
  const int64_t parts = Scan::parts, row = d * parts, numbers = batch * length * d;
  const auto random_numbers = [](int64_t size) {
    std::vector<K> v(size);
    for (K& k : v) k = random_like(k);
    return v;
  };
  const auto at = [&](const Stored<T>& rows, int64_t k) {
    return std::complex<T>(rows.values[k * parts], is_complex ? rows.values[k * parts + parts - 1] : T(0));
  };
  const Stored<T> a(numbers * parts, format, [] { return T(0.7) * random_number<T>(); }), u(numbers * parts, format, number);
  const auto h0 = random_numbers(batch * d);
  Stored<T> h(numbers * parts, format, number);
  const Scan s{batch, length, d, a.rows(length, row), u.rows(length, row), {}, h0.data()};
  std::vector<K> last(batch * d), saved(batch * s.chunks() * d);
  most_units = 0;
  s.forward(h.out(length, row), last.data(), saved.data(), parallel);
  if (most_units < batch * s.blocks()) std::puts("linear_scan is not parallel over blocks"), std::exit(1);
  h.load();
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i < d; ++i) {
      std::complex<T> state = standard(h0[b * d + i]);
      for (int64_t t = 0; t < length; ++t) {
        const int64_t k = (b * length + t) * d + i;
        state = at(a, k) * state + at(u, k);
        expect("linear_scan", at(h, k).real(), state.real(), format == Format::full ? 0 : 5e-3);
        expect("linear_scan", at(h, k).imag(), state.imag());
      }
      expect("last state of linear_scan", standard(last[b * d + i]).real(), state.real());
      expect("last state of linear_scan", standard(last[b * d + i]).imag(), state.imag());
    }
  const Stored<T> dh(probes * numbers * parts, format, number);
  const auto dlast = random_numbers(probes * batch * d);
  Stored<T> da(probes * numbers * parts, format, number), du = da;
  std::vector<K> dh0(probes * batch * d);
  s.backward({probes * batch, dh.rows(length, row), dlast.data(), saved.data(), da.out(length, row), du.out(length, row), dh0.data()},
             parallel);
  da.load(), du.load();
  for (int64_t p = 0; format == Format::full && p < probes; ++p) {
    double left = 0, right = 0, in_a = 0, in_a_wanted = 0;
    const size_t size = h.values.size();
    for (size_t k = 0; k < size; ++k) {
      left += double(dh.values[p * size + k]) * h.values[k];
      right += double(du.values[p * size + k]) * u.values[k];
    }
    for (size_t k = 0; k < h0.size(); ++k) {
      left += inner(dlast[p * h0.size() + k], last[k]);
      right += inner(dh0[p * h0.size() + k], h0[k]);
    }
    expect("adjoint of linear_scan", T(right), T(left));
    for (int64_t k = 0; k < numbers; ++k) {  // da_t = du_t conj(h_{t-1}), all together times a
      const int64_t t = k / d % length;
      const std::complex<T> before = t ? at(h, k - d) : standard(h0[k / (d * length) * d + k % d]);
      in_a += (at(da, p * numbers + k) * std::conj(at(a, k))).real();
      in_a_wanted += (at(du, p * numbers + k) * std::conj(before) * std::conj(at(a, k))).real();
    }
    expect("gradient to a", T(in_a), T(in_a_wanted));
  }
}

template <class T> void convolution(int64_t batch, int64_t length, int64_t d, int64_t width, int64_t probes, Format format) {
  const Stored<T> x(batch * length * d, format, number), before(batch * (width - 1) * d, format, number);
  const auto weight = random_vector<T>(d * width);
  CausalConv1d<T> c;
  c.batch = batch, c.length = length, c.d = d, c.width = width, c.silu = false;
  c.x = x.rows(length, d);
  if (width > 1) c.initial = before.rows(width - 1, d);
  c.weight = weight.data(), c.bias = nullptr;
  c.prepare();
  Stored<T> y(batch * length * d, format, number);
  c.forward(y.out(length, d), parallel);
  y.load();
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t t = 0; t < length; ++t)
      for (int64_t i = 0; i < d; ++i) {
        T sum = 0;
        for (int64_t j = 0; j < width; ++j) {
          const int64_t from = t - width + 1 + j;
          sum += weight[i * width + j] * (from >= 0 ? x.values[(b * length + from) * d + i]
                                                    : before.values[(b * (width - 1) + from + width - 1) * d + i]);
        }
        expect("causal_conv1d", y.values[(b * length + t) * d + i], sum, format == Format::full ? 0 : 5e-3);
      }
  const Stored<T> dy(probes * batch * length * d, format, number);
  Stored<T> dx(probes * batch * length * d, format, number), dbefore(probes * batch * (width - 1) * d, format, number);
  std::vector<T> dweight(probes * weight.size()), dbias(probes * d);
  c.backward({probes * batch, probes, dy.rows(length, d), dx.out(length, d), dweight.data(), dbias.data(),
              width > 1 ? dbefore.out(width - 1, d) : OutRows{}},
             parallel);
  dx.load(), dbefore.load();
  for (int64_t p = 0; format == Format::full && p < probes; ++p) {
    double left = 0, in_x = 0, in_weight = 0;
    for (size_t k = 0; k < y.values.size(); ++k) {
      left += double(dy.values[p * y.values.size() + k]) * y.values[k];
      in_x += double(dx.values[p * y.values.size() + k]) * x.values[k];
    }
    for (size_t k = 0; k < before.values.size(); ++k) in_x += double(dbefore.values[p * before.values.size() + k]) * before.values[k];
    for (size_t k = 0; k < weight.size(); ++k) in_weight += double(dweight[p * weight.size() + k]) * weight[k];
    expect("adjoint of causal_conv1d", T(in_x), T(left));
    expect("adjoint of causal_conv1d, weight", T(in_weight), T(left));
  }
}

template <class T> void rwkv4(int64_t batch, int64_t length, int64_t d, int64_t probes, bool all, Format format) {
  const Stored<T> r(batch * length * d, format, number), v(batch * length * d, format, number);
  Stored<T> k(batch * length * d, format, number);
  if (all)
    for (size_t i = 0; i < k.values.size(); i += 5) k.values[i] = -std::numeric_limits<T>::infinity();
  k.store();
  auto w = random_vector<T>(d), u = random_vector<T>(d), p0 = random_vector<T>(batch * d), s0 = p0, m0 = p0;
  for (T& value : w) value = value > T(0.9) ? std::numeric_limits<T>::infinity() : std::abs(value);
  for (T& value : s0) value = std::abs(value);
  std::vector<char> flags(batch * length);
  for (char& f : flags) f = std::rand() % 7 == 0;
  const Rows resets = all ? Rows{flags.data(), length, 1, Format::full} : Rows{};
  const Rwkv4<T> s{batch, length, d, r.rows(length, d), k.rows(length, d), v.rows(length, d), resets, w.data(), u.data(),
                   all ? p0.data() : nullptr, all ? s0.data() : nullptr, all ? m0.data() : nullptr};
  Stored<T> y(batch * length * d, format, number);
  std::vector<T> p(batch * d), sum(batch * d), m(batch * d), saved(batch * s.chunks() * 3 * d);
  most_units = 0;
  s.forward(y.out(length, d), p.data(), sum.data(), m.data(), saved.data(), parallel);
  if (most_units < batch * s.blocks()) std::puts("rwkv4 is not parallel over blocks"), std::exit(1);
  y.load();
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i < d; ++i) {  // without a running maximum: these numbers are small
      double numerator = all ? double(p0[b * d + i]) * std::exp(double(m0[b * d + i])) : 0;
      double weight = all ? double(s0[b * d + i]) * std::exp(double(m0[b * d + i])) : 0;
      for (int64_t t = 0; t < length; ++t) {
        const int64_t at = (b * length + t) * d + i;
        if (all && flags[b * length + t]) numerator = weight = 0;
        const double key = std::exp(double(k.values[at])), here = key * std::exp(double(u[i]));
        const double mean = weight + here == 0 ? 0 : (numerator + here * v.values[at]) / (weight + here);
        expect("rwkv4", y.values[at], T(mean / (1 + std::exp(-double(r.values[at])))), format == Format::full ? 0 : 5e-3);
        numerator = std::exp(-double(w[i])) * numerator + key * v.values[at];
        weight = std::exp(-double(w[i])) * weight + key;
      }
      expect("last state of rwkv4", T(sum[b * d + i] * std::exp(double(m[b * d + i]))), T(weight));
    }
  const Stored<T> dy(probes * batch * length * d, format, number);
  Stored<T> dr(probes * batch * length * d, format, number), dk = dr, dv = dr;
  std::vector<T> dw(probes * d), du(probes * d), dp0(probes * batch * d), ds0 = dp0, dm0 = dp0;
  const auto dp = random_vector<T>(probes * batch * d);
  s.backward({probes * batch, probes, dy.rows(length, d), saved.data(), dp.data(), nullptr, dp.data(), dr.out(length, d),
              dk.out(length, d), dv.out(length, d), dw.data(), du.data(), all ? dp0.data() : nullptr, all ? ds0.data() : nullptr,
              all ? dm0.data() : nullptr},
             parallel);
  dv.load();
  for (T value : dv.values) expect("finite", value - value, T(0));
  for (T value : dw) expect("finite", value - value, T(0));
}

template <class T> void norm(int64_t batch, int64_t length, int64_t d, int64_t probes, bool weighted, Format format) {
  const Stored<T> x(batch * length * d, format, number), dy(probes * batch * length * d, format, number);
  const auto weight = random_vector<T>(d);
  const RmsNorm<T> n{batch, length, d, x.rows(length, d), weighted ? weight.data() : nullptr, T(0.01)};
  Stored<T> y(batch * length * d, format, number), dx(probes * batch * length * d, format, number);
  std::vector<T> inverse(batch * length), dweight(probes * d);
  std::vector<double> dweight_wanted(probes * d);
  n.forward(y.out(length, d), inverse.data(), parallel);
  n.backward({probes * batch, probes, dy.rows(length, d), inverse.data(), dx.out(length, d), weighted ? dweight.data() : nullptr},
             parallel);
  y.load(), dx.load();
  const double rounded = format == Format::full ? 0 : 5e-3;
  for (int64_t row = 0; row < probes * batch * length; ++row) {
    const T* const from = &x.values[row % (batch * length) * d];
    double power = 0.01, inner = 0;
    for (int64_t i = 0; i < d; ++i) power += double(from[i]) * from[i] / double(d);
    const double r = 1 / std::sqrt(power);
    for (int64_t i = 0; i < d; ++i) {
      inner += double(dy.values[row * d + i]) * (weighted ? weight[i] : 1) * from[i] / double(d);
      dweight_wanted[row / (batch * length) * d + i] += double(dy.values[row * d + i]) * from[i] * r;
    }
    for (int64_t i = 0; i < d; ++i) {
      const double w = weighted ? weight[i] : 1;
      if (row < batch * length) expect("rms_norm", y.values[row * d + i], T(w * from[i] * r), rounded);
      expect("gradient of rms_norm", dx.values[row * d + i], T(w * dy.values[row * d + i] * r - from[i] * r * r * r * inner), rounded);
    }
  }
  for (size_t k = 0; weighted && k < dweight.size(); ++k) expect("its weight", dweight[k], T(dweight_wanted[k]));
}

template <class T> void floor_of_the_scan(int64_t batch, int64_t length, int64_t d, int64_t n) {
  const Stored<T> dt(batch * length * d, Format::full, positive);
  auto A = random_vector<T>(d * n);
  for (T& a : A) a = -std::abs(a);
  std::vector<T> sums(d);
  exponentials<T>(batch, length, d, n, dt.rows(length, d), A.data(), sums.data(), parallel);
  for (int64_t i = 0; i < d; ++i) {
    double wanted = 0;
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t t = 0; t < length; ++t)
        for (int64_t k = 0; k < n; ++k) wanted += std::exp(double(dt.values[(b * length + t % 32) * d + i]) * A[i * n + k]);
    expect("exponentials", sums[i], T(wanted));
  }
}

struct AttentionShape {
  int64_t batch, length, groups, per_group, d_key, d_value, probes, threads;  // threads: as many as there are said to be
  bool per_key, bonus, all;  // all: reset, h0, and decays of all sizes
  Format format;
};

template <class T> void attention(const AttentionShape& shape) {
  const auto [batch, length, groups, per_group, K, W, probes, threads, per_key, with_bonus, all, format] = shape;
  const int64_t heads = groups * per_group, each = per_key ? K : 1, tokens = batch * length;
  const Stored<T> q(tokens * groups * K, format, number), k(tokens * groups * K, format, number), v(tokens * heads * W, format, number);
  Stored<T> log_a(tokens * heads * each, format, number);
  for (T& a : log_a.values) {
    const T choice = random_number<T>();
    a = -std::abs(a) / 4;
    if (all) a = choice < T(-0.9) ? -std::numeric_limits<T>::infinity() : choice < T(-0.8) ? T(0) : choice < T(-0.6) ? 100 * a : a;
  }
  log_a.store(), log_a.load();
  const auto bonus = random_vector<T>(batch * heads * K), h0 = random_vector<T>(batch * heads * K * W);
  std::vector<char> flags(tokens);
  for (char& f : flags) f = std::rand() % 9 == 0;
  Attention<T> s{batch, length, groups, heads, K, W, per_key, q.rows(length, groups * K), k.rows(length, groups * K),
                 v.rows(length, heads * W), log_a.rows(length, heads * each), all ? Rows{flags.data(), length, 1, Format::full} : Rows{},
                 with_bonus ? bonus.data() : nullptr, all ? h0.data() : nullptr};
  Stored<T> y(tokens * heads * W, format, number);
  std::vector<T> last(h0.size()), saved((s.chunks() + 1) * h0.size());
  most_units = 0;
  s.forward(y.out(length, heads * W), last.data(), length % 2 ? saved.data() : nullptr, threads, parallel);
  if (most_units < std::min(threads, batch * groups * s.chunks())) std::puts("attention is not parallel over chunks"), std::exit(1);
  s.forward(y.out(length, heads * W), last.data(), saved.data(), threads, parallel);
  y.load();
  const double rounded = format == Format::full ? 0 : 1e-2;
  double of_bonus = 0;
  const auto dy = Stored<T>(probes * tokens * heads * W, format, number);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < heads; ++h) {
      std::vector<double> H(K * W);
      for (int64_t i = 0; all && i < K * W; ++i) H[i] = h0[(b * heads + h) * K * W + i];
      for (int64_t t = 0; t < length; ++t) {
        const int64_t row = b * length + t, key = (row * groups + h / per_group) * K, value = (row * heads + h) * W;
        if (all && flags[row]) std::fill(H.begin(), H.end(), 0.0);
        std::vector<double> out(W);
        for (int64_t i = 0; i < K; ++i)
          for (int64_t j = 0; j < W; ++j) {
            const double a = std::exp(double(log_a.values[(row * heads + h) * each + (per_key ? i : 0)]));
            const double here = double(k.values[key + i]) * v.values[value + j], u = bonus[(b * heads + h) * K + i];
            if (with_bonus) out[j] += q.values[key + i] * (H[i * W + j] + u * here);
            of_bonus += u * here * q.values[key + i] * dy.values[value + j];
            H[i * W + j] = a * H[i * W + j] + here;
            if (!with_bonus) out[j] += q.values[key + i] * H[i * W + j];
          }
        for (int64_t j = 0; j < W; ++j) expect("attention", y.values[value + j], T(out[j]), rounded);
      }
      for (int64_t i = 0; i < K * W; ++i) expect("last state of attention", last[(b * heads + h) * K * W + i], T(H[i]));
    }

  Stored<T> dq(probes * tokens * groups * K, format, number), dk = dq, dv(probes * tokens * heads * W, format, number);
  Stored<T> dlog_a(probes * tokens * heads * each, format, number);
  const auto dlast = random_vector<T>(probes * h0.size());
  std::vector<T> dbonus(probes * bonus.size()), dh0(probes * h0.size());
  s.backward({probes * batch, dy.rows(length, heads * W), saved.data(), dlast.data(), dq.out(length, groups * K),
              dk.out(length, groups * K), dv.out(length, heads * W), dlog_a.out(length, heads * each),
              with_bonus ? dbonus.data() : nullptr, all ? dh0.data() : nullptr},
             threads, parallel);
  dq.load(), dk.load(), dv.load(), dlog_a.load();
  const auto product = [](const std::vector<T>& x, const std::vector<T>& dx, int64_t p) {
    double sum = 0;
    for (size_t i = 0; i < x.size(); ++i) sum += double(x[i]) * dx[p * x.size() + i];
    return sum;
  };
  const double loose = 5e-3;
  for (int64_t p = 0; format == Format::full && p < probes; ++p) {
    const double read = product(y.values, dy.values, p), left = read + product(last, dlast, p), begun = all ? product(h0, dh0, p) : 0;
    expect("gradient to q", T(product(q.values, dq.values, p)), T(read), loose);
    expect("gradient to k", T(product(k.values, dk.values, p) + begun), T(left), loose);
    expect("gradient to v", T(product(v.values, dv.values, p) + begun), T(left), loose);
    if (with_bonus && p == 0) expect("gradient to bonus", T(product(bonus, dbonus, p)), T(of_bonus), loose);
  }
  for (T x : dlog_a.values) expect("finite", x - x, T(0));
  if (!std::is_same_v<T, double>) return;
  double slope[2];  // along a random direction in log_a
  const auto direction = random_vector<T>(log_a.values.size());
  Stored<T> near = log_a;
  for (int side : {0, 1}) {
    for (size_t i = 0; i < direction.size(); ++i) near.values[i] = log_a.values[i] + T(side ? 1e-5 : -1e-5) * direction[i];
    near.store();
    s.log_a = near.rows(length, heads * each);
    s.forward(y.out(length, heads * W), last.data(), nullptr, threads, parallel);
    y.load();
    slope[side] = product(y.values, dy.values, 0) + product(last, dlast, 0);
  }
  expect("gradient to log_a", T(product(direction, dlog_a.values, 0)), T((slope[1] - slope[0]) / 2e-5), 1e-5);
}

template <class T> void all() {
  int64_t round = 0;
  const auto format = [&] {  // one after another, those that go with T
    return std::is_same_v<T, double> ? Format::full : Format(round++ % 3);
  };
  for (int64_t d : {1, 5, 8, 17, 150})
    for (int64_t n : {1, 3, 16, 35})
      for (int64_t length : {1, 33, 70}) {
        const bool every = (d + n + length) % 2;
        many_threads = length != 33;
        const Shape mixed{2, length, d, n, 1 + n % 2, d % 3 != 0, n % 3 != 0, every, format()};
        const Shape varying{1 + 39 * (length == 1), length, d, n, 1, true, true, !every, format()};
        selective<T, false>(mixed), selective<T, false>(varying);
        selective<T, true>(mixed), selective<T, true>(varying);
        floor_of_the_scan<T>(2, length, d, n);
      }
  for (int64_t d : {1, 7, 64, 300})
    linear<T>(3, 1 + d % 70, d, 1 + d % 2, format()), linear<T, true>(3, 1 + d % 70, d, 1 + d % 2, Format::full);
  for (int64_t d : {1, 7, 64, 300})
    for (int64_t width : {1, 2, 4})
      convolution<T>(2, 1 + d % 50, d, width, 1 + d % 2, format()), convolution<T>(1, 300, d, width, 1, format());
  for (int64_t d : {1, 7, 64, 300})
    for (bool every : {false, true}) {
      rwkv4<T>(2, 1 + d % 70, d, 1 + d % 2, every, format());
      norm<T>(2, 1 + d % 70, d, 1 + d % 2, every, format());
    }
  for (int64_t length : {2, 9, 64, 65, 150})
    for (int64_t d : {1, 5, 16, 33})
      for (bool per_key : {false, true}) {
        many_threads = d != 5;
        const int64_t other = d % 3 * 8 + 3;
        for (bool bonus : {false, true})
          for (bool every : {false, true})
            attention<T>({1 + d % 2, length, 1 + length % 2, 1 + d % 3, d, other, 1 + d % 2, d % 5 + 1, per_key, bonus, every, format()});
      }
}

int main() {  // under the sanitizers compiling takes long: one type at a time
#ifndef ONLY_DOUBLE
  all<float>();
#endif
#ifndef ONLY_FLOAT
  all<double>();
#endif
  std::puts("ok");
}
