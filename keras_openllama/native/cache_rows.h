/* Where the rows of `CachedAttention` are, and how they are read. */

#ifndef CACHE_ROWS_H
#define CACHE_ROWS_H

#include <math.h>

#include "cached_attention.h"
#include "tile_product.h"

/* `type` is a constant where the functions with it are called. */

INLINE int inputs_per_word(const CacheType type) {
  return type == CACHE_BFLOAT16 ? INPUTS_PER_WORD : 1;
}

INLINE int64_t group(const CachedAttention *a) { return a->heads / a->kv_heads; }

/* Keys that a token sees. */
INLINE int64_t visible_keys(const CachedAttention *a, int64_t sequence, int64_t token) {
  return a->last_positions[sequence] - a->length + token + 2;
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

INLINE uint32_t *query_row(const CachedAttention *a, int64_t head, int64_t member,
                           int64_t token) {
  return a->queries + ((head * group(a) + member) * a->length + token) * a->words;
}

INLINE float *context_row(const CachedAttention *a, int64_t head, int64_t member,
                          int64_t token) {
  int64_t sequence = head / a->kv_heads;
  int64_t query = head % a->kv_heads * group(a) + member;
  return a->context +
         ((sequence * a->length + token) * a->heads + query) * a->head_dim;
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

/* Of scores, so that weights are powers of two. */
INLINE float scale_of(const CachedAttention *a) {
  return 1.44269504f / sqrtf((float)a->head_dim);
}

/* Computes the context of the queries of some tokens of a key/value head, many at once:
   see `cached_attention_tiles.c`. */
void attend_with_tiles(const CachedAttention *attention, int64_t head, int64_t first_token,
                       int64_t end_token);

#endif
