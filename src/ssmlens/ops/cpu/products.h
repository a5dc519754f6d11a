// Small matrix products out of cache, and sums over rows. Rows are padded to whole vectors, and all counts of rows and numbers
// to multiples of `padded_to`. Sums are in the order of k, whatever the number of threads.
#pragma once
#include "simd.h"

namespace ssmlens {

template <class T> constexpr int64_t padded_to = Simd<T>::width > 8 ? Simd<T>::width : 8;
template <class T> int64_t padded(int64_t n) { return (n + padded_to<T> - 1) / padded_to<T> * padded_to<T>; }

constexpr int tile_rows = 4, tile_vectors = vector_bytes == 64 ? 4 : 2;  // of a product, in registers

template <class T> struct Matrix {  // number (i, j) is at data[i * row + j * column]
  const T* data;
  int64_t row, column = 1;
};

template <class T, int vectors>
NOINLINE void multiply_strip(int64_t m, int64_t k, const Matrix<T>& a, const T* b, int64_t b_row, T* c, int64_t c_row, bool add) {
  constexpr int width = Simd<T>::width;
  for (int64_t i = 0; i < m; i += tile_rows) {
    Vec<T> sum[tile_rows][vectors];
    T* const to = c + i * c_row;
    unrolled<tile_rows>([&](int r) ALWAYS {
      unrolled<vectors>([&](int j) ALWAYS { sum[r][j] = add ? load<T>(to + r * c_row + j * width) : Vec<T>{}; });
    });
    const T *left = a.data + i * a.row, *right = b;
    for (int64_t l = 0; l < k; ++l, left += a.column, right += b_row)
      unrolled<vectors>([&](int j) ALWAYS {
        const Vec<T> v = load<T>(right + j * width);
        unrolled<tile_rows>([&](int r) ALWAYS { sum[r][j] += left[r * a.row] * v; });
      });
    unrolled<tile_rows>([&](int r) ALWAYS {
      unrolled<vectors>([&](int j) ALWAYS { store<T>(to + r * c_row + j * width, sum[r][j]); });
    });
  }
}
// c (m, n) = a (m, k) b (k, n), or += where `add`; b and c by rows
template <class T>
void multiply(int64_t m, int64_t n, int64_t k, const Matrix<T>& a, const T* b, int64_t b_row, T* c, int64_t c_row, bool add) {
  constexpr int width = Simd<T>::width;
  int64_t j = 0;
  for (; j + tile_vectors * width <= n; j += tile_vectors * width)
    multiply_strip<T, tile_vectors>(m, k, a, b + j, b_row, c + j, c_row, add);
  for (; j < n; j += width) multiply_strip<T, 1>(m, k, a, b + j, b_row, c + j, c_row, add);
}

// c (m, n) = a (m, d) b (n, d)ᵀ
template <class T>
NOINLINE void multiply_rows(int64_t m, int64_t n, int64_t d, const T* a, int64_t a_row, const T* b, int64_t b_row, T* c,
                            int64_t c_row) {
  constexpr int width = Simd<T>::width, rows = width >= 16 ? 4 : width >= 4 ? 2 : 1, columns = width / rows;
  for (int64_t i = 0; i < m; i += rows)
    for (int64_t j = 0; j < n; j += columns) {
      Vec<T> sum[width] = {};
      for (int64_t l = 0; l < d; l += width) {
        Vec<T> left[rows];
        unrolled<rows>([&](int r) ALWAYS { left[r] = load<T>(a + (i + r) * a_row + l); });
        unrolled<columns>([&](int s) ALWAYS {
          const Vec<T> right = load<T>(b + (j + s) * b_row + l);
          unrolled<rows>([&](int r) ALWAYS { sum[r * columns + s] += left[r] * right; });
        });
      }
      const Vec<T> sums = fold_all<width, T>(sum);
      const T* const lanes = reinterpret_cast<const T*>(&sums);
      for (int r = 0; r < rows; ++r) std::memcpy(c + (i + r) * c_row + j, lanes + r * columns, columns * sizeof(T));
    }
}

// out (n) = the inner products of rows of a and b (n, d)
template <class T> NOINLINE void row_products(int64_t n, int64_t d, const T* a, const T* b, T* out) {
  constexpr int width = Simd<T>::width;
  for (int64_t i = 0; i < n; i += 8) {
    Vec<T> sum[8] = {};
    for (int64_t l = 0; l < d; l += width)
      unrolled<8>([&](int r) ALWAYS { sum[r] += load<T>(a + (i + r) * d + l) * load<T>(b + (i + r) * d + l); });
    for (int r = 0; r < 8; ++r) out[i + r] = T(0);
    add_lane_sums<8, T>(out + i, sum);
  }
}

}  // namespace ssmlens
