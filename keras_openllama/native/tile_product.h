/* Products of rows of inputs with a tile: one output in each lane, so that no vector has
   to be summed up. */

#ifndef TILE_PRODUCT_H
#define TILE_PRODUCT_H

#include "vectors.h"

enum { MAX_SUMS = 8 }; /* Sums that are in registers at once. */

/* Words are two of bfloat16 for `add_products`, or one of float32. */
INLINE Floats add_words(Floats sum, Words w, Words x, const int bfloat16) {
  return bfloat16 ? add_products(sum, w, x)
                  : multiply_add(as_floats(w), as_floats(x), sum);
}

/* `rows`, `accumulate` and `bfloat16` are constants where this is called, so that the
   sums are in registers. */
INLINE void multiply_few_rows(const uint32_t *tile, const uint32_t *x, int64_t stride,
                              int64_t words, float *to, int64_t to_stride, int64_t columns,
                              const int rows, const int accumulate, const int bfloat16) {
  Floats sums[MAX_SUMS];
#pragma GCC unroll 8
  for (int m = 0; m < rows; m++)
    sums[m] = accumulate ? load_floats(to + m * to_stride) : fill_float(0);
  for (int64_t k = 0; k < words; k++) {
    Words w = load_words(tile + k * LANES);
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++)
      sums[m] = add_words(sums[m], w, fill_word((int32_t)x[m * stride + k]), bfloat16);
  }
#pragma GCC unroll 8
  for (int m = 0; m < rows; m++) store(to + m * to_stride, sums[m], columns);
}

/* to = x @ tile, or with `accumulate` to + x @ tile, for x (rows, words) and a tile
   (words, LANES). Outputs after `columns` are not written. */
INLINE void multiply_by_tile(const uint32_t *tile, const uint32_t *x, int64_t stride,
                             int64_t words, float *to, int64_t to_stride, int64_t columns,
                             int64_t rows, const int accumulate, const int bfloat16) {
  int64_t row = 0;
  for (; row + MAX_SUMS <= rows; row += MAX_SUMS)
    multiply_few_rows(tile, x + row * stride, stride, words, to + row * to_stride, to_stride,
                      columns, MAX_SUMS, accumulate, bfloat16);
  for (; row < rows; row++)
    multiply_few_rows(tile, x + row * stride, stride, words, to + row * to_stride, to_stride,
                      columns, 1, accumulate, bfloat16);
}

#endif
