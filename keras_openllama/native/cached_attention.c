/* The new tokens are written to the cache, and few queries read the keys and values
   where they are. */

#include "cached_attention.h"

#include <stdlib.h>

#include "cache_rows.h"
#include "rotate_row.h"

/* Heuristics: queries from which on tiles pay, queries that share tiles, and how far
   ahead keys are asked for. */
enum { ROWS_OF_TILES = 12, ROWS_OF_A_BLOCK = 128, FETCHED_ROWS = 32 };

int64_t words_of_a_query(const CachedAttention *a) {
  int per_word = inputs_per_word(a->type);
  return round_up((a->head_dim + per_word - 1) / per_word, LANES);
}

/* Tokens whose queries are computed together. */
static int64_t tokens_of_a_block(const CachedAttention *a) {
  int64_t tokens = ROWS_OF_A_BLOCK / group(a);
  return tokens > 1 ? tokens : 1;
}

int64_t blocks_of_a_head(const CachedAttention *a) {
  return (a->length + tokens_of_a_block(a) - 1) / tokens_of_a_block(a);
}

static const float *head_of_token(const CachedAttention *a, int64_t sequence, int64_t token,
                                  int64_t head) {
  int64_t heads = a->heads + 2 * a->kv_heads;
  return a->qkv + ((sequence * a->length + token) * heads + head) * a->head_dim;
}

static void rotate(const CachedAttention *a, const float *x, int64_t position, float *to) {
  int64_t half = a->head_dim / 2, table = position * half;
  rotate_row(to, x, a->cosines + table, a->sines + table, half, 1);
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
                            load_words(query + k), type == CACHE_BFLOAT16);
    }
    Floats products = sums_of(sums);
    if (type == CACHE_INT8)
      products =
          multiply(products, load_some(a->key_scales + row_of(a, head, column), left));
    store(scores + column, products, LANES);
  }
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

void attend_blocks(const CachedAttention *a, int64_t first, int64_t end) {
  int64_t tokens = tokens_of_a_block(a), blocks = blocks_of_a_head(a);
  for (int64_t i = first; i < end; i++) {
    int64_t begin = i % blocks * tokens, last = begin + tokens;
    if (last > a->length) last = a->length;
    if (group(a) * a->length < ROWS_OF_TILES)
      attend_few(a, i / blocks);
    else
      attend_with_tiles(a, i / blocks, begin, last);
  }
}
