/* Few queries read the keys and values where they are. For many, blocks of keys and
   values are first copied to tiles whose products need no sum over a vector, and the
   softmax is corrected from block to block. Sums are in float32.
   Source: arXiv:2205.14135, section 3.1. */

#include "cached_attention.h"

#include <math.h>
#include <stdlib.h>

#include "vectors.h"

/* Heuristics: queries from which on tiles pay, queries that share tiles, keys of a
   block of tiles, sums that are in registers at once, and how far ahead keys are asked
   for. */
enum { ROWS_OF_TILES = 12, ROWS_OF_A_BLOCK = 128, KEYS = 128, MAX_SUMS = 8, FETCHED_ROWS = 32 };

/* `type` and `rows` are constants where the functions below are called. */

INLINE int inputs_per_word(const CacheType type) {
  return type == CACHE_BFLOAT16 ? INPUTS_PER_WORD : 1;
}
static int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

int64_t words_of_a_query(const CachedAttention *a) {
  int per_word = inputs_per_word(a->type);
  return round_up((a->head_dim + per_word - 1) / per_word, LANES);
}

static int64_t group(const CachedAttention *a) { return a->heads / a->kv_heads; }

/* Tokens whose queries are computed together. */
static int64_t tokens_of_a_block(const CachedAttention *a) {
  int64_t tokens = ROWS_OF_A_BLOCK / group(a);
  return tokens > 1 ? tokens : 1;
}

int64_t blocks_of_a_head(const CachedAttention *a) {
  return (a->length + tokens_of_a_block(a) - 1) / tokens_of_a_block(a);
}

/* Keys that a token sees. */
static int64_t visible_keys(const CachedAttention *a, int64_t sequence, int64_t token) {
  return a->last_positions[sequence] - a->length + token + 2;
}

static const float *head_of_token(const CachedAttention *a, int64_t sequence, int64_t token,
                                  int64_t head) {
  int64_t heads = a->heads + 2 * a->kv_heads;
  return a->qkv + ((sequence * a->length + token) * heads + head) * a->head_dim;
}

/* Number of a row in the cache. */
INLINE int64_t row_of(const CachedAttention *a, int64_t head, int64_t column) {
  return head * a->columns + column;
}

INLINE int64_t row_bytes(const CachedAttention *a, const CacheType type) {
  return a->head_dim * (type == CACHE_INT8 ? 1 : 2);
}

INLINE char *cache_row(const CachedAttention *a, void *cache, int64_t head, int64_t column,
                       const CacheType type) {
  return (char *)cache + row_of(a, head, column) * row_bytes(a, type);
}

static void rotate(const CachedAttention *a, const float *x, int64_t position, float *to) {
  int64_t half = a->head_dim / 2;
  const float *cosines = a->cosines + position * half, *sines = a->sines + position * half;
  for (int64_t i = 0; i < half; i++) {
    to[i] = x[i] * cosines[i] - x[half + i] * sines[i];
    to[half + i] = x[half + i] * cosines[i] + x[i] * sines[i];
  }
}

/* The integers are those of `layers/quantized_cache.py`. A row with a number that is not
   finite is not a number. */
static void write_integers(const CachedAttention *a, const float *x, int8_t *to,
                           float *scale) {
  Floats largest = fill_float(1e-30f);
  Floats zero = fill_float(0);
  for (int64_t i = 0; i < a->head_dim; i += LANES) {
    Floats values = load_some(x + i, a->head_dim - i);
    largest = larger(largest, absolute(values));
    zero = multiply_add(values, fill_float(0), zero);
  }
  *scale = largest_of(largest) / 127 + sum_of(zero);
  if (isnan(*scale)) {
    memset(to, 0, a->head_dim);
    return;
  }
  Floats inverse = fill_float(127 / largest_of(largest));
  for (int64_t i = 0; i < a->head_dim; i += LANES) {
    float rounded[LANES];
    Floats scaled = multiply(load_some(x + i, a->head_dim - i), inverse);
    store(rounded, nearest_integers(scaled), LANES);
    for (int64_t k = 0; k < LANES && i + k < a->head_dim; k++)
      to[i + k] = (int8_t)rounded[k];
  }
}

static void write_row(const CachedAttention *a, const float *x, void *cache,
                      float *scales, int64_t head, int64_t column) {
  if (a->type == CACHE_INT8) {
    write_integers(a, x, (int8_t *)cache_row(a, cache, head, column, CACHE_INT8),
                   scales + row_of(a, head, column));
    return;
  }
  uint16_t *to = (uint16_t *)cache_row(a, cache, head, column, a->type);
  Floats most = fill_float(65504), least = fill_float(-65504);
  for (int64_t i = 0; i < a->head_dim; i += LANES) {
    int64_t left = a->head_dim - i;
    Floats values = load_some(x + i, left);
    if (a->type == CACHE_BFLOAT16)
      store_bfloat16(to + i, values, left);
    else /* Larger ones would become infinite. */
      store_float16(to + i, at_most(most, larger(least, values)), left);
  }
}

static void write_query(const CachedAttention *a, const float *x, uint32_t *to) {
  memset(to, 0, a->words * sizeof *to);
  if (a->type == CACHE_BFLOAT16)
    store_row(to, x, a->head_dim);
  else
    memcpy(to, x, a->head_dim * sizeof *x);
}

static uint32_t *query_row(const CachedAttention *a, int64_t head, int64_t member,
                           int64_t token) {
  return a->queries + ((head * group(a) + member) * a->length + token) * a->words;
}

void write_heads(const CachedAttention *a, int64_t first, int64_t end) {
  float *rotated = malloc(a->head_dim * sizeof *rotated);
  if (!rotated) *a->no_memory = 1;
  for (int64_t head = first; rotated && head < end; head++) {
    int64_t sequence = head / a->kv_heads, own = head % a->kv_heads;
    for (int64_t token = 0; token < a->length; token++) {
      int64_t column = visible_keys(a, sequence, token) - 1;
      rotate(a, head_of_token(a, sequence, token, a->heads + own), column, rotated);
      write_row(a, rotated, a->keys, a->key_scales, head, column);
      write_row(a, head_of_token(a, sequence, token, a->heads + a->kv_heads + own),
                a->values, a->value_scales, head, column);
      for (int64_t member = 0; member < group(a); member++) {
        int64_t query = own * group(a) + member;
        rotate(a, head_of_token(a, sequence, token, query), column, rotated);
        write_query(a, rotated, query_row(a, head, member, token));
      }
    }
  }
  free(rotated);
}

/* Elements of a row from one on, without their scale. */
INLINE Floats load_value(const char *row, int64_t first, int64_t head_dim,
                         const CacheType type) {
  int64_t left = head_dim - first;
  if (type == CACHE_INT8) return load_int8((const int8_t *)row + first, left);
  if (type == CACHE_FLOAT16) return load_float16((const uint16_t *)row + first, left);
  return load_bfloat16((const uint16_t *)row + first, left);
}
INLINE Words load_key(const char *row, int64_t word, int64_t head_dim, const CacheType type) {
  if (type != CACHE_BFLOAT16) return as_words(load_value(row, word, head_dim, type));
  int64_t first = word * INPUTS_PER_WORD;
  return load_weights((const uint16_t *)row + first, head_dim - first);
}
INLINE Words scaled(Words w, const float *scales, int64_t row, const CacheType type) {
  return type == CACHE_INT8 ? as_words(multiply(as_floats(w), fill_float(scales[row]))) : w;
}
INLINE Floats add_words(Floats sum, Words w, Words x, const CacheType type) {
  return type == CACHE_BFLOAT16 ? add_products(sum, w, x) : multiply_add(as_floats(w), as_floats(x), sum);
}

/* The sum over each of `LANES` vectors, in the lane of its number. */
INLINE Floats sums_of(Floats *x) {
  transpose((Words *)x);
  for (int step = LANES / 2; step; step /= 2)
    for (int i = 0; i < step; i++) x[i] = add(x[i], x[i + step]);
  return x[0];
}

/* Asks for a row of the cache. Between two steps, other memory has filled the caches of
   the processor. */
INLINE void fetch(const char *row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(row + i, _MM_HINT_T0);
}

/* Products of a query with the first `count` keys, a vector at a time. */
INLINE void score_keys(const CachedAttention *a, const uint32_t *query, int64_t head,
                       int64_t count, float *scores, const CacheType type) {
  int64_t bytes = row_bytes(a, type);
  for (int64_t column = 0; column < count; column += LANES) {
    Floats sums[LANES];
    int64_t left = count - column < LANES ? count - column : LANES;
    for (int64_t n = 0; n < LANES; n++) {
      sums[n] = fill_float(0);
      if (n >= left) continue;
      const char *key = cache_row(a, a->keys, head, column + n, type);
      fetch(key + FETCHED_ROWS * bytes, bytes);
      fetch(cache_row(a, a->values, head, column + n, type), bytes);
      for (int64_t k = 0; k < a->words; k += LANES)
        sums[n] = add_words(sums[n], load_key(key, k, a->head_dim, type),
                            load_words(query + k), type);
    }
    Floats products = sums_of(sums);
    if (type == CACHE_INT8)
      products =
          multiply(products, load_some(a->key_scales + row_of(a, head, column), left));
    store(scores + column, products, LANES);
  }
}

/* Of scores, so that weights are powers of two. */
static float scale_of(const CachedAttention *a) {
  return 1.44269504f / sqrtf((float)a->head_dim);
}

/* Replaces scores by their exponentials, less the largest; returns the sum. */
INLINE float exponentials(float *scores, int64_t count, float scale) {
  Floats largest = fill_float(-INFINITY), sum = fill_float(0);
  int64_t whole = count / LANES * LANES;
  for (int64_t i = 0; i < whole; i += LANES)
    largest = larger(load_floats(scores + i), largest);
  float top = largest_of(largest);
  for (int64_t i = whole; i < count; i++) top = scores[i] > top ? scores[i] : top;
  for (int64_t i = 0; i < count; i += LANES) {
    Floats x = subtract(load_floats(scores + i), fill_float(top));
    x = power_of_two(multiply(x, fill_float(scale)));
    store(scores + i, x, LANES);
    if (i + LANES <= count) sum = add(sum, x);
  }
  float total = sum_of(sum);
  for (int64_t i = whole; i < count; i++) total += scores[i];
  return total;
}

INLINE void add_values(const CachedAttention *a, const float *weights, int64_t head,
                       int64_t count, float factor, int64_t first, float *context,
                       const int vectors, const CacheType type) {
  Floats sums[4];
  for (int n = 0; n < vectors; n++) sums[n] = fill_float(0);
  const char *value = cache_row(a, a->values, head, 0, type);
  int64_t bytes = row_bytes(a, type);
  for (int64_t column = 0; column < count; column++, value += bytes) {
    float weight = weights[column];
    if (type == CACHE_INT8) weight *= a->value_scales[row_of(a, head, column)];
#pragma GCC unroll 4
    for (int n = 0; n < vectors; n++)
      sums[n] = multiply_add(load_value(value, first + n * LANES, a->head_dim, type),
                             fill_float(weight), sums[n]);
  }
  for (int n = 0; n < vectors; n++)
    store(context + first + n * LANES, multiply(sums[n], fill_float(factor)),
          a->head_dim - first - n * LANES);
}

static float *context_row(const CachedAttention *a, int64_t head, int64_t member,
                          int64_t token) {
  int64_t sequence = head / a->kv_heads;
  int64_t query = head % a->kv_heads * group(a) + member;
  return a->context +
         ((sequence * a->length + token) * a->heads + query) * a->head_dim;
}

INLINE void attend_in_place(const CachedAttention *a, int64_t head, float *scores,
                            const CacheType type) {
  float scale = scale_of(a);
  for (int64_t member = 0; member < group(a); member++)
    for (int64_t token = 0; token < a->length; token++) {
      int64_t count = visible_keys(a, head / a->kv_heads, token), first = 0;
      float *context = context_row(a, head, member, token);
      score_keys(a, query_row(a, head, member, token), head, count, scores, type);
      float factor = 1 / exponentials(scores, count, scale);
      for (; first + 4 * LANES <= a->head_dim; first += 4 * LANES)
        add_values(a, scores, head, count, factor, first, context, 4, type);
      for (; first < a->head_dim; first += LANES)
        add_values(a, scores, head, count, factor, first, context, 1, type);
    }
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

/* Adds `inputs` words of some rows times a tile to sums, which are first multiplied. */
INLINE void multiply_tile(const uint32_t *tile, const uint32_t *x, int64_t stride,
                          int64_t inputs, float *to, int64_t to_stride, const int rows,
                          const int accumulate, const CacheType type) {
  Floats sums[MAX_SUMS];
#pragma GCC unroll 8
  for (int m = 0; m < rows; m++)
    sums[m] = accumulate ? load_floats(to + m * to_stride) : fill_float(0);
  for (int64_t k = 0; k < inputs; k++) {
    Words w = load_words(tile + k * LANES);
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++)
      sums[m] = add_words(sums[m], w, fill_word((int32_t)x[m * stride + k]), type);
  }
#pragma GCC unroll 8
  for (int m = 0; m < rows; m++) store(to + m * to_stride, sums[m], LANES);
}

INLINE void multiply_rows(const uint32_t *tile, const uint32_t *x, int64_t stride,
                          int64_t inputs, float *to, int64_t to_stride, int64_t rows,
                          const int accumulate, const CacheType type) {
  int64_t row = 0;
  for (; row + MAX_SUMS <= rows; row += MAX_SUMS)
    multiply_tile(tile, x + row * stride, stride, inputs, to + row * to_stride, to_stride,
                  MAX_SUMS, accumulate, type);
  for (; row < rows; row++)
    multiply_tile(tile, x + row * stride, stride, inputs, to + row * to_stride, to_stride,
                  1, accumulate, type);
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
      multiply_rows(t->keys + n * a->words, queries, a->words,
                    (a->head_dim + per_word - 1) / per_word, t->scores + row * KEYS + n,
                    KEYS, tokens, 0, type);
    for (int64_t token = first; token < end; token++) {
      int64_t count = visible_keys(a, sequence, token) - column;
      weigh_row(t, row + token - first, count < 0 ? 0 : count < keys ? count : keys, scale,
                dimensions, type);
    }
  }
  for (int64_t k = 0; k < dimensions; k += LANES)
    multiply_rows(t->values + k * (KEYS / per_word), (const uint32_t *)t->scores, KEYS,
                  (keys + per_word - 1) / per_word, t->sums + k, dimensions,
                  group(a) * tokens, 1, type);
}

INLINE void attend_with_tiles(const CachedAttention *a, int64_t head, int64_t first,
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

static void attend_few(const CachedAttention *a, int64_t head) {
  int64_t columns = round_up(visible_keys(a, head / a->kv_heads, a->length - 1), LANES);
  float *scores = malloc(columns * sizeof *scores);
  if (!scores) *a->no_memory = 1;
  if (scores && a->type == CACHE_FLOAT16)
    attend_in_place(a, head, scores, CACHE_FLOAT16);
  else if (scores && a->type == CACHE_BFLOAT16)
    attend_in_place(a, head, scores, CACHE_BFLOAT16);
  else if (scores)
    attend_in_place(a, head, scores, CACHE_INT8);
  free(scores);
}

static void attend_many(const CachedAttention *a, int64_t head, int64_t first, int64_t end) {
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
    attend_with_tiles(a, head, first, end, &t, CACHE_FLOAT16);
  else if (a->type == CACHE_BFLOAT16)
    attend_with_tiles(a, head, first, end, &t, CACHE_BFLOAT16);
  else
    attend_with_tiles(a, head, first, end, &t, CACHE_INT8);
  free(memory);
}

void attend_blocks(const CachedAttention *a, int64_t first, int64_t end) {
  int64_t tokens = tokens_of_a_block(a), blocks = blocks_of_a_head(a);
  for (int64_t i = first; i < end; i++) {
    int64_t begin = i % blocks * tokens, last = begin + tokens;
    if (last > a->length) last = a->length;
    if (group(a) * a->length < ROWS_OF_TILES)
      attend_few(a, i / blocks);
    else
      attend_many(a, i / blocks, begin, last);
  }
}
