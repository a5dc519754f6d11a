// Registers the CPU kernels as torch.ops.ssmlens_cpu.*; _library.py gives them gradients and fake kernels.
#include "torch.h"

#include "causal_conv1d.h"
#include "exponentials.h"
#include "linear_scan.h"
#include "rms_norm.h"
#include "rwkv4.h"
#include "selective_scan.h"

namespace {

bool is_complex(const Tensor& t) {
  return t.scalar_type() == ScalarType::ComplexFloat || t.scalar_type() == ScalarType::ComplexDouble;
}
template <template <class, bool> class Scan, class F> void dispatch_scan(const Tensor& like, const F& f) {
  switch (like.scalar_type()) {
    case ScalarType::Double: return f(Scan<double, false>{});
    case ScalarType::ComplexFloat: return f(Scan<float, true>{});
    case ScalarType::ComplexDouble: return f(Scan<double, true>{});
    default: return f(Scan<float, false>{});
  }
}

// ---------------------------------------------------------------- selective_scan
template <class Scan> void set(typename Scan::Coefficients& m, const Tensor& t) {
  m.varies = t.dim() == 3;
  m.rows_are_complex = is_complex(t);
  if (m.varies) {
    m.rows = rows(t);
  } else {
    m.fixed = data<typename Scan::K>(t);
  }
}
template <class Scan> typename Scan::CoefficientGradient gradient(const Tensor& t, const Tensor& of) {
  if (of.dim() == 3) return {out_rows(t), is_complex(t), nullptr};
  return {{}, false, out<typename Scan::K>(t)};
}
template <class Scan>
void prepare(Scan& s, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C, const Maybe& D,
             const Maybe& z, const Maybe& dt_bias, bool dt_softplus, const Maybe& h0, const Maybe& reset, int64_t chunk) {
  using T = typename Scan::Element;
  using K = typename Scan::K;
  s.batch = x.size(0), s.length = x.size(1), s.d_inner = x.size(2), s.d_state = A.size(1);
  s.chunk = chunk, s.dt_softplus = dt_softplus;
  s.x = rows(x), s.dt = rows(dt), s.z = rows(z), s.reset = rows(reset);
  set<Scan>(s.B, B), set<Scan>(s.C, C);
  s.A = data<K>(A), s.h0 = data<K>(h0), s.D = data<T>(D), s.dt_bias = data<T>(dt_bias);
  s.prepare();
}

// saved: the workspace of the backward pass, or empty where there will be none.
NOINLINE void selective_scan(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C, const Maybe& D,
                    const Maybe& z, const Maybe& dt_bias, bool dt_softplus, const Maybe& h0, const Maybe& reset, int64_t chunk,
                    Tensor y, Tensor final_state, Tensor saved) {
  dispatch_scan<SelectiveScan>(A, [&](auto s) {
    using Scan = decltype(s);
    prepare(s, x, dt, A, B, C, D, z, dt_bias, dt_softplus, h0, reset, chunk);
    s.forward({out_rows(y), out<typename Scan::K>(final_state), saved.numel() ? out<typename Scan::N>(saved) : nullptr},
              fading);
  });
}

NOINLINE void selective_scan_backward(const Tensor& dy, const Maybe& dfinal, const Tensor& saved, const Tensor& x, const Tensor& dt,
                             const Tensor& A, const Tensor& B, const Tensor& C, const Maybe& D, const Maybe& z,
                             const Maybe& dt_bias, bool dt_softplus, const Maybe& h0, const Maybe& reset, int64_t chunk,
                             int64_t samples, Tensor dx, Tensor ddt, Tensor dA, Tensor dB, Tensor dC, Maybe dD, Maybe dz,
                             Maybe ddt_bias, Maybe dh0) {
  dispatch_scan<SelectiveScan>(A, [&](auto s) {
    using Scan = decltype(s);
    using T = typename Scan::Element;
    using K = typename Scan::K;
    prepare(s, x, dt, A, B, C, D, z, dt_bias, dt_softplus, h0, reset, chunk);
    s.backward({dy.size(0), samples, rows(dy), data<typename Scan::N>(saved), data<K>(dfinal), out_rows(dx), out_rows(ddt),
                out_rows(dz), gradient<Scan>(dB, B), gradient<Scan>(dC, C), out<K>(dA), out<T>(dD), out<T>(ddt_bias), out<K>(dh0)},
               fading);
  });
}

// The exponentials alone, see exponentials.h; sums (d)
NOINLINE void only_exponentials(const Tensor& dt, const Tensor& A, Tensor sums) {
  dispatch(A, [&](auto zero) {
    using T = decltype(zero);
    exponentials<T>(dt.size(0), dt.size(1), dt.size(2), A.size(1), rows(dt), data<T>(A), out<T>(sums), parallel);
  });
}

// ---------------------------------------------------------------- linear_scan
template <class Scan> Scan linear(const Tensor& a, const Tensor& u, const Maybe& h0, const Maybe& reset) {
  return {u.size(0), u.size(1), u.size(2), rows(a), rows(u), rows(reset), data<typename Scan::K>(h0)};
}
NOINLINE void linear_scan(const Tensor& a, const Tensor& u, const Maybe& h0, const Maybe& reset, Tensor h, Tensor final_state,
                 Tensor saved) {
  dispatch_scan<LinearScan>(final_state, [&](auto like) {
    using K = typename decltype(like)::K;
    linear<decltype(like)>(a, u, h0, reset)
        .forward(out_rows(h), out<K>(final_state), saved.numel() ? out<K>(saved) : nullptr, fading);
  });
}
NOINLINE void linear_scan_backward(const Tensor& dh, const Maybe& dfinal, const Tensor& saved, const Tensor& a, const Tensor& u,
                          const Maybe& h0, const Maybe& reset, Tensor da, Tensor du, Maybe dh0) {
  dispatch_scan<LinearScan>(saved, [&](auto like) {
    using K = typename decltype(like)::K;
    linear<decltype(like)>(a, u, h0, reset)
        .backward({dh.size(0), rows(dh), data<K>(dfinal), data<K>(saved), out_rows(da), out_rows(du), out<K>(dh0)}, fading);
  });
}

// ---------------------------------------------------------------- causal_conv1d
template <class T>
CausalConv1d<T> convolution(const Tensor& x, const Tensor& weight, const Maybe& bias, bool silu, const Maybe& initial,
                            const Maybe& reset) {
  CausalConv1d<T> c;
  c.batch = x.size(0), c.length = x.size(1), c.d = x.size(2), c.width = weight.size(1), c.silu = silu;
  c.x = rows(x), c.initial = rows(initial), c.reset = rows(reset);
  c.weight = data<T>(weight), c.bias = data<T>(bias);
  c.prepare();
  return c;
}
NOINLINE void causal_conv1d(const Tensor& x, const Tensor& weight, const Maybe& bias, bool silu, const Maybe& initial,
                   const Maybe& reset, Tensor y) {
  dispatch(weight, [&](auto zero) {
    convolution<decltype(zero)>(x, weight, bias, silu, initial, reset).forward(out_rows(y), parallel);
  });
}
NOINLINE void causal_conv1d_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Maybe& bias, bool silu,
                            const Maybe& initial, const Maybe& reset, int64_t samples, Tensor dx, Tensor dweight, Maybe dbias,
                            Maybe dinitial) {
  dispatch(weight, [&](auto zero) {
    using T = decltype(zero);
    convolution<T>(x, weight, bias, silu, initial, reset)
        .backward({dy.size(0), samples, rows(dy), out_rows(dx), out<T>(dweight), out<T>(dbias), out_rows(dinitial)}, fading);
  });
}

// ---------------------------------------------------------------- rwkv4_attention
template <class T>
Rwkv4<T> rwkv4(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& u, const Maybe& p,
               const Maybe& s, const Maybe& m, const Maybe& reset) {
  return {v.size(0), v.size(1), v.size(2), rows(r), rows(k), rows(v), rows(reset), data<T>(w), data<T>(u),
          data<T>(p), data<T>(s), data<T>(m)};
}
NOINLINE void rwkv4_attention(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& u, const Maybe& p,
                     const Maybe& s, const Maybe& m, const Maybe& reset, Tensor y, Tensor p_final, Tensor s_final,
                     Tensor m_final, Tensor saved) {
  dispatch(w, [&](auto zero) {
    using T = decltype(zero);
    rwkv4<T>(r, k, v, w, u, p, s, m, reset)
        .forward(out_rows(y), out<T>(p_final), out<T>(s_final), out<T>(m_final), saved.numel() ? out<T>(saved) : nullptr,
                 fading);
  });
}
NOINLINE void rwkv4_attention_backward(const Tensor& dy, const Maybe& dp, const Maybe& ds, const Maybe& dm, const Tensor& saved,
                              const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& u,
                              const Maybe& p, const Maybe& s, const Maybe& m, const Maybe& reset, int64_t samples, Tensor dr,
                              Tensor dk, Tensor dv, Tensor dw, Tensor du, Maybe dp0, Maybe ds0, Maybe dm0) {
  dispatch(w, [&](auto zero) {
    using T = decltype(zero);
    rwkv4<T>(r, k, v, w, u, p, s, m, reset)
        .backward({dy.size(0), samples, rows(dy), data<T>(saved), data<T>(dp), data<T>(ds), data<T>(dm), out_rows(dr),
                   out_rows(dk), out_rows(dv), out<T>(dw), out<T>(du), out<T>(dp0), out<T>(ds0), out<T>(dm0)},
                  fading);
  });
}

// ---------------------------------------------------------------- rms_norm
template <class T> RmsNorm<T> norm(const Tensor& x, const Maybe& weight, double eps) {
  return {x.size(0), x.size(1), x.size(2), rows(x), data<T>(weight), T(eps)};
}
NOINLINE void rms_norm(const Tensor& x, const Maybe& weight, double eps, Tensor y, Tensor inverse) {
  dispatch(inverse, [&](auto zero) {
    using T = decltype(zero);
    norm<T>(x, weight, eps).forward(out_rows(y), out<T>(inverse), parallel);
  });
}
NOINLINE void rms_norm_backward(const Tensor& dy, const Tensor& inverse, const Tensor& x, const Maybe& weight, double eps,
                       int64_t samples, Tensor dx, Maybe dweight) {
  dispatch(inverse, [&](auto zero) {
    using T = decltype(zero);
    norm<T>(x, weight, eps)
        .backward({dy.size(0), samples, rows(dy), data<T>(inverse), out_rows(dx), out<T>(dweight)}, fading);
  });
}

int64_t vector_width() { return vector_bytes; }

}  // namespace

STABLE_TORCH_LIBRARY(ssmlens_cpu, m) {
  m.def("selective_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
        "bool dt_softplus, Tensor? h0, Tensor? reset, int chunk, Tensor(a!) y, Tensor(b!) final_state, "
        "Tensor(c!) saved) -> ()");
  m.def("selective_scan_backward(Tensor dy, Tensor? dfinal, Tensor saved, Tensor x, Tensor dt, Tensor A, Tensor B, "
        "Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus, Tensor? h0, Tensor? reset, int chunk, "
        "int samples, Tensor(a!) dx, Tensor(b!) ddt, Tensor(c!) dA, Tensor(d!) dB, Tensor(e!) dC, Tensor(f!)? dD, "
        "Tensor(g!)? dz, Tensor(h!)? ddt_bias, Tensor(i!)? dh0) -> ()");
  m.def("exponentials(Tensor dt, Tensor A, Tensor(a!) sums) -> ()");
  m.def("linear_scan(Tensor a, Tensor u, Tensor? h0, Tensor? reset, Tensor(a!) h, Tensor(b!) final_state, "
        "Tensor(c!) saved) -> ()");
  m.def("linear_scan_backward(Tensor dh, Tensor? dfinal, Tensor saved, Tensor a, Tensor u, Tensor? h0, Tensor? reset, "
        "Tensor(a!) da, Tensor(b!) du, Tensor(c!)? dh0) -> ()");
  m.def("causal_conv1d(Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial, Tensor? reset, "
        "Tensor(a!) y) -> ()");
  m.def("causal_conv1d_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial, "
        "Tensor? reset, int samples, Tensor(a!) dx, Tensor(b!) dweight, Tensor(c!)? dbias, Tensor(d!)? dinitial) -> ()");
  m.def("rwkv4_attention(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor? p, Tensor? s, Tensor? m, Tensor? reset, "
        "Tensor(a!) y, Tensor(b!) p_final, Tensor(c!) s_final, Tensor(d!) m_final, Tensor(e!) saved) -> ()");
  m.def("rwkv4_attention_backward(Tensor dy, Tensor? dp, Tensor? ds, Tensor? dm, Tensor saved, Tensor r, Tensor k, "
        "Tensor v, Tensor w, Tensor u, Tensor? p, Tensor? s, Tensor? m, Tensor? reset, int samples, Tensor(a!) dr, "
        "Tensor(b!) dk, Tensor(c!) dv, Tensor(d!) dw, Tensor(e!) du, Tensor(f!)? dp0, Tensor(g!)? ds0, Tensor(h!)? dm0) "
        "-> ()");
  m.def("gated_linear_attention(Tensor q, Tensor k, Tensor v, Tensor log_a, Tensor? bonus, Tensor? h0, Tensor? reset, "
        "int groups, int heads, int threads, Tensor(a!) y, Tensor(b!) final_state, Tensor(c!) saved) -> ()");
  m.def("gated_linear_attention_backward(Tensor dy, Tensor? dfinal, Tensor saved, Tensor q, Tensor k, Tensor v, Tensor log_a, "
        "Tensor? bonus, Tensor? h0, Tensor? reset, int groups, int heads, int threads, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, "
        "Tensor(d!) dlog_a, Tensor(e!)? dbonus, Tensor(f!)? dh0) -> ()");
  m.def("rms_norm(Tensor x, Tensor? weight, float eps, Tensor(a!) y, Tensor(b!) inverse) -> ()");
  m.def("rms_norm_backward(Tensor dy, Tensor inverse, Tensor x, Tensor? weight, float eps, int samples, Tensor(a!) dx, "
        "Tensor(b!)? dweight) -> ()");
  m.def("vector_bytes() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(ssmlens_cpu, CPU, m) {
  m.impl("selective_scan", TORCH_BOX(&selective_scan));
  m.impl("selective_scan_backward", TORCH_BOX(&selective_scan_backward));
  m.impl("exponentials", TORCH_BOX(&only_exponentials));
  m.impl("linear_scan", TORCH_BOX(&linear_scan));
  m.impl("linear_scan_backward", TORCH_BOX(&linear_scan_backward));
  m.impl("causal_conv1d", TORCH_BOX(&causal_conv1d));
  m.impl("causal_conv1d_backward", TORCH_BOX(&causal_conv1d_backward));
  m.impl("rwkv4_attention", TORCH_BOX(&rwkv4_attention));
  m.impl("rwkv4_attention_backward", TORCH_BOX(&rwkv4_attention_backward));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}
STABLE_TORCH_LIBRARY_IMPL(ssmlens_cpu, CompositeExplicitAutograd, m) { m.impl("vector_bytes", TORCH_BOX(&vector_width)); }
