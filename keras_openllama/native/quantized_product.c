/* A tile is the weights of `LANES` outputs, one per lane of a vector, in the order in
   which they are read: each is read from memory once, and multiplied by up to
   `MAX_ROWS` rows of inputs. A group of 32 inputs is summed exactly in integers. */

#include "quantized_product.h"

#include "vectors.h"

/* Heuristics: rows of inputs that stay in the cache of a core while a tile is read,
   and how far ahead weights are asked for. */
#define ROWS_IN_CACHE 128
#define PREFETCHED_BYTES 4096

int lanes(void) { return LANES; }

int64_t number_of_tiles(const QuantizedProduct *p) {
  return (p->num_outputs + LANES - 1) / LANES;
}

/* Rounds to the nearest, for less than 2^22: the sum has the integer in its low bits. */
INLINE int32_t nearest(float x) {
  float shifted = x + 12582912.0f;
  uint32_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  return (int32_t)(bits - 0x4b400000);
}

static void round_group(const QuantizedProduct *p, const float *x, int64_t count, int64_t group) {
  float values[GROUP] = {0};
  int32_t bits[GROUP], largest_bits = 0, sum = 0;
  if (count > 0) /* Else all of the group is padding. */
    memcpy(values, x, (count < GROUP ? count : GROUP) * sizeof(float));
  memcpy(bits, values, sizeof bits);
  for (int i = 0; i < GROUP; i++) { /* Absolute values order as their bits do. */
    int32_t absolute = bits[i] & 0x7fffffff;
    largest_bits = absolute > largest_bits ? absolute : largest_bits;
  }
  float largest, inverse;
  memcpy(&largest, &largest_bits, sizeof largest);
  inverse = largest > 1e-30f ? 127 / largest : 0;
  int8_t *rounded = p->rounded + group * GROUP;
  int8_t in_order[GROUP];
  for (int i = 0; i < GROUP; i++) {
    in_order[i] = (int8_t)nearest(values[i] * inverse);
    sum += in_order[i];
  }
  memcpy(rounded, in_order, GROUP);
  if (p->bits == 4) /* Low nibbles are the weights of even inputs, high ones of odd. */
    for (int i = 0; i < GROUP; i++)
      rounded[i / 8 * 8 + i % 2 * 4 + i % 8 / 2] = in_order[i];
  p->input_scales[group] = largest / 127;
  p->corrections[group] = -(p->bits == 4 ? 8 : BYTE_ZERO) * sum;
}

void round_inputs(const QuantizedProduct *p, int64_t first_row, int64_t end_row) {
  for (int64_t row = first_row; row < end_row; row++)
    for (int64_t g = 0; g < p->groups; g++)
      round_group(p, p->inputs + row * p->num_inputs + g * GROUP,
                  p->num_inputs - g * GROUP, row * p->groups + g);
}

/* Reads the weights of a group: eight vectors with the bytes of four inputs. */
INLINE void load_group(const uint32_t *words, const int bits, Words *weights) {
  for (int j = 0; j < bits; j++, words += LANES) {
    Words loaded = load_words(words);
    _mm_prefetch((const char *)words + PREFETCHED_BYTES, _MM_HINT_T0);
    if (bits == 4) {
      weights[2 * j] = low_nibbles(loaded);
      weights[2 * j + 1] = high_nibbles(loaded);
    } else {
      weights[j] = loaded;
    }
  }
}

/* `rows` and `bits` are constants where this is called, so that all is in registers. */
INLINE void multiply_rows(const QuantizedProduct *p, int64_t tile, int64_t row, const int rows,
                          const int bits) {
  const uint32_t *words = p->words + tile * p->groups * bits * LANES;
  const uint16_t *scales = p->scales + tile * p->scales_per_output * LANES;
  Floats totals[MAX_ROWS], scale = fill_float(0);
  int64_t groups_left = 0; /* Of the present scale. */
#pragma GCC unroll 8
  for (int m = 0; m < rows; m++) totals[m] = fill_float(0);
  for (int64_t g = 0; g < p->groups; g++, words += bits * LANES) {
    if (!groups_left--) {
      scale = load_float16(scales, LANES);
      scales += LANES;
      groups_left = p->groups_per_scale - 1;
    }
    Words weights[8], sums[MAX_ROWS];
    load_group(words, bits, weights);
    int64_t first = row * p->groups + g;
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++)
      sums[m] = fill_word(p->corrections[first + m * p->groups]);
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++)
#pragma GCC unroll 8
      for (int m = 0; m < rows; m++) {
        int32_t four;
        memcpy(&four, p->rounded + (first + m * p->groups) * GROUP + 4 * j, 4);
        Words x = fill_word(four);
        sums[m] = bits == 4 ? dot_nibbles(sums[m], weights[j], x)
                            : dot_bytes(sums[m], weights[j], x);
      }
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++) {
      Floats factor = multiply(scale, fill_float(p->input_scales[first + m * p->groups]));
      totals[m] = multiply_add(to_floats(sums[m]), factor, totals[m]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < rows; m++)
    store(p->outputs + (row + m) * p->num_outputs + tile * LANES, totals[m],
          p->num_outputs - tile * LANES);
}

INLINE void multiply_block(const QuantizedProduct *p, int64_t tile, int64_t row, int64_t end_row,
                           const int bits) {
  for (; row + MAX_ROWS <= end_row; row += MAX_ROWS)
    multiply_rows(p, tile, row, MAX_ROWS, bits);
  for (; row + 2 <= end_row; row += 2) multiply_rows(p, tile, row, 2, bits);
  if (row < end_row) multiply_rows(p, tile, row, 1, bits);
}

void multiply_tiles(const QuantizedProduct *p, int64_t first_tile, int64_t end_tile) {
  for (int64_t row = 0; row < p->rows; row += ROWS_IN_CACHE) {
    int64_t end = row + ROWS_IN_CACHE < p->rows ? row + ROWS_IN_CACHE : p->rows;
    for (int64_t tile = first_tile; tile < end_tile; tile++)
      if (p->bits == 4)
        multiply_block(p, tile, row, end, 4);
      else
        multiply_block(p, tile, row, end, 8);
  }
}
