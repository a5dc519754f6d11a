// Vectors of inner channels: one type per element type, as wide as the machine's registers, through the compiler's
// vector extension (GCC and Clang). One source for AVX-512, AVX2, SSE2 and NEON; no intrinsics.
#pragma once
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

namespace ssmlens {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))  // what need not be compiled again wherever it is used

template <class T> struct Simd;
template <> struct Simd<float> {
  static constexpr int width = vector_bytes / sizeof(float);
  typedef float V __attribute__((vector_size(vector_bytes)));
  typedef uint32_t Bits __attribute__((vector_size(vector_bytes)));
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float shifter = 12582912.0f + bias;  // 1.5 * 2^23: adding it rounds to an integer
};
template <> struct Simd<double> {
  static constexpr int width = vector_bytes / sizeof(double);
  typedef double V __attribute__((vector_size(vector_bytes)));
  typedef uint64_t Bits __attribute__((vector_size(vector_bytes)));
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double shifter = 6755399441055744.0 + bias;  // 1.5 * 2^52
};
template <class T> using Vec = typename Simd<T>::V;

template <class T> INLINE Vec<T> splat(T value) { return value - Vec<T>{}; }

template <int n> using Int = std::integral_constant<int, n>;
// work(0), work(1) ... work(count - 1), written out, so that arrays that it indexes can live in registers.
template <class F, int... k> INLINE void unrolled(const F& work, std::integer_sequence<int, k...>) { (work(k), ...); }
template <int count, class F> INLINE void unrolled(const F& work) {
  unrolled(work, std::make_integer_sequence<int, count>{});
}
#define ALWAYS __attribute__((always_inline))  // of a lambda

// The first `count` lanes from memory, zeros above them.
template <class T> NOINLINE Vec<T> load_part(const T* from, int count) {
  T lanes[Simd<T>::width] = {};
  for (int i = 0; i < count; ++i) lanes[i] = from[i];
  Vec<T> v;
  std::memcpy(&v, lanes, sizeof v);
  return v;
}
template <class T> NOINLINE void store_part(T* to, Vec<T> v, int count) {
  for (int i = 0; i < count; ++i) to[i] = v[i];
}
template <class T> INLINE Vec<T> load(const T* from, int count = Simd<T>::width) {
  if (__builtin_expect(count != Simd<T>::width, 0)) return load_part<T>(from, count);
  Vec<T> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <class T> INLINE void store(T* to, const Vec<T>& v, int count = Simd<T>::width) {
  if (__builtin_expect(count != Simd<T>::width, 0)) return store_part<T>(to, v, count);
  std::memcpy(to, &v, sizeof v);
}

// exp(s * A) where high + low = A * log2(e): 2^n times a polynomial for 2^f on [-1/2, 1/2] (interpolated at Chebyshev
// nodes; relative error 5e-9 and 1e-19). The product s * A is never rounded where the machine has fused multiply-add.
// Exactly 1 at s = 0; 0 below the smallest normal number, infinity above the largest; NaN stays NaN.
template <class T> INLINE Vec<T> exp_of_product(Vec<T> s, Vec<T> high, Vec<T> low) {
  using S = Simd<T>;
  using V = Vec<T>;
  const V shifted = s * high + S::shifter;
  const V n = shifted - S::shifter;
  const V f = (s * high - n) + s * low;
  V p;
  if constexpr (std::is_same_v<T, float>) {
    p = f * 1.5453162945e-4f + 1.3390863366e-3f;
    p = p * f + 9.6180825728e-3f;
    p = p * f + 5.5503571141e-2f;
    p = p * f + 2.4022650761e-1f;
    p = p * f + 6.9314718803e-1f;
  } else {
    p = f * 2.5729324177362304214e-11 + 4.455817908336064493e-10;
    p = p * f + 7.0548973041554992774e-9;
    p = p * f + 1.0178057087733941105e-7;
    p = p * f + 1.321548680870556279e-6;
    p = p * f + 1.5252733841556772589e-5;
    p = p * f + 1.5403530393370733411e-4;
    p = p * f + 1.3333558146406470697e-3;
    p = p * f + 9.6181291076284794928e-3;
    p = p * f + 5.5504108664821627039e-2;
    p = p * f + 2.4022650695910071233e-1;
    p = p * f + 6.9314718055994530925e-1;
  }
  p = p * f + T(1);
  typename S::Bits bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits <<= S::mantissa;  // the integer part, with its bias, becomes the exponent
  V scale;
  std::memcpy(&scale, &bits, sizeof scale);
  V e = p * scale;
  e = shifted < splat<T>(S::shifter + T(1 - S::bias)) ? V{} : e;
  return shifted > splat<T>(S::shifter + T(S::bias)) ? splat<T>(std::numeric_limits<T>::infinity()) : e;
}

// a b - c with one rounding, which leaves the exact remainder of a product; `double` does it for old machines' floats.
template <class T> INLINE Vec<T> fused_difference(Vec<T> a, Vec<T> b, Vec<T> c) {
#if !defined(__FMA__) && !defined(__ARM_FEATURE_FMA)
  if constexpr (std::is_same_v<T, float>) {
    typedef double Wide __attribute__((vector_size(2 * vector_bytes)));
    return __builtin_convertvector(__builtin_convertvector(a, Wide) * __builtin_convertvector(b, Wide) -
                                       __builtin_convertvector(c, Wide), Vec<T>);
  }
#endif
  return a * b - c;
}

// A real number as an unevaluated sum of two, times a constant: what exp_of_product wants, times log2(e).
constexpr long double log2e = 1.442695040888963407359924681001892137427L;
template <class T> struct Split {
  T high, low;
};
template <class T> NOINLINE Split<T> times(T a, long double constant) {
  using Wide = std::conditional_t<std::is_same_v<T, float>, double, long double>;
  const Wide product = Wide(a) * Wide(constant);
  const Wide most = std::numeric_limits<T>::max();
  if (product < -most) return {-std::numeric_limits<T>::max(), T(0)};
  const T high = T(product);
  return {high, T(product - Wide(high))};
}

template <class T> INLINE Vec<T> exp(Vec<T> v) {
  constexpr T high = T(log2e), low = T(log2e - static_cast<long double>(high));
  return exp_of_product<T>(v, splat<T>(high), splat<T>(low));
}
template <class T> INLINE Vec<T> negative_abs(Vec<T> v) { return v > Vec<T>{} ? -v : v; }

template <class T> INLINE Vec<T> sigmoid(Vec<T> v) {
  const Vec<T> e = exp<T>(negative_abs<T>(v));
  return (v < Vec<T>{} ? e : splat<T>(T(1))) / (T(1) + e);
}
// log(1 + e^v) = max(v, 0) + log1p(e), e = exp(-|v|); log1p(e) = 2 atanh(e / (2 + e)), whose argument is at most 1/3.
// Its derivative is sigmoid(v); one division serves both.
template <class T> INLINE Vec<T> softplus(Vec<T> v, Vec<T>& slope) {
  constexpr int terms = std::is_same_v<T, float> ? 8 : 17;
  const Vec<T> e = exp<T>(negative_abs<T>(v)), e1 = T(1) + e, e2 = T(2) + e, inverse = T(1) / (e1 * e2);
  const Vec<T> s = e * e1 * inverse, s2 = s * s;
  slope = (v < Vec<T>{} ? e : splat<T>(T(1))) * e2 * inverse;
  Vec<T> sum = splat<T>(T(1) / T(2 * terms - 1));
  for (int k = terms - 2; k >= 0; --k) sum = sum * s2 + T(1) / T(2 * k + 1);
  return (v > Vec<T>{} ? v : Vec<T>{}) + T(2) * s * sum;
}

// Sums over lanes, of `count` vectors at once: out[k] += sum of the lanes of v[k]. Pairs of vectors are folded into one
// with half as many lanes each, until every lane holds one sum: a fixed order, and 3 instructions per vector, not 8.
#if defined(__clang__) || __GNUC__ >= 12
template <int span, int from, class V, int... lane>
INLINE V fold_half(V a, V b, std::integer_sequence<int, lane...>) {
  constexpr int width = sizeof...(lane);
  // Inside each segment of `span` lanes: its first half comes from a's segment, its second half from b's.
  return __builtin_shufflevector(
      a, b,
      (lane % span < span / 2 ? (lane / span) * span + lane % (span / 2) + from * (span / 2)
                              : width + (lane / span) * span + lane % (span / 2) + from * (span / 2))...);
}
template <int span, class T> INLINE Vec<T> fold(Vec<T> a, Vec<T> b) {
  constexpr auto lanes = std::make_integer_sequence<int, Simd<T>::width>{};
  return fold_half<span, 0>(a, b, lanes) + fold_half<span, 1>(a, b, lanes);
}
// to[k] += v[k * step]
template <int step, class T, int... k> INLINE void add_lanes(T* to, Vec<T> v, std::integer_sequence<int, k...>) {
  typedef T Part __attribute__((vector_size(sizeof...(k) * sizeof(T))));
  Part sum;
  std::memcpy(&sum, to, sizeof sum);
  sum += __builtin_shufflevector(v, v, (k * step)...);
  std::memcpy(to, &sum, sizeof sum);
}
#else
template <int span, class T> INLINE Vec<T> fold(Vec<T> a, Vec<T> b) {
  Vec<T> sum;
  for (int lane = 0; lane < Simd<T>::width; ++lane) {
    const int at = (lane / span) * span + lane % (span / 2);
    sum[lane] = lane % span < span / 2 ? a[at] + a[at + span / 2] : b[at] + b[at + span / 2];
  }
  return sum;
}
template <int step, class T, int... k> INLINE void add_lanes(T* to, Vec<T> v, std::integer_sequence<int, k...>) {
  ((to[k] += v[k * step]), ...);
}
#endif
// `count` vectors in, one out: the sum of vector k in lane k * width / count. Widest segments first.
template <int count, class T, int span = Simd<T>::width> INLINE Vec<T> fold_all(const Vec<T>* v) {
  if constexpr (span == 1) {
    return v[0];
  } else if constexpr (count == 1) {
    const Vec<T> folded = fold<span, T>(v[0], v[0]);
    return fold_all<1, T, span / 2>(&folded);
  } else {
    Vec<T> folded[count / 2];
    unrolled<count / 2>([&](int k) ALWAYS { folded[k] = fold<span, T>(v[k], v[k + count / 2]); });
    return fold_all<count / 2, T, span / 2>(folded);
  }
}
// count is a power of two.
template <int count, class T> INLINE void add_lane_sums(T* out, const Vec<T>* v) {
  constexpr int width = Simd<T>::width;
  if constexpr (count > width) {
    add_lane_sums<width, T>(out, v);
    add_lane_sums<count - width, T>(out + width, v + width);
  } else if constexpr (count == 1) {
    out[0] += fold_all<1, T>(v)[0];
  } else {
    add_lanes<width / count, T>(out, fold_all<count, T>(v), std::make_integer_sequence<int, count>{});
  }
}

// Numbers below the smallest normal one are zeros while this lives, as operands and as results: computing with them takes a
// hundred times as long.
struct FlushSubnormal {
#if defined(__x86_64__)
  unsigned before = __builtin_ia32_stmxcsr();
  FlushSubnormal() { __builtin_ia32_ldmxcsr(before | 0x8040); }
  ~FlushSubnormal() { __builtin_ia32_ldmxcsr(before); }
#else
  FlushSubnormal() {}  // elsewhere they cost no more than others
#endif
};

// Scratch memory, aligned for vectors.
template <class E> using Scratch = std::vector<E>;

}  // namespace ssmlens
