/* Products of blocks of matrices that are in the processor's cache, with the sums of a
   tile in registers. */

#ifndef BLOCK_PRODUCT_H
#define BLOCK_PRODUCT_H

#include "vectors.h"

#define TILE_COLUMNS (2 * LANES)

/* A matrix whose element (m, k) is at `first[m * row + k * step]`. */
typedef struct {
  const float *first;
  int64_t row, step;
} LeftMatrix;

/* What a product on the diagonal of the mask computes, at the granularity of a tile. */
typedef enum {
  ALL,
  ROWS_UP_TO_COLUMN, /* Outputs whose row is not after their column. */
  STEPS_UP_TO_ROW,   /* Sums over k up to the row. */
  STEPS_FROM_ROW     /* Sums over k from the row on. */
} Range;

/* c = keep * c + a[:, first_step:end_step] @ b[first_step:end_step], with a factor
   `keep` for each row, or without c if `keep` is NULL. */
INLINE void multiply_into_tile(float *c, int64_t c_row, const float *keep, LeftMatrix a,
                               const float *b, int64_t b_row, int64_t first_step,
                               int64_t end_step, const int vectors) {
  Floats sums[MAX_ROWS][2];
#pragma GCC unroll 8
  for (int m = 0; m < MAX_ROWS; m++)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; v++) sums[m][v] = fill_float(0);
  for (int64_t k = first_step; k < end_step; k++) {
    Floats right[2];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; v++) right[v] = load_floats(b + k * b_row + v * LANES);
#pragma GCC unroll 8
    for (int m = 0; m < MAX_ROWS; m++) {
      Floats left = fill_float(a.first[m * a.row + k * a.step]);
#pragma GCC unroll 2
      for (int v = 0; v < vectors; v++)
        sums[m][v] = multiply_add(left, right[v], sums[m][v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MAX_ROWS; m++)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; v++) {
      float *to = c + m * c_row + v * LANES;
      if (keep) sums[m][v] = multiply_add(load_floats(to), fill_float(keep[m]), sums[m][v]);
      store(to, sums[m][v], LANES);
    }
}

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* c = keep * c + a @ b for a (rows, steps) and b (steps, columns). `rows` is a multiple
   of MAX_ROWS, `columns` of LANES. */
INLINE void multiply_into(float *c, int64_t c_row, const float *keep, LeftMatrix a,
                          const float *b, int64_t b_row, int64_t rows, int64_t columns,
                          int64_t steps, const Range range) {
  for (int64_t column = 0; column < columns; column += TILE_COLUMNS) {
    int64_t last = range == ROWS_UP_TO_COLUMN ? smaller(rows, column + TILE_COLUMNS) : rows;
    for (int64_t row = 0; row < last; row += MAX_ROWS) {
      int64_t first = range == STEPS_FROM_ROW ? row : 0;
      int64_t end = range == STEPS_UP_TO_ROW ? smaller(steps, row + MAX_ROWS) : steps;
      LeftMatrix left = {a.first + row * a.row, a.row, a.step};
      float *to = c + row * c_row + column;
      const float *factors = keep ? keep + row : NULL;
      if (column + LANES < columns)
        multiply_into_tile(to, c_row, factors, left, b + column, b_row, first, end, 2);
      else
        multiply_into_tile(to, c_row, factors, left, b + column, b_row, first, end, 1);
    }
  }
}

#endif
