// Real and complex numbers under one set of names, so that a recurrence is written once for both.
// Number<E, false> is E, Number<E, true> a pair of E; E is a vector (a number per lane) or a scalar (one for all lanes).
#pragma once
#include "simd.h"

namespace ssmlens {

template <class E> struct Complex {
  E re, im;
};
template <class E, bool is_complex> using Number = std::conditional_t<is_complex, Complex<E>, E>;

// a b
template <class E, class F> INLINE auto product(const E& a, const F& b) { return a * b; }
template <class E> INLINE Complex<E> product(const Complex<E>& a, const Complex<E>& b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
// r b, r a real vector
template <class V, class F> INLINE V scaled(const V& r, const F& b) { return r * b; }
template <class V, class F> INLINE Complex<V> scaled(const V& r, const Complex<F>& b) { return {r * b.re, r * b.im}; }
template <class V, class F> INLINE V scaled_conjugate(const V& r, const F& b) { return r * b; }
template <class V, class F> INLINE Complex<V> scaled_conjugate(const V& r, const Complex<F>& b) {
  return {r * b.re, -(r * b.im)};
}
// a conj(b)
template <class V> INLINE V product_conjugate(const V& a, const V& b) { return a * b; }
template <class V> INLINE Complex<V> product_conjugate(const Complex<V>& a, const Complex<V>& b) {
  return {a.re * b.re + a.im * b.im, a.im * b.re - a.re * b.im};
}
template <class V> INLINE Complex<V> operator+(const Complex<V>& a, const Complex<V>& b) {
  return {a.re + b.re, a.im + b.im};
}
template <class V> INLINE void add(V& sum, const V& a) { sum += a; }
template <class V> INLINE void add(Complex<V>& sum, const Complex<V>& a) { sum.re += a.re, sum.im += a.im; }
// sum + Re(a b), and sum + Re(a conj(b))
template <class V, class F> INLINE V add_product(const V& sum, const V& a, const F& b) { return sum + a * b; }
template <class V, class F> INLINE V add_product(const V& sum, const Complex<V>& a, const Complex<F>& b) {
  return (sum + a.re * b.re) - a.im * b.im;
}
template <class V, class F> INLINE V add_inner(const V& sum, const V& a, const F& b) { return sum + a * b; }
template <class V, class F> INLINE V add_inner(const V& sum, const Complex<V>& a, const Complex<F>& b) {
  return (sum + a.re * b.re) + a.im * b.im;
}

template <class T, class V> INLINE void set_lane(V& to, int lane, T value) { to[lane] = value; }
template <class T, class V> INLINE void set_lane(Complex<V>& to, int lane, Complex<T> value) {
  to.re[lane] = value.re, to.im[lane] = value.im;
}
template <class T, class V> INLINE void get_lane(const V& from, int lane, T& value) { value = from[lane]; }
template <class T, class V> INLINE void get_lane(const Complex<V>& from, int lane, Complex<T>& value) {
  value = {from.re[lane], from.im[lane]};
}
template <class T> INLINE void set_real(T& to, T value) { to = value; }
template <class T> INLINE void set_real(Complex<T>& to, T value) { to = {value, T(0)}; }
template <class V> INLINE void set_parts(V* to, const V& a) { to[0] = a; }
template <class V> INLINE void set_parts(V* to, const Complex<V>& a) { to[0] = a.re, to[1] = a.im; }
template <class T> INLINE T real_part(T a) { return a; }
template <class T> INLINE T real_part(Complex<T> a) { return a.re; }
template <class T> INLINE T imaginary_part(T) { return T(0); }
template <class T> INLINE T imaginary_part(Complex<T> a) { return a.im; }

// The rate A of an exponential, prepared: Re A · log2(e) and, in quarter turns, Im A · 2/π, each as a sum of two numbers.
template <class V, bool is_complex> struct Rate {
  V high, low;
};
template <class V> struct Rate<V, true> {
  V high, low, turns_high, turns_low;
};
constexpr long double two_over_pi = 0.636619772367581343075535053490057448L;
template <class T> inline void set_rate(Rate<Vec<T>, false>& r, int lane, T A) {
  const Split<T> decay = times<T>(A, log2e);
  r.high[lane] = decay.high, r.low[lane] = decay.low;
}
template <class T> inline void set_rate(Rate<Vec<T>, true>& r, int lane, Complex<T> A) {
  const Split<T> decay = times<T>(A.re, log2e), turns = times<T>(A.im, two_over_pi);
  r.high[lane] = decay.high, r.low[lane] = decay.low;
  r.turns_high[lane] = turns.high, r.turns_low[lane] = turns.low;
}

// cos and sin of an angle of s · (high + low) quarter turns. The nearest whole number of quarter turns is taken off exactly
// (fused multiply-add); what is left, at most 1/2, goes into two polynomials (interpolated at Chebyshev nodes; error 5e-9
// and 5e-18). Accurate up to 10^5 turns in float32; beyond, still a point within 1e-6 of the circle.
template <class T> INLINE Complex<Vec<T>> turned(Vec<T> s, Vec<T> high, Vec<T> low) {
  using S = Simd<T>;
  using V = Vec<T>;
  using Bits = typename S::Bits;
  constexpr T shifter = S::shifter - T(S::bias);
  const V shifted = s * high + shifter;
  const V n = shifted - shifter;
  V f = fused_difference<T>(s, high, n) + s * low;
  const V bound = splat<T>(T(0.6));
  f = f > -bound ? f : -bound;
  f = f < bound ? f : bound;
  const V g = f * f;
  V sine, cosine;
  if constexpr (std::is_same_v<T, float>) {
    sine = g * -4.6021492128e-3f + 7.9680217648e-2f;
    sine = sine * g - 6.4596347766e-1f;
    sine = sine * g + 1.5707963220f;
    cosine = g * 9.0673989840e-4f - 2.0861528342e-2f;
    cosine = cosine * g + 2.5366941036e-1f;
    cosine = cosine * g - 1.2337005494f;
  } else {
    sine = g * 5.6339337815378539538e-8 - 3.598643352982309702e-6;
    sine = sine * g + 1.6044115207474219092e-4;
    sine = sine * g - 4.6817541323409759917e-3;
    sine = sine * g + 7.9692626246043003134e-2;
    sine = sine * g - 6.4596409750624431573e-1;
    sine = sine * g + 1.5707963267948966143;
    cosine = g * -6.3293963449674235121e-9 + 4.7106784054055271063e-7;
    cosine = cosine * g - 2.5202039028029176105e-5;
    cosine = cosine * g + 9.1926027454684461873e-4;
    cosine = cosine * g - 2.0863480763340772521e-2;
    cosine = cosine * g + 2.5366950790104782321e-1;
    cosine = cosine * g - 1.2337005501361698269;
  }
  sine *= f;
  cosine = cosine * g + T(1);
  // n mod 4 is in the last two bits of `shifted`: an odd number of quarter turns swaps the two, and two turn the sign.
  Bits quarter;
  std::memcpy(&quarter, &shifted, sizeof quarter);
  const auto odd = (quarter & 1) != 0;
  V re = odd ? sine : cosine, im = odd ? cosine : sine;
  Bits re_bits, im_bits;
  std::memcpy(&re_bits, &re, sizeof re), std::memcpy(&im_bits, &im, sizeof im);
  constexpr int sign = 8 * sizeof(T) - 2;
  re_bits ^= ((quarter + 1) & 2) << sign;
  im_bits ^= (quarter & 2) << sign;
  std::memcpy(&re, &re_bits, sizeof re), std::memcpy(&im, &im_bits, sizeof im);
  return {re, im};
}

// exp(s A)
template <class T> INLINE Vec<T> exp_of_product(Vec<T> s, const Rate<Vec<T>, false>& r) {
  return exp_of_product<T>(s, r.high, r.low);
}
template <class T> INLINE Complex<Vec<T>> exp_of_product(Vec<T> s, const Rate<Vec<T>, true>& r) {
  const Complex<Vec<T>> direction = turned<T>(s, r.turns_high, r.turns_low);
  return scaled(exp_of_product<T>(s, r.high, r.low), direction);
}
template <class T, class N> INLINE N number_one() {
  if constexpr (std::is_same_v<N, Vec<T>>) {
    return splat<T>(T(1));
  } else {
    return {splat<T>(T(1)), Vec<T>{}};
  }
}
template <class T, class V> INLINE V only_where(const V& condition, const V& a) { return condition == T(0) ? V{} : a; }
template <class T, class V> INLINE Complex<V> only_where(const V& condition, const Complex<V>& a) {
  return {only_where<T>(condition, a.re), only_where<T>(condition, a.im)};
}

}  // namespace ssmlens
