/* Few rows are multiplied by weights where they are, each output's in its own vector.
   For many rows, weights of `LANES` outputs are first copied to a tile, one output per
   lane, so that no vector has to be summed up. */

#include "dense_product.h"

#include <stdlib.h>

#include "tile_product.h"

/* Heuristics: rows from which on a tile pays; rows of inputs that stay in the cache of
   a core; how far ahead weights are asked for. */
enum { ROWS_OF_TILES = 12, ROWS_IN_CACHE = 128, PREFETCHED = 2048 };

int64_t words_of_a_row(int64_t num_inputs) {
  int64_t vector = LANES * INPUTS_PER_WORD;
  return (num_inputs + vector - 1) / vector * LANES;
}

int64_t number_of_blocks(const DenseProduct *p) {
  return (p->num_outputs + LANES - 1) / LANES;
}

void convert_inputs(const DenseProduct *p, int64_t first_row, int64_t end_row) {
  for (int64_t row = first_row; row < end_row; row++) {
    uint32_t *to = p->x + row * p->words;
    memset(to, 0, p->words * sizeof *to);
    store_row(to, p->inputs + row * p->num_inputs, p->num_inputs);
  }
}

static const uint16_t *weights_of(const DenseProduct *p, int64_t output) {
  const DenseMatrix *matrix = p->matrices;
  for (; output >= matrix->outputs; matrix++) output -= matrix->outputs;
  return matrix->weights + output * p->num_inputs;
}

/* Weights of an output from a word on, zeros after the last. */
INLINE Words weights_at(const DenseProduct *p, const uint16_t *weights, int64_t word) {
  int64_t first = word * INPUTS_PER_WORD;
  _mm_prefetch((const char *)(weights + first) + PREFETCHED, _MM_HINT_T0);
  return load_weights(weights + first, p->num_inputs - first);
}

/* `rows` is a constant where this is called, so that the sums are in registers. One
   output after the other, since memory is read fastest in order. */
INLINE void multiply_in_place(const DenseProduct *p, int64_t output, int64_t row,
                              const int rows) {
  Floats sums[MAX_SUMS];
  const uint16_t *weights = weights_of(p, output);
#pragma GCC unroll 8
  for (int m = 0; m < rows; m++) sums[m] = fill_float(0);
  for (int64_t k = 0; k < p->words; k += LANES) {
    Words w = weights_at(p, weights, k);
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++)
      sums[m] = add_products(sums[m], w, load_words(p->x + (row + m) * p->words + k));
  }
#pragma GCC unroll 8
  for (int m = 0; m < rows; m++)
    p->outputs[(row + m) * p->num_outputs + output] = sum_of(sums[m]);
}

static void multiply_few(const DenseProduct *p, int64_t first, int64_t end) {
  for (int64_t output = first; output < end; output++) {
    int64_t row = 0;
    for (; row + MAX_SUMS <= p->rows; row += MAX_SUMS)
      multiply_in_place(p, output, row, MAX_SUMS);
    for (; row + 2 <= p->rows; row += 2) multiply_in_place(p, output, row, 2);
    if (row < p->rows) multiply_in_place(p, output, row, 1);
  }
}

/* Copies the weights of `LANES` outputs to (words, LANES). */
static void fill_tile(const DenseProduct *p, int64_t output, uint32_t *tile) {
  const uint16_t *weights[LANES];
  for (int n = 0; n < LANES && output + n < p->num_outputs; n++)
    weights[n] = weights_of(p, output + n);
  for (int64_t k = 0; k < p->words; k += LANES) {
    Words w[LANES];
    for (int n = 0; n < LANES; n++)
      w[n] = output + n < p->num_outputs ? weights_at(p, weights[n], k) : fill_word(0);
    transpose(w);
    for (int n = 0; n < LANES; n++) store_words(tile + (k + n) * LANES, w[n]);
  }
}

static void multiply_many(const DenseProduct *p, int64_t first, int64_t end,
                          uint32_t *tile) {
  for (int64_t row = 0; row < p->rows; row += ROWS_IN_CACHE)
    for (int64_t output = first; output < end; output += LANES) {
      int64_t rows = p->rows - row < ROWS_IN_CACHE ? p->rows - row : ROWS_IN_CACHE;
      fill_tile(p, output, tile);
      multiply_by_tile(tile, p->x + row * p->words, p->words, p->words,
                       p->outputs + row * p->num_outputs + output, p->num_outputs,
                       p->num_outputs - output, rows, 0, 1);
    }
}

void multiply_blocks(const DenseProduct *p, int64_t first_block, int64_t end_block) {
  int64_t first = first_block * LANES, end = end_block * LANES;
  uint32_t *tile = NULL;
  if (end > p->num_outputs) end = p->num_outputs;
  if (p->rows >= ROWS_OF_TILES) tile = malloc(p->words * LANES * sizeof *tile);
  if (tile)
    multiply_many(p, first, end, tile);
  else
    multiply_few(p, first, end);
  free(tile);
}
