// Registers the CPU kernels as torch.ops.ssmlens_cpu.*; ops.py gives them gradients and fake kernels. The only file that
// knows PyTorch, and only its stable ABI (PyTorch 2.10 and later). Callers have checked shapes, dtypes and layouts:
// every tensor is contiguous in its last dimension, outputs are fully contiguous.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 10) << 48))
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <optional>

#include "causal_conv1d.h"
#include "linear_scan.h"
#include "selective_scan.h"

namespace {

using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;
using namespace ssmlens;

// Every unit of work is large, so one per thread is enough to share; PyTorch's own pool, PyTorch's number of threads.
const auto parallel = [](int64_t units, const auto& work) { torch::stable::parallel_for(0, units, 1, work); };

template <class T> Rows<const T> rows(const Tensor& t) {
  return {static_cast<const T*>(t.const_data_ptr()), t.stride(0), t.stride(1)};
}
template <class T> Rows<const T> rows(const Maybe& t) { return t ? rows<T>(*t) : Rows<const T>{}; }
template <class T> const T* data(const Maybe& t) { return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr; }
template <class T> T* out(const Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); }
template <class T> T* out(const Maybe& t) { return t ? out<T>(*t) : nullptr; }

template <class F> void dispatch(const Tensor& x, const F& f) {
  if (x.scalar_type() == torch::headeronly::ScalarType::Double) {
    f(double{});
  } else {
    f(float{});
  }
}

template <class T>
SelectiveScan<T> selective(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                           const Maybe& D, const Maybe& z, const Maybe& dt_bias, bool dt_softplus, const Maybe& h0,
                           const Maybe& reset, int64_t chunk) {
  SelectiveScan<T> s;
  s.chunk = chunk;
  s.batch = x.size(0), s.length = x.size(1), s.d_inner = x.size(2), s.d_state = A.size(1);
  s.dt_softplus = dt_softplus, s.B_varies = B.dim() == 3, s.C_varies = C.dim() == 3;
  s.x = rows<T>(x), s.dt = rows<T>(dt), s.z = rows<T>(z);
  if (s.B_varies) s.B = rows<T>(B);
  if (s.C_varies) s.C = rows<T>(C);
  s.A = data<T>(A), s.D = data<T>(D), s.dt_bias = data<T>(dt_bias), s.h0 = data<T>(h0);
  s.B_fixed = data<T>(B), s.C_fixed = data<T>(C);
  s.reset = rows<bool>(reset);
  s.prepare();
  return s;
}

// saved: the workspace of the backward pass, or empty where there will be none.
void selective_scan(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C, const Maybe& D,
                    const Maybe& z, const Maybe& dt_bias, bool dt_softplus, const Maybe& h0, const Maybe& reset, int64_t chunk,
                    Tensor y, Tensor final_state, Tensor saved) {
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    const auto s = selective<T>(x, dt, A, B, C, D, z, dt_bias, dt_softplus, h0, reset, chunk);
    s.forward({out<T>(y), out<T>(final_state), saved.numel() ? out<Vec<T>>(saved) : nullptr}, parallel);
  });
}

void selective_scan_backward(const Tensor& dy, const Maybe& dfinal, const Tensor& saved, const Tensor& x, const Tensor& dt,
                             const Tensor& A, const Tensor& B, const Tensor& C, const Maybe& D, const Maybe& z,
                             const Maybe& dt_bias, bool dt_softplus, const Maybe& h0, const Maybe& reset, int64_t chunk,
                             int64_t samples, Tensor dx, Tensor ddt, Tensor dA, Tensor dB, Tensor dC, Maybe dD, Maybe dz, Maybe ddt_bias,
                             Maybe dh0) {
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    const auto s = selective<T>(x, dt, A, B, C, D, z, dt_bias, dt_softplus, h0, reset, chunk);
    s.backward({dy.size(0), samples, rows<T>(dy), static_cast<const Vec<T>*>(saved.const_data_ptr()), data<T>(dfinal),
                out<T>(dx), out<T>(ddt), out<T>(dz), out<T>(dA), out<T>(dB), out<T>(dC), out<T>(dD), out<T>(ddt_bias),
                out<T>(dh0)},
               parallel);
  });
}

void linear_scan(const Tensor& a, const Tensor& u, const Maybe& h0, const Maybe& reset, Tensor h) {
  dispatch(u, [&](auto zero) {
    using T = decltype(zero);
    const LinearScan<T> s{u.size(0), u.size(1), u.size(2), rows<T>(a), data<T>(h0), rows<bool>(reset)};
    s.forward(rows<T>(u), out<T>(h), parallel);
  });
}

void linear_scan_backward(const Tensor& dh, const Tensor& a, const Tensor& h, const Maybe& h0, const Maybe& reset, Tensor da,
                          Tensor du, Maybe dh0) {
  dispatch(h, [&](auto zero) {
    using T = decltype(zero);
    const LinearScan<T> s{h.size(0), h.size(1), h.size(2), rows<T>(a), data<T>(h0), rows<bool>(reset)};
    s.backward(dh.size(0), rows<T>(dh), static_cast<const T*>(h.const_data_ptr()), out<T>(da), out<T>(du), out<T>(dh0), parallel);
  });
}

template <class T>
CausalConv1d<T> convolution(const Tensor& x, const Tensor& weight, const Maybe& bias, bool silu, const Maybe& initial,
                            const Maybe& reset) {
  CausalConv1d<T> c;
  c.batch = x.size(0), c.length = x.size(1), c.d = x.size(2), c.width = weight.size(1), c.silu = silu;
  c.x = rows<T>(x), c.initial = rows<T>(initial), c.reset = rows<bool>(reset);
  c.weight = data<T>(weight), c.bias = data<T>(bias);
  c.prepare();
  return c;
}

void causal_conv1d(const Tensor& x, const Tensor& weight, const Maybe& bias, bool silu, const Maybe& initial,
                   const Maybe& reset, Tensor y) {
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    convolution<T>(x, weight, bias, silu, initial, reset).forward(out<T>(y), parallel);
  });
}

void causal_conv1d_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Maybe& bias, bool silu,
                            const Maybe& initial, const Maybe& reset, int64_t samples, Tensor dx, Tensor dweight, Maybe dbias,
                            Maybe dinitial) {
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    convolution<T>(x, weight, bias, silu, initial, reset)
        .backward({dy.size(0), samples, rows<T>(dy), out<T>(dx), out<T>(dweight), out<T>(dbias), out<T>(dinitial)}, parallel);
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
  m.def("linear_scan(Tensor a, Tensor u, Tensor? h0, Tensor? reset, Tensor(a!) h) -> ()");
  m.def("linear_scan_backward(Tensor dh, Tensor a, Tensor h, Tensor? h0, Tensor? reset, Tensor(a!) da, Tensor(b!) du, "
        "Tensor(c!)? dh0) -> ()");
  m.def("causal_conv1d(Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial, Tensor? reset, "
        "Tensor(a!) y) -> ()");
  m.def("causal_conv1d_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial, "
        "Tensor? reset, int samples, Tensor(a!) dx, Tensor(b!) dweight, Tensor(c!)? dbias, Tensor(d!)? dinitial) -> ()");
  m.def("vector_bytes() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(ssmlens_cpu, CPU, m) {
  m.impl("selective_scan", TORCH_BOX(&selective_scan));
  m.impl("selective_scan_backward", TORCH_BOX(&selective_scan_backward));
  m.impl("linear_scan", TORCH_BOX(&linear_scan));
  m.impl("linear_scan_backward", TORCH_BOX(&linear_scan_backward));
  m.impl("causal_conv1d", TORCH_BOX(&causal_conv1d));
  m.impl("causal_conv1d_backward", TORCH_BOX(&causal_conv1d_backward));
}
STABLE_TORCH_LIBRARY_IMPL(ssmlens_cpu, CompositeExplicitAutograd, m) { m.impl("vector_bytes", TORCH_BOX(&vector_width)); }
