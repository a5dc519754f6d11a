// Runs every CPU kernel, forward and backward, over awkward shapes, on buffers of exactly the right size, so that the address
// and undefined-behaviour sanitizers see each access; checks against a plain loop. No PyTorch. See test_cpu_driver.py.
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "causal_conv1d.h"
#include "linear_scan.h"
#include "selective_scan.h"

using namespace ssmlens;

const auto parallel = [](int64_t units, const auto& work) {  // every unit as a thread of its own would see it
  for (int64_t i = 0; i < units; ++i) work(i, i + 1);
};
template <class T> T random_number() { return T(std::rand()) / T(RAND_MAX) * 2 - 1; }
template <class T> std::vector<T> random_vector(int64_t size) {
  std::vector<T> v(size);
  for (T& x : v) x = random_number<T>();
  return v;
}
template <class T> void expect(const char* what, T actual, T wanted) {
  const T tolerance = sizeof(T) == 4 ? T(2e-4) : T(1e-10);
  if (!(std::abs(actual - wanted) <= tolerance * (1 + std::abs(wanted)))) {
    std::printf("%s: %g, not %g\n", what, double(actual), double(wanted));
    std::exit(1);
  }
}

template <class T> void selective(int64_t batch, int64_t length, int64_t d, int64_t n, bool Bv, bool Cv, bool all, int64_t probes) {
  SelectiveScan<T> s;
  s.batch = batch, s.length = length, s.d_inner = d, s.d_state = n, s.chunk = 32;
  s.dt_softplus = all, s.B_varies = Bv, s.C_varies = Cv;
  auto x = random_vector<T>(batch * length * d), dt = x, z = x, A = random_vector<T>(d * n), D = random_vector<T>(d), bias = D;
  auto B = random_vector<T>(Bv ? batch * length * n : d * n), C = random_vector<T>(Cv ? batch * length * n : d * n);
  auto h0 = random_vector<T>(batch * d * n);
  for (T& v : dt) v = std::abs(random_number<T>());
  for (T& a : A) a = a > T(0.8) ? T(0) : a < T(-0.8) ? -std::numeric_limits<T>::infinity() : -std::abs(a);
  std::vector<char> flags(batch * length);
  for (char& f : flags) f = std::rand() % 7 == 0;
  const auto rows = [&](const std::vector<T>& v, int64_t width) { return Rows<const T>{v.data(), length * width, width}; };
  s.x = rows(x, d), s.dt = rows(dt, d), s.A = A.data();
  s.z = all ? rows(z, d) : Rows<const T>{};
  if (Bv) s.B = rows(B, n);
  if (Cv) s.C = rows(C, n);
  s.B_fixed = B.data(), s.C_fixed = C.data();
  s.D = all ? D.data() : nullptr, s.dt_bias = all ? bias.data() : nullptr, s.h0 = all ? h0.data() : nullptr;
  if (all) s.reset = {reinterpret_cast<const bool*>(flags.data()), length, 1};
  s.prepare();

  std::vector<T> y(batch * length * d), last(batch * d * n);
  Scratch<T> saved(batch * s.blocks * s.chunks * n);
  s.forward({y.data(), last.data(), saved.data()}, parallel);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i < d; ++i) {
      std::vector<T> h(n);
      for (int64_t k = 0; k < n; ++k) h[k] = all ? h0[(b * d + i) * n + k] : T(0);
      for (int64_t t = 0; t < length; ++t) {
        const int64_t at = (b * length + t) * d + i;
        const T step = all ? std::log1p(std::exp(dt[at] + bias[i])) : dt[at];
        T sum = all ? D[i] * x[at] : T(0);
        for (int64_t k = 0; k < n; ++k) {
          const T a = std::isinf(A[i * n + k]) ? T(0) : std::exp(step * A[i * n + k]);
          if (all && flags[b * length + t]) h[k] = 0;
          h[k] = a * h[k] + step * x[at] * B[Bv ? (b * length + t) * n + k : i * n + k];
          sum += h[k] * C[Cv ? (b * length + t) * n + k : i * n + k];
        }
        expect("selective_scan", y[at], all ? sum * z[at] / (1 + std::exp(-z[at])) : sum);
      }
      for (int64_t k = 0; k < n; ++k) expect("final state", last[(b * d + i) * n + k], h[k]);
    }

  const int64_t sequences = batch * probes;
  auto dy = random_vector<T>(sequences * length * d), dlast = random_vector<T>(sequences * d * n);
  std::vector<T> dx(dy.size()), ddt(dy.size()), dz(dy.size()), dA(probes * d * n), dD(probes * d), dbias(probes * d), dh0(dlast.size());
  std::vector<T> dB(Bv ? sequences * length * n : probes * d * n), dC(Cv ? sequences * length * n : probes * d * n);
  s.backward({sequences, probes, rows(dy, d), saved.data(), dlast.data(), dx.data(), ddt.data(), all ? dz.data() : nullptr, dA.data(),
              dB.data(), dC.data(), all ? dD.data() : nullptr, all ? dbias.data() : nullptr, all ? dh0.data() : nullptr},
             parallel);
  for (T v : dx) expect("finite", v - v, T(0));
  for (T v : dA) expect("finite", v - v, T(0));
  if (!all) {  // y is linear in x: <dy, y> + <dh, h> = <dx, x>
    for (int64_t p = 0; p < probes; ++p) {
      double left = 0, right = 0;
      for (size_t k = 0; k < y.size(); ++k)
        left += double(dy[p * y.size() + k]) * y[k], right += double(dx[p * y.size() + k]) * x[k];
      for (size_t k = 0; k < last.size(); ++k) left += double(dlast[p * last.size() + k]) * last[k];
      expect("adjoint of the scan", T(right), T(left));
    }
  }
}

template <class T> void linear(int64_t batch, int64_t length, int64_t inner, int64_t probes) {
  auto a = random_vector<T>(batch * length * inner), u = random_vector<T>(batch * length * inner), h0 = random_vector<T>(batch * inner);
  std::vector<T> h(u.size());
  const LinearScan<T> s{batch, length, inner, {a.data(), length * inner, inner}, h0.data(), {}};
  s.forward({u.data(), length * inner, inner}, h.data(), parallel);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i < inner; ++i) {
      T state = h0[b * inner + i];
      for (int64_t t = 0; t < length; ++t) {
        const int64_t at = (b * length + t) * inner + i;
        state = a[at] * state + u[at];
        expect("linear_scan", h[at], state);
      }
    }
  auto dh = random_vector<T>(probes * h.size());
  std::vector<T> da(dh.size()), du(dh.size()), dh0(probes * h0.size());
  s.backward(probes * batch, {dh.data(), length * inner, inner}, h.data(), da.data(), du.data(), dh0.data(), parallel);
  for (int64_t p = 0; p < probes; ++p) {
    double left = 0, right = 0;
    for (size_t k = 0; k < h.size(); ++k) left += double(dh[p * h.size() + k]) * h[k], right += double(du[p * h.size() + k]) * u[k];
    for (size_t k = 0; k < h0.size(); ++k) right += double(dh0[p * h0.size() + k]) * h0[k];
    expect("adjoint of linear_scan", T(right), T(left));
  }
}

template <class T> void convolution(int64_t batch, int64_t length, int64_t d, int64_t width, int64_t probes) {
  auto x = random_vector<T>(batch * length * d), weight = random_vector<T>(d * width), before = random_vector<T>(batch * (width - 1) * d);
  CausalConv1d<T> c;
  c.batch = batch, c.length = length, c.d = d, c.width = width, c.silu = false;
  c.x = {x.data(), length * d, d};
  if (width > 1) c.initial = {before.data(), (width - 1) * d, d};
  c.weight = weight.data(), c.bias = nullptr;
  c.prepare();
  std::vector<T> y(x.size());
  c.forward(y.data(), parallel);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t t = 0; t < length; ++t)
      for (int64_t i = 0; i < d; ++i) {
        T sum = 0;
        for (int64_t j = 0; j < width; ++j) {
          const int64_t from = t - width + 1 + j;
          sum += weight[i * width + j] *
                 (from >= 0 ? x[(b * length + from) * d + i] : before[(b * (width - 1) + from + width - 1) * d + i]);
        }
        expect("causal_conv1d", y[(b * length + t) * d + i], sum);
      }
  auto dy = random_vector<T>(probes * y.size());
  std::vector<T> dx(dy.size()), dweight(probes * weight.size()), dbias(probes * d), dbefore(probes * before.size());
  c.backward({probes * batch, probes, {dy.data(), length * d, d}, dx.data(), dweight.data(), dbias.data(), dbefore.data()}, parallel);
  for (int64_t p = 0; p < probes; ++p) {
    double left = 0, in_x = 0, in_weight = 0;
    for (size_t k = 0; k < y.size(); ++k) left += double(dy[p * y.size() + k]) * y[k], in_x += double(dx[p * y.size() + k]) * x[k];
    for (size_t k = 0; k < before.size(); ++k) in_x += double(dbefore[p * before.size() + k]) * before[k];
    for (size_t k = 0; k < weight.size(); ++k) in_weight += double(dweight[p * weight.size() + k]) * weight[k];
    expect("adjoint of causal_conv1d", T(in_x), T(left));
    expect("adjoint of causal_conv1d, weight", T(in_weight), T(left));
  }
}

template <class T> void all() {
  for (int64_t d : {1, 5, 8, 17, 150})
    for (int64_t n : {1, 3, 16, 35})
      for (int64_t length : {1, 33, 70}) {
        const bool every = (d + n + length) % 2;
        selective<T>(2, length, d, n, d % 3, n % 3, every, 1 + n % 2);
        selective<T>(1 + 39 * (length == 1), length, d, n, true, true, !every, 1);
      }
  for (int64_t inner : {1, 7, 64, 300}) linear<T>(3, 1 + inner % 10, inner, 1 + inner % 2);
  for (int64_t d : {1, 7, 64, 300})
    for (int64_t width : {1, 2, 4}) convolution<T>(2, 1 + d % 50, d, width, 1 + d % 2), convolution<T>(1, 300, d, width, 1);
}

int main() {
  all<float>();
  all<double>();
  std::puts("ok");
}
