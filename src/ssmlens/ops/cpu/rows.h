// Tensors (batch, length, entries) as the kernels see them: the last dimension is contiguous, the others have any stride, and
// the numbers may be half as precise as the computation: they are converted where they are read and written.
#pragma once
#include <algorithm>
#include "numbers.h"

namespace ssmlens {

enum class Format : uint8_t { full, bfloat16, float16 };  // full: float or double, as the computation
template <class T> constexpr int64_t bytes(Format format) { return format == Format::full ? sizeof(T) : sizeof(uint16_t); }

template <class Byte> struct AnyRows {
  Byte* data = nullptr;  // null where an optional tensor is absent
  int64_t batch_stride = 0, time_stride = 0;  // in bytes
  Format format = Format::full;
  Byte* at(int64_t b, int64_t t) const { return data + b * batch_stride + t * time_stride; }
  explicit operator bool() const { return data != nullptr; }
};
using Rows = AnyRows<const char>;
using OutRows = AnyRows<char>;

// Rows in a buffer of this kernel's own numbers (for the driver that has no tensors).
template <class T> Rows rows_of(const T* data, int64_t batch_stride, int64_t time_stride) {
  return {reinterpret_cast<const char*>(data), int64_t(batch_stride * sizeof(T)), int64_t(time_stride * sizeof(T))};
}
template <class T> OutRows rows_of(T* data, int64_t batch_stride, int64_t time_stride) {
  return {reinterpret_cast<char*>(data), int64_t(batch_stride * sizeof(T)), int64_t(time_stride * sizeof(T))};
}

// ---------------------------------------------------------------- half precision
struct Half {  // as many 16-bit patterns as a vector of float has lanes, and the bits of such a vector
  static constexpr int width = Simd<float>::width;
  typedef uint16_t Packed __attribute__((vector_size(width * sizeof(uint16_t))));
  using Bits = Simd<float>::Bits;
  static Bits bits(Vec<float> v) {
    Bits b;
    std::memcpy(&b, &v, sizeof b);
    return b;
  }
  static Vec<float> number(Bits b) {
    Vec<float> v;
    std::memcpy(&v, &b, sizeof v);
    return v;
  }

  template <Format format> static Vec<float> widen(Packed packed) {
    const Bits b = __builtin_convertvector(packed, Bits);
    if constexpr (format == Format::bfloat16) return number(b << 16);
    const Bits sign = (b & 0x8000) << 16, rest = b & 0x7fff;
    // The exponent's bias is 15 instead of 127; subnormal numbers are beside 2^-14, so that no operand is subnormal itself.
    const Bits normal = (rest << 13) + 0x38000000, subnormal = bits(number((rest << 13) + 0x38800000) - 0x1p-14f);
    const Bits finite = rest < 0x400 ? subnormal : normal;
    return number(sign | (rest >= 0x7c00 ? (rest << 13) | 0x7f800000 : finite));
  }

  // Rounds to nearest, ties to even; NaN stays NaN.
  template <Format format> static Packed narrow(Vec<float> v) {
    const Bits b = bits(v);
    Bits result;
    if constexpr (format == Format::bfloat16) {
      result = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
      result = v == v ? result : Bits{} + 0x7fc0;
    } else {
      const Bits magnitude = b & 0x7fffffff;
      const Bits normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1)) >> 13;
      const Bits subnormal = bits(number(magnitude) + 0.5f) - 0x3f000000;  // the addition rounds to multiples of 2^-24
      result = magnitude < 0x38800000 ? subnormal : normal;
      result = magnitude >= 0x477ff000 ? Bits{} + 0x7c00 : result;  // 65520 and above
      result = (magnitude > 0x7f800000 ? Bits{} + 0x7e00 : result) | ((b >> 16) & 0x8000);
    }
    return __builtin_convertvector(result, Packed);
  }
};

// (Branches, since a copy of unknown length is a call, which takes longer than the conversion.)
INLINE Half::Packed load_packed(const char* from, int count) {
  Half::Packed packed{};
  if (__builtin_expect(count == Half::width, 1)) {
    std::memcpy(&packed, from, sizeof packed);
  } else {
    std::memcpy(&packed, from, count * sizeof(uint16_t));
  }
  return packed;
}
INLINE void store_packed(char* to, const Half::Packed& packed, int count) {
  if (__builtin_expect(count == Half::width, 1)) {
    std::memcpy(to, &packed, sizeof packed);
  } else {
    std::memcpy(to, &packed, count * sizeof(uint16_t));
  }
}

// `count` numbers of some format from or to memory; zeros above them.
template <class T, Format format> INLINE Vec<T> load_as(const char* from, int count) {
  if constexpr (format == Format::full) {
    return load<T>(reinterpret_cast<const T*>(from), count);
  } else {
    return Half::widen<format>(load_packed(from, count));
  }
}
template <class T, Format format> INLINE void store_as(char* to, const Vec<T>& v, int count) {
  if constexpr (format == Format::full) {
    store<T>(reinterpret_cast<T*>(to), v, count);
  } else {
    store_packed(to, Half::narrow<format>(v), count);
  }
}
template <Format format> using Formatted = std::integral_constant<Format, format>;
// work(Formatted<format>), for the formats that go with T
template <class T, class F> INLINE void with_format(Format format, const F& work) {
  if (std::is_same_v<T, double> || format == Format::full) return work(Formatted<Format::full>{});
  if constexpr (std::is_same_v<T, float>) {
    if (format == Format::bfloat16) return work(Formatted<Format::bfloat16>{});
    work(Formatted<Format::float16>{});
  }
}

// Entries from .. from + entries of `steps` rows, in vectors: vector k of row i to[k * stride + i].
template <class T>
NOINLINE void read_rows(const Rows& rows, int64_t b, int64_t start, int64_t steps, int64_t from, int64_t entries,
                        int64_t stride, Vec<T>* to) {
  constexpr int width = Simd<T>::width;
  with_format<T>(rows.format, [&](auto format) {
    constexpr int64_t size = bytes<T>(decltype(format)::value);
    for (int64_t i = 0; i < steps; ++i) {
      const char* row = rows.at(b, start + i) + from * size;
      for (int64_t k = 0; k * width < entries; ++k)
        to[k * stride + i] =
            load_as<T, decltype(format)::value>(row + k * width * size, int(std::min<int64_t>(width, entries - k * width)));
    }
  });
}
template <class T>
NOINLINE void write_rows(const OutRows& rows, int64_t b, int64_t start, int64_t steps, int64_t from, int64_t entries,
                         int64_t stride, const Vec<T>* v) {
  constexpr int width = Simd<T>::width;
  with_format<T>(rows.format, [&](auto format) {
    constexpr int64_t size = bytes<T>(decltype(format)::value);
    for (int64_t i = 0; i < steps; ++i) {
      char* row = rows.at(b, start + i) + from * size;
      for (int64_t k = 0; k * width < entries; ++k)
        store_as<T, decltype(format)::value>(row + k * width * size, v[k * stride + i],
                                             int(std::min<int64_t>(width, entries - k * width)));
    }
  });
}

// Complex numbers stand one after another in memory (always in full precision), their parts in vectors of their own.
#if defined(__clang__) || __GNUC__ >= 12
template <class T, int... l> INLINE Complex<Vec<T>> apart(Vec<T> a, Vec<T> b, std::integer_sequence<int, l...>) {
  return {__builtin_shufflevector(a, b, (2 * l)...), __builtin_shufflevector(a, b, (2 * l + 1)...)};
}
template <int from, class V, int... l> INLINE V interleaved(V re, V im, std::integer_sequence<int, l...>) {
  return __builtin_shufflevector(re, im, (from + l / 2 + l % 2 * int(sizeof...(l)))...);
}
template <class T> INLINE Complex<Vec<T>> load_whole(const Complex<T>* from) {
  const T* at = &from->re;
  constexpr int width = Simd<T>::width;
  return apart<T>(load<T>(at), load<T>(at + width), std::make_integer_sequence<int, width>{});
}
template <class T> INLINE void store_whole(Complex<T>* to, const Complex<Vec<T>>& v) {
  T* at = &to->re;
  constexpr int width = Simd<T>::width;
  constexpr auto lanes = std::make_integer_sequence<int, width>{};
  store<T>(at, interleaved<0>(v.re, v.im, lanes)), store<T>(at + width, interleaved<width / 2>(v.re, v.im, lanes));
}
#endif
template <class T> INLINE Vec<T> load_numbers(const T* from, int count) { return load<T>(from, count); }
template <class T> INLINE Complex<Vec<T>> load_numbers(const Complex<T>* from, int count) {
#if defined(__clang__) || __GNUC__ >= 12
  if (__builtin_expect(count == Simd<T>::width, 1)) return load_whole<T>(from);
#endif
  Complex<Vec<T>> v{};
  for (int l = 0; l < count; ++l) set_lane(v, l, from[l]);
  return v;
}
template <class T> INLINE void store_numbers(T* to, const Vec<T>& v, int count) { store<T>(to, v, count); }
template <class T> INLINE void store_numbers(Complex<T>* to, const Complex<Vec<T>>& v, int count) {
#if defined(__clang__) || __GNUC__ >= 12
  if (__builtin_expect(count == Simd<T>::width, 1)) return store_whole<T>(to, v);
#endif
  for (int l = 0; l < count; ++l) get_lane(v, l, to[l]);
}
template <class T>
NOINLINE void read_rows(const Rows& rows, int64_t b, int64_t start, int64_t steps, int64_t from, int64_t entries,
                        int64_t stride, Complex<Vec<T>>* to) {
  constexpr int width = Simd<T>::width;
  for (int64_t i = 0; i < steps; ++i) {
    const auto* row = reinterpret_cast<const Complex<T>*>(rows.at(b, start + i)) + from;
    for (int64_t k = 0; k * width < entries; ++k)
      to[k * stride + i] = load_numbers<T>(row + k * width, int(std::min<int64_t>(width, entries - k * width)));
  }
}
template <class T>
NOINLINE void write_rows(const OutRows& rows, int64_t b, int64_t start, int64_t steps, int64_t from, int64_t entries,
                         int64_t stride, const Complex<Vec<T>>* v) {
  constexpr int width = Simd<T>::width;
  for (int64_t i = 0; i < steps; ++i) {
    auto* row = reinterpret_cast<Complex<T>*>(rows.at(b, start + i)) + from;
    for (int64_t k = 0; k * width < entries; ++k)
      store_numbers<T>(row + k * width, v[k * stride + i], int(std::min<int64_t>(width, entries - k * width)));
  }
}

// A whole row of d numbers: in its tensor, or converted into scratch memory.
template <class T> const T* row_of(const Rows& rows, int64_t b, int64_t t, int64_t d, Vec<T>* converted) {
  if (rows.format == Format::full) return reinterpret_cast<const T*>(rows.at(b, t));
  read_rows<T>(rows, b, t, 1, 0, d, 1, converted);
  return reinterpret_cast<const T*>(converted);
}
// Where to put a row, and then to call `written`.
template <class T> T* out_row(const OutRows& rows, int64_t b, int64_t t, Vec<T>* scratch) {
  return reinterpret_cast<T*>(rows.format == Format::full ? rows.at(b, t) : reinterpret_cast<char*>(scratch));
}
template <class T> void written(const OutRows& rows, int64_t b, int64_t t, int64_t d, const Vec<T>* scratch) {
  if (rows.format != Format::full) write_rows<T>(rows, b, t, 1, 0, d, 1, scratch);
}
// work(k, lanes) for every vector of such a row; whole ones know that they are.
template <class T, class Work> void for_each_vector(int64_t d, const Work& work) {
  constexpr int lanes = Simd<T>::width;
  const int64_t whole = d / lanes;
  for (int64_t k = 0; k < whole; ++k) work(k, Int<lanes>{});
  if (d % lanes) work(whole, int(d % lanes));
}

// Cache lines that will be wanted soon, of several tensors: fetched one by one, row by row, while something else is computed.
// (Rows are far apart in memory, which the hardware does not foresee.)
class Ahead {
  static constexpr int64_t line = 64;
  struct Row {
    const char* at;
    int64_t stride;
  } rows_[7];
  int count_ = 0;
  int64_t left_, from_, to_, bytes_ = 0, offset_ = 0;

 public:
  // Entries from .. to of `steps` rows, of tensors that are added.
  Ahead(int64_t steps, int64_t from, int64_t to) : left_(steps), from_(from), to_(to) {}
  template <class T, class Byte> void add(const AnyRows<Byte>& rows, int64_t b, int64_t start) {
    if (!rows || left_ <= 0) return;
    const int64_t size = bytes<T>(rows.format);
    rows_[count_++] = {rows.at(b, start) + from_ * size, rows.time_stride};
    bytes_ = std::max(bytes_, (to_ - from_) * size);
  }
  void next() {
    if (left_ <= 0) return;
    for (int k = 0; k < count_; ++k) __builtin_prefetch(rows_[k].at + offset_, 0, 2);
    offset_ += line;
    if (offset_ < bytes_) return;
    offset_ = 0, --left_;
    for (int k = 0; k < count_; ++k) rows_[k].at += rows_[k].stride;
  }
};

// work(b, first, count): blocks (vectors) first .. first + count of sequence b. Every block of every sequence can be a thread's
// own; as many as a thread has side by side, up to `together`, are one piece of work.
constexpr int64_t together = 8;
template <class Parallel, class Work>
void for_strips(int64_t sequences, int64_t blocks, const Parallel& parallel, const Work& work) {
  parallel(sequences * blocks, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t first = begin % blocks, count = std::min({together, blocks - first, end - begin});
      work(begin / blocks, first, count);
      begin += count;
    }
  });
}

// Rows of `n` real numbers, to numbers of the computation: real, or complex with no imaginary part.
template <class T, class K>
NOINLINE void read_reals(const Rows& rows, int64_t b, int64_t start, int64_t steps, int64_t n, K* to) {
  constexpr int width = Simd<T>::width;
  with_format<T>(rows.format, [&](auto format) {
    constexpr int64_t size = bytes<T>(decltype(format)::value);
    for (int64_t i = 0; i < steps; ++i)
      for (int64_t k = 0; k < n; k += width) {
        const int m = int(std::min<int64_t>(width, n - k));
        const Vec<T> v = load_as<T, decltype(format)::value>(rows.at(b, start + i) + k * size, m);
        for (int l = 0; l < m; ++l) set_real(to[i * n + k + l], v[l]);
      }
  });
}

// The other way, a row: complex numbers to a complex tensor (always in full precision), or their real parts to a real one.
template <class T, class K>
NOINLINE void write_numbers(const OutRows& rows, bool rows_are_complex, int64_t b, int64_t t, int64_t n, const K* from) {
  constexpr int width = Simd<T>::width;
  if (rows_are_complex) {
    std::memcpy(rows.at(b, t), from, n * sizeof(K));
    return;
  }
  with_format<T>(rows.format, [&](auto format) {
    for (int64_t k = 0; k < n; k += width) {
      const int m = int(std::min<int64_t>(width, n - k));
      Vec<T> v{};
      for (int l = 0; l < m; ++l) v[l] = real_part(from[k + l]);
      store_as<T, decltype(format)::value>(rows.at(b, t) + k * bytes<T>(rows.format), v, m);
    }
  });
}

}  // namespace ssmlens
