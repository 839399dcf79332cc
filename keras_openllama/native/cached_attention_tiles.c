/* Blocks of keys and values are copied to tiles, which many queries are multiplied by,
   and the softmax is corrected from block to block. Sums are in float32.
   Source: arXiv:2205.14135, section 3.1. */

#include <stdlib.h>

#include "cache_rows.h"

enum { KEYS = 128 }; /* Heuristic: keys of a block of tiles. */

INLINE Words scaled(Words w, const float *scales, int64_t row, const CacheType type) {
  return type == CACHE_INT8 ? as_words(multiply(as_floats(w), fill_float(scales[row]))) : w;
}
/* What a thread needs for tiles. */
typedef struct {
  uint32_t *keys;   /* (KEYS / LANES, words, LANES) */
  uint32_t *values; /* (vectors of a head, KEYS / values in a word, LANES) */
  float *scores;    /* (rows, KEYS), and their exponentials as words. */
  float *sums;      /* (rows, dimensions filled up): the context before it is divided. */
  float *largest, *total; /* (rows) */
} Tiles;

INLINE void fill_keys(const CachedAttention *a, int64_t head, int64_t column, int64_t end,
                      uint32_t *tile, const CacheType type) {
  for (int64_t first = column; first < end; first += LANES, tile += a->words * LANES)
    for (int64_t k = 0; k < a->words; k += LANES) {
      Words w[LANES];
      for (int n = 0; n < LANES; n++)
        w[n] = first + n < end
                   ? scaled(load_key(cache_row(a, a->keys, head, first + n, type), k,
                                     a->head_dim, type),
                            a->key_scales, row_of(a, head, first + n), type)
                   : fill_word(0);
      transpose(w);
      for (int n = 0; n < LANES; n++) store_words(tile + (k + n) * LANES, w[n]);
    }
}

INLINE void fill_values(const CachedAttention *a, int64_t head, int64_t column, int64_t end,
                        uint32_t *tile, const CacheType type) {
  const int pairs = inputs_per_word(type) == 2;
  const int64_t rows = pairs ? KEYS / 2 : KEYS;
  for (int64_t row = 0; row * (pairs + 1) < end - column; row++)
    for (int64_t k = 0; k < a->head_dim; k += LANES) {
      int64_t n = column + row * (pairs + 1);
      const char *value = cache_row(a, a->values, head, n, type);
      Words w = as_words(load_value(value, k, a->head_dim, type));
      w = scaled(w, a->value_scales, row_of(a, head, n), type);
      if (pairs) {
        value = cache_row(a, a->values, head, n + 1, type);
        Words next = fill_word(0);
        if (n + 1 < end) next = as_words(load_value(value, k, a->head_dim, type));
        w = join_halves(w, next);
      }
      store_words(tile + (k / LANES * rows + row) * LANES, w);
    }
}

/* Replaces scores of one row by words of their exponentials, and corrects what was
   summed before with another largest score. `count` scores are visible. */
INLINE void weigh_row(Tiles *t, int64_t row, int64_t count, float scale, int64_t dimensions,
                      const CacheType type) {
  float *scores = t->scores + row * KEYS, *sums = t->sums + row * dimensions;
  Floats largest = fill_float(-INFINITY), sum = fill_float(0);
  for (int64_t i = count; i < round_up(count, LANES); i++) scores[i] = -INFINITY;
  for (int64_t i = 0; i < count; i += LANES)
    largest = larger(load_floats(scores + i), largest);
  float before = t->largest[row], top = largest_of(largest);
  top = top > before ? top : before;
  float factor = exp2f((before - top) * scale);
  for (int64_t i = 0; i < KEYS; i += LANES) {
    Floats x = fill_float(0);
    if (i < count) {
      x = subtract(load_floats(scores + i), fill_float(top));
      x = power_of_two(multiply(x, fill_float(scale)));
    }
    sum = add(sum, x);
    if (inputs_per_word(type) == 2) /* Before what is yet to be read. */
      store_bfloat16((uint16_t *)scores + i, x, LANES);
    else
      store(scores + i, x, LANES);
  }
  t->largest[row] = top;
  t->total[row] = t->total[row] * factor + sum_of(sum);
  for (int64_t i = 0; i < dimensions; i += LANES)
    store(sums + i, multiply(load_floats(sums + i), fill_float(factor)), LANES);
}

/* Adds a block of keys and values to the sums of the queries of some tokens. */
INLINE void add_keys(const CachedAttention *a, int64_t head, int64_t first, int64_t end,
                     int64_t column, Tiles *t, const CacheType type) {
  const int per_word = inputs_per_word(type);
  int64_t sequence = head / a->kv_heads, tokens = end - first;
  int64_t dimensions = round_up(a->head_dim, LANES);
  int64_t last = visible_keys(a, sequence, end - 1);
  int64_t keys = last - column < KEYS ? last - column : KEYS;
  float scale = scale_of(a);
  fill_keys(a, head, column, column + keys, t->keys, type);
  fill_values(a, head, column, column + keys, t->values, type);
  for (int64_t member = 0; member < group(a); member++) {
    const uint32_t *queries = query_row(a, head, member, first);
    int64_t row = member * tokens;
    for (int64_t n = 0; n < keys; n += LANES)
      multiply_by_tile(t->keys + n * a->words, queries, a->words,
                       (a->head_dim + per_word - 1) / per_word, t->scores + row * KEYS + n,
                       KEYS, LANES, tokens, 0, type == CACHE_BFLOAT16);
    for (int64_t token = first; token < end; token++) {
      int64_t count = visible_keys(a, sequence, token) - column;
      weigh_row(t, row + token - first, count < 0 ? 0 : count < keys ? count : keys, scale,
                dimensions, type);
    }
  }
  for (int64_t k = 0; k < dimensions; k += LANES)
    multiply_by_tile(t->values + k * (KEYS / per_word), (const uint32_t *)t->scores, KEYS,
                     (keys + per_word - 1) / per_word, t->sums + k, dimensions, LANES,
                     group(a) * tokens, 1, type == CACHE_BFLOAT16);
}

INLINE void attend_with(const CachedAttention *a, int64_t head, int64_t first,
                              int64_t end, Tiles *t, const CacheType type) {
  int64_t dimensions = round_up(a->head_dim, LANES), rows = group(a) * (end - first);
  int64_t last = visible_keys(a, head / a->kv_heads, end - 1);
  memset(t->sums, 0, rows * dimensions * sizeof *t->sums);
  memset(t->total, 0, rows * sizeof *t->total);
  for (int64_t row = 0; row < rows; row++) t->largest[row] = -INFINITY;
  for (int64_t column = 0; column < last; column += KEYS)
    add_keys(a, head, first, end, column, t, type);
  for (int64_t row = 0; row < rows; row++) {
    float *context =
        context_row(a, head, row / (end - first), first + row % (end - first));
    for (int64_t i = 0; i < a->head_dim; i++)
      context[i] = t->sums[row * dimensions + i] / t->total[row];
  }
}

void attend_with_tiles(const CachedAttention *a, int64_t head, int64_t first, int64_t end) {
  int64_t dimensions = round_up(a->head_dim, LANES), rows = group(a) * (end - first);
  int64_t words = KEYS * a->words + KEYS * dimensions + rows * (KEYS + dimensions + 2);
  uint32_t *memory = malloc(words * sizeof *memory);
  if (!memory) {
    *a->no_memory = 1;
    return;
  }
  Tiles t = {.keys = memory, .values = memory + KEYS * a->words};
  t.scores = (float *)(t.values + KEYS * dimensions);
  t.sums = t.scores + rows * KEYS;
  t.largest = t.sums + rows * dimensions;
  t.total = t.largest + rows;
  if (a->type == CACHE_FLOAT16)
    attend_with(a, head, first, end, &t, CACHE_FLOAT16);
  else if (a->type == CACHE_BFLOAT16)
    attend_with(a, head, first, end, &t, CACHE_BFLOAT16);
  else
    attend_with(a, head, first, end, &t, CACHE_INT8);
  free(memory);
}
