/* Causal attention of new tokens to a KV cache, which they are written to first. */

#ifndef CACHED_ATTENTION_H
#define CACHED_ATTENTION_H

#include <stdint.h>

typedef enum { CACHE_FLOAT16, CACHE_BFLOAT16, CACHE_INT8 } CacheType;

typedef struct {
  int64_t batch, length; /* Sequences, and new tokens of each. */
  int64_t heads, kv_heads, head_dim;
  int64_t columns;    /* Tokens that the cache has room for. */
  CacheType type;     /* Of an element of the cache. */
  const float *qkv;   /* (batch, length, heads + 2 * kv_heads, head_dim) */
  void *keys, *values; /* (batch, kv_heads, columns, head_dim) */
  /* By which integers are to be multiplied: (batch, kv_heads, columns). */
  float *key_scales, *value_scales;
  const int32_t *last_positions; /* (batch): of the last token of a sequence. */
  const float *cosines, *sines;  /* (positions, head_dim / 2) */
  float *context;                /* (batch, length, heads, head_dim) */
  /* The rotated queries as the instructions read them: two of bfloat16 in 32 bits, or
     one of float32; (batch, kv_heads, heads of a group, length, words). */
  uint32_t *queries;
  int64_t words;
  int *no_memory; /* Set to 1 if there is no memory for what is computed. */
} CachedAttention;

/* Words that a query takes, which is filled up by zeros. */
int64_t words_of_a_query(const CachedAttention *attention);

/* Rotates and writes the keys, values and queries of some key/value heads, which are
   counted over all sequences. */
void write_heads(const CachedAttention *attention, int64_t first_head, int64_t end_head);

/* Number of parts that the attention of a key/value head is divided into. */
int64_t blocks_of_a_head(const CachedAttention *attention);

/* Computes the context of some of these parts, which are counted over all heads. */
void attend_blocks(const CachedAttention *attention, int64_t first, int64_t end);

#endif
