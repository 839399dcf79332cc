/* Blocks of keys and queries, as in FlashAttention (arXiv:2205.14135). Scores are
   computed with one query in each lane, so that a softmax needs no sum over lanes. A
   block of them is multiplied by values, or by the other factor of a gradient, while it
   is in the cache. Blocks after the diagonal are skipped. */

#include "causal_attention.h"

#include <math.h>
#include <stdlib.h>

#include "block_product.h"
#include "worker_threads.h"

/* Queries, and keys, of a block: 64, the bits of a word of the mask. */
enum { BLOCK = 64 };
/* Heuristic: products of fewer elements are computed in one thread. */
static const double SMALL = 1 << 20;
/* A finite score of hidden keys, below all others. */
static const float LOWEST = -1e30f;

static const float ONES[BLOCK] = {[0 ... BLOCK - 1] = 1};

/* Matrices of one thread. Rows of heads are padded with zeros to `width`. */
typedef struct {
  float *key, *value, *key_gradient, *value_gradient;       /* (length, width) */
  float *query, *output_gradient, *result;                  /* (BLOCK, width) */
  float *query_columns, *gradient_columns;                  /* (width, BLOCK) */
  float *weights, *score_gradients;                         /* (keys, queries) */
  float *maxima, *sums, *factors, *log_sums, *products;     /* (BLOCK) */
} Scratch;

typedef struct {
  CausalAttention a;
  int64_t width, padded_length, scratch_size;
  float scale;
  float *scratch;
} Task;

/* The queries of a block, and what of the keys they are compared with. */
typedef struct {
  int64_t sequence, head, first_query, queries, padded_queries;
  int64_t first_key, keys;
  int is_diagonal, is_masked;
  uint64_t visible[BLOCK]; /* Bit q of word k: whether query q may attend to key k. */
} Block;

static Scratch scratch_of(const Task *t, int64_t thread) {
  float *next = t->scratch + thread * t->scratch_size;
  int64_t whole = t->padded_length * t->width, block = BLOCK * t->width;
  Scratch s;
  float **parts[] = {&s.key, &s.value, &s.key_gradient, &s.value_gradient,
                     &s.query, &s.output_gradient, &s.result, &s.query_columns,
                     &s.gradient_columns, &s.weights, &s.score_gradients, &s.maxima,
                     &s.sums, &s.factors, &s.log_sums, &s.products};
  for (int i = 0; i < 16; i++) {
    *parts[i] = next;
    next += i < 4 ? whole : i < 9 ? block : i < 11 ? BLOCK * BLOCK : BLOCK;
  }
  return s;
}

static void copy_rows(const Task *t, float *to, Heads from, int64_t sequence,
                      int64_t head, int64_t first, int64_t rows) {
  int64_t used = t->a.head_dim, rest = t->width - used;
  for (int64_t i = 0; i < rows; i++, to += t->width) {
    memcpy(to, row_of(from, sequence, head, first + i), used * sizeof *to);
    memset(to + used, 0, rest * sizeof *to);
  }
  memset(to, 0, (round_up(rows, LANES) - rows) * t->width * sizeof *to);
}

static void write_rows(const Task *t, Heads to, int64_t sequence, int64_t head,
                       int64_t first, int64_t rows, const float *from,
                       const float *factors, float factor) {
  for (int64_t i = 0; i < rows; i++, from += t->width) {
    float *row = row_of(to, sequence, head, first + i);
    Floats scale = fill_float(factors ? factors[i] : factor);
    for (int64_t d = 0; d < t->a.head_dim; d += LANES)
      store(row + d, multiply(load_floats(from + d), scale), t->a.head_dim - d);
  }
}

/* Rows (BLOCK, width) times a factor, as columns (width, BLOCK). */
static void transpose_rows(const Task *t, float *to, const float *from, int64_t rows,
                           float factor) {
  for (int64_t d = 0; d < t->width; d += LANES)
    for (int64_t row = 0; row < rows; row += LANES) {
      Words w[LANES];
      for (int i = 0; i < LANES; i++) {
        Floats x = load_floats(from + (row + i) * t->width + d);
        x = multiply(x, fill_float(factor));
        memcpy(&w[i], &x, sizeof x);
      }
      transpose(w);
      for (int i = 0; i < LANES; i++)
        store_words((uint32_t *)to + (d + i) * BLOCK + row, w[i]);
    }
}

/* Exchanges rows and columns of 64 x 64 bits, in six steps of half the distance. */
static void transpose_bits(uint64_t *rows) {
  uint64_t low = 0xffffffff;
  for (int distance = 32; distance; distance >>= 1, low ^= low << distance)
    for (int i = 0; i < BLOCK; i = ((i | distance) + 1) & ~distance) {
      uint64_t other = ((rows[i] >> distance) ^ rows[i | distance]) & low;
      rows[i | distance] ^= other;
      rows[i] ^= other << distance;
    }
}

static void start_keys(const Task *t, Block *b, int64_t first_key) {
  int64_t length = t->a.length;
  b->first_key = first_key;
  b->keys = smaller(BLOCK, length - first_key);
  b->is_diagonal = first_key == b->first_query;
  const uint8_t *mask = t->a.mask + b->sequence * t->a.mask_sequence +
                        b->first_query * length + first_key;
  uint64_t in_all = UINT64_MAX;
  for (int64_t i = 0; i < BLOCK; i++, mask += length) {
    uint8_t bytes[BLOCK] = {0};
    if (b->keys < BLOCK && i < b->queries) memcpy(bytes, mask, b->keys);
    b->visible[i] = i >= b->queries ? 0 : nonzero_bytes(b->keys < BLOCK ? bytes : mask);
    if (i < b->queries) in_all &= b->visible[i];
  }
  b->is_masked = b->is_diagonal || in_all != UINT64_MAX >> (BLOCK - b->keys);
  if (b->is_masked) transpose_bits(b->visible);
}

/* The bits of the lanes from a query on. */
INLINE uint32_t visible_lanes(const Block *b, int64_t key, int64_t query) {
  return (uint32_t)(b->visible[key] >> query);
}

/* On the diagonal, no more keys are computed for a tile. */
INLINE int64_t keys_for(const Block *b, int64_t query) {
  int64_t end = query / TILE_COLUMNS * TILE_COLUMNS + TILE_COLUMNS;
  return b->is_diagonal ? smaller(b->keys, end) : b->keys;
}

/* (keys, queries): products of rows of keys, or values, and columns. */
static void multiply_rows(const Task *t, const Block *b, float *to, const float *rows,
                          const float *columns) {
  LeftMatrix left = {rows + b->first_key * t->width, t->width, 1};
  int64_t keys = round_up(b->keys, MAX_ROWS), queries = b->padded_queries;
  if (b->is_diagonal)
    multiply_into(to, BLOCK, NULL, left, columns, BLOCK, keys, queries, t->a.head_dim,
                  ROWS_UP_TO_COLUMN);
  else
    multiply_into(to, BLOCK, NULL, left, columns, BLOCK, keys, queries, t->a.head_dim,
                  ALL);
}

/* keep * to + the sum over keys of weights (keys, queries) and rows of keys. */
static void add_over_keys(const Task *t, const Block *b, float *to, const float *keep,
                          const float *weights, const float *rows) {
  LeftMatrix left = {weights, 1, BLOCK};
  int64_t queries = round_up(b->queries, MAX_ROWS), width = t->width;
  rows += b->first_key * width;
  if (b->is_diagonal)
    multiply_into(to, width, keep, left, rows, width, queries, width, b->keys,
                  STEPS_UP_TO_ROW);
  else
    multiply_into(to, width, keep, left, rows, width, queries, width, b->keys, ALL);
}

/* Adds to rows of keys the sum over queries of weights (keys, queries) and rows. */
static void add_over_queries(const Task *t, const Block *b, float *to,
                             const float *weights, const float *rows) {
  LeftMatrix left = {weights, BLOCK, 1};
  int64_t keys = round_up(b->keys, MAX_ROWS), width = t->width;
  to += b->first_key * width;
  if (b->is_diagonal)
    multiply_into(to, width, ONES, left, rows, width, keys, width, b->queries,
                  STEPS_FROM_ROW);
  else
    multiply_into(to, width, ONES, left, rows, width, keys, width, b->queries, ALL);
}

/* Scores of a block to weights relative to the greatest score so far. */
INLINE void update_softmax(const Block *b, const Scratch *s, const int is_masked) {
  for (int64_t q = 0; q < b->padded_queries; q += LANES) {
    int64_t keys = keys_for(b, q);
    Floats before = load_floats(s->maxima + q), most = before;
    for (int64_t k = 0; k < keys; k++) {
      Floats score = load_floats(s->weights + k * BLOCK + q);
      if (is_masked)
        score = select_lanes(visible_lanes(b, k, q), score, fill_float(LOWEST));
      most = larger(most, score);
    }
    Floats factor = power_of_two(subtract(before, most));
    Floats sum = multiply(load_floats(s->sums + q), factor);
    for (int64_t k = 0; k < keys; k++) {
      float *weight = s->weights + k * BLOCK + q;
      Floats x = power_of_two(subtract(load_floats(weight), most));
      if (is_masked) x = select_lanes(visible_lanes(b, k, q), x, fill_float(0));
      sum = add(sum, x);
      store(weight, x, LANES);
    }
    store(s->maxima + q, most, LANES);
    store(s->factors + q, factor, LANES);
    store(s->sums + q, sum, LANES);
  }
}

static Block start_queries(const Task *t, const Scratch *s, int64_t sequence,
                           int64_t head, int64_t first_query) {
  Block b = {.sequence = sequence, .head = head, .first_query = first_query};
  b.queries = smaller(BLOCK, t->a.length - first_query);
  b.padded_queries = round_up(b.queries, LANES);
  copy_rows(t, s->query, t->a.query, sequence, head, first_query, b.queries);
  /* Exponentials are powers of two. */
  transpose_rows(t, s->query_columns, s->query, b.padded_queries,
                 t->scale * (float)M_LOG2E);
  return b;
}

static void attend_queries(const Task *t, const Scratch *s, int64_t sequence,
                           int64_t head, int64_t first_query) {
  Block b = start_queries(t, s, sequence, head, first_query);
  memset(s->result, 0, BLOCK * t->width * sizeof(float));
  for (int64_t q = 0; q < BLOCK; q++) s->maxima[q] = LOWEST, s->sums[q] = 0;
  for (int64_t first_key = 0; first_key <= first_query; first_key += BLOCK) {
    start_keys(t, &b, first_key);
    multiply_rows(t, &b, s->weights, s->key, s->query_columns);
    if (b.is_masked)
      update_softmax(&b, s, 1);
    else
      update_softmax(&b, s, 0);
    add_over_keys(t, &b, s->result, s->factors, s->weights, s->value);
  }
  float *log_sums = t->a.log_sums +
                    (sequence * t->a.heads * t->a.group + head) * t->a.length +
                    first_query;
  for (int64_t q = 0; q < b.queries; q++) {
    float sum = s->sums[q];
    log_sums[q] = sum == 0 ? 0 : s->maxima[q] + log2f(sum);
    s->factors[q] = sum == 0 ? 0 : 1 / sum;
  }
  write_rows(t, t->a.output, sequence, head, first_query, b.queries, s->result,
             s->factors, 1);
}

static void attend_forward(const void *task, int64_t item, int64_t thread) {
  const Task *t = task;
  Scratch s = scratch_of(t, thread);
  int64_t sequence = item / t->a.heads, head = item % t->a.heads;
  copy_rows(t, s.key, t->a.key, sequence, head, 0, t->a.length);
  copy_rows(t, s.value, t->a.value, sequence, head, 0, t->a.length);
  for (int64_t i = 0; i < t->a.group; i++)
    for (int64_t query = 0; query < t->a.length; query += BLOCK)
      attend_queries(t, &s, sequence, head * t->a.group + i, query);
}

/* Scores and gradients of weights to weights and gradients of scores. */
INLINE void differentiate_softmax(const Block *b, const Scratch *s,
                                  const int is_masked) {
  for (int64_t q = 0; q < b->padded_queries; q += LANES) {
    int64_t keys = keys_for(b, q);
    Floats log_sum = load_floats(s->log_sums + q), product = load_floats(s->products + q);
    for (int64_t k = 0; k < keys; k++) {
      float *weight = s->weights + k * BLOCK + q;
      float *gradient = s->score_gradients + k * BLOCK + q;
      Floats x = power_of_two(subtract(load_floats(weight), log_sum));
      if (is_masked) x = select_lanes(visible_lanes(b, k, q), x, fill_float(0));
      store(weight, x, LANES);
      store(gradient, multiply(x, subtract(load_floats(gradient), product)), LANES);
    }
  }
}

/* For each query, its logarithm of the sum, and the product of its output and the
   gradient, which is the sum of its weights' gradients times the weights. */
static void read_sums(const Task *t, const Scratch *s, const Block *b) {
  const CausalAttention *a = &t->a;
  const float *log_sums =
      a->log_sums + (b->sequence * a->heads * a->group + b->head) * a->length +
      b->first_query;
  copy_rows(t, s->result, a->output, b->sequence, b->head, b->first_query, b->queries);
  for (int64_t q = 0; q < b->padded_queries; q++) {
    Floats sum = fill_float(0);
    for (int64_t d = 0; d < t->width; d += LANES)
      sum = multiply_add(load_floats(s->result + q * t->width + d),
                         load_floats(s->output_gradient + q * t->width + d), sum);
    s->products[q] = sum_of(sum);
    s->log_sums[q] = q < b->queries ? log_sums[q] : 0;
  }
}

static void differentiate_queries(const Task *t, const Scratch *s, int64_t sequence,
                                  int64_t head, int64_t first_query) {
  Block b = start_queries(t, s, sequence, head, first_query);
  copy_rows(t, s->output_gradient, t->a.output_gradient, sequence, head, first_query,
            b.queries);
  transpose_rows(t, s->gradient_columns, s->output_gradient, b.padded_queries, 1);
  read_sums(t, s, &b);
  memset(s->result, 0, BLOCK * t->width * sizeof(float));
  for (int64_t first_key = 0; first_key <= first_query; first_key += BLOCK) {
    start_keys(t, &b, first_key);
    multiply_rows(t, &b, s->weights, s->key, s->query_columns);
    multiply_rows(t, &b, s->score_gradients, s->value, s->gradient_columns);
    if (b.is_masked)
      differentiate_softmax(&b, s, 1);
    else
      differentiate_softmax(&b, s, 0);
    add_over_queries(t, &b, s->value_gradient, s->weights, s->output_gradient);
    add_over_queries(t, &b, s->key_gradient, s->score_gradients, s->query);
    add_over_keys(t, &b, s->result, ONES, s->score_gradients, s->key);
  }
  write_rows(t, t->a.query_gradient, sequence, head, first_query, b.queries, s->result,
             NULL, t->scale);
}

static void attend_backward(const void *task, int64_t item, int64_t thread) {
  const Task *t = task;
  Scratch s = scratch_of(t, thread);
  int64_t sequence = item / t->a.heads, head = item % t->a.heads;
  int64_t length = t->a.length, size = t->padded_length * t->width * sizeof(float);
  copy_rows(t, s.key, t->a.key, sequence, head, 0, length);
  copy_rows(t, s.value, t->a.value, sequence, head, 0, length);
  memset(s.key_gradient, 0, size);
  memset(s.value_gradient, 0, size);
  for (int64_t i = 0; i < t->a.group; i++)
    for (int64_t query = 0; query < length; query += BLOCK)
      differentiate_queries(t, &s, sequence, head * t->a.group + i, query);
  write_rows(t, t->a.key_gradient, sequence, head, 0, length, s.key_gradient, NULL,
             t->scale);
  write_rows(t, t->a.value_gradient, sequence, head, 0, length, s.value_gradient, NULL,
             1);
}

static int run(const CausalAttention *a, DoItem do_item) {
  int64_t items = a->sequences * a->heads, threads = smaller(a->threads, items);
  double size = (double)items * a->group * a->length * a->length * a->head_dim;
  if (threads < 1 || size < SMALL) threads = 1;
  Task t = {.a = *a};
  t.scale = (float)(1 / sqrt((double)a->head_dim));
  t.width = round_up(a->head_dim, LANES);
  t.padded_length = round_up(a->length, LANES);
  t.scratch_size = (4 * t.padded_length + 5 * BLOCK) * t.width + (2 * BLOCK + 5) * BLOCK;
  if (posix_memalign((void **)&t.scratch, 64, threads * t.scratch_size * sizeof(float)))
    return 1;
  share_items(do_item, &t, items, threads);
  free(t.scratch);
  return 0;
}

int causal_attention_forward(const CausalAttention *a) { return run(a, attend_forward); }

int causal_attention_backward(const CausalAttention *a) { return run(a, attend_backward); }
