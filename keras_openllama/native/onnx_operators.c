/* Operators of ONNX Runtime in the domain `keras_openllama`.

   QuantizedProduct
   inputs     x float32 (..., inputs), words uint8 (tiles, groups, bytes), scales
              float16 (tiles, scales of an output, lanes)
   attributes bits, N (outputs), groups_per_scale, gated
   output     float32 (..., outputs)

   DenseProduct
   inputs     x float32 (..., inputs), one to three weights bfloat16 (outputs, inputs)
   attributes gated
   output     float32 (..., all outputs, one matrix after the other)

   With `gated`, a product is of silu(first half of x) * second half.

   CachedAttention
   inputs     qkv float32 (batch, length, heads of queries, keys and values), keys and
              values float16, bfloat16 or int8 (batch, kv_num_heads, columns, head_dim),
              which are written to, last_positions int32 (batch), cosines and sines
              float32 (positions, head_dim / 2); if the cache is int8, its scales of
              keys and of values float32 (batch, kv_num_heads, columns), written to too
   attributes num_heads, kv_num_heads
   output     float32 (batch, length, heads of queries) */

#include <stdlib.h>
#include <string.h>

#include "cached_attention.h"
#include "dense_product.h"
#include "onnx_runtime_api.h"
#include "quantized_product.h"
#include "swiglu.h"

/* Heuristics: parts that the work is divided into, for threads of unequal speed; rows
   from which on several threads convert the inputs; multiplications from which on
   several threads attend. */
enum { PARTS = 64, ROWS_OF_ONE_THREAD = 16, PRODUCTS_OF_ONE_THREAD = 1 << 15 };

typedef struct {
  const void *argument;
  void (*work)(const void *argument, int64_t first, int64_t end);
  int64_t count, parts;
} Work;

static void do_part(void *argument, size_t i) {
  const Work *work = argument;
  work->work(work->argument, work->count * (int64_t)i / work->parts,
             work->count * ((int64_t)i + 1) / work->parts);
}

/* Does work for `count` rows or blocks on the threads of ONNX Runtime. */
static Status run(Object context, const void *argument, int64_t count,
                  void (*work)(const void *, int64_t, int64_t)) {
  Work all = {argument, work, count, count < PARTS ? count : PARTS};
  return run_parts(context, do_part, all.parts, &all);
}

static Status run_rows(Object context, const void *argument, int64_t rows,
                       void (*work)(const void *, int64_t, int64_t)) {
  if (rows >= ROWS_OF_ONE_THREAD) return run(context, argument, rows, work);
  work(argument, 0, rows);
  return NULL;
}

static int64_t rows_of(const Tensor *x) {
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < x->dimensions; i++) rows *= x->shape[i];
  return rows;
}

/* The inputs of a product. */
typedef struct {
  const float *rows;
  int64_t count, size;
  float *memory; /* To be freed. */
} Inputs;

typedef struct {
  const float *from;
  float *to;
  int64_t size;
} Gate;

static void gate_rows(const void *argument, int64_t first, int64_t end) {
  const Gate *gate = argument;
  for (int64_t row = first; row < end; row++)
    swiglu(gate->from + row * 2 * gate->size, gate->size, gate->to + row * gate->size);
}

static Status get_inputs(Object context, const Tensor *x, int64_t gated, Inputs *inputs) {
  *inputs = (Inputs){x->data, rows_of(x), x->shape[x->dimensions - 1], NULL};
  if (!gated) return NULL;
  if (inputs->size % 2) return error(INVALID_ARGUMENT, "x has no two halves");
  inputs->size /= 2;
  inputs->memory = malloc((inputs->count * inputs->size + 1) * sizeof(float));
  if (!inputs->memory) return error(FAILED, "No memory for the inputs");
  inputs->rows = inputs->memory;
  Gate gate = {x->data, inputs->memory, inputs->size};
  return run_rows(context, &gate, inputs->count, gate_rows);
}

typedef struct {
  int64_t bits, outputs, groups_per_scale, gated;
} QuantizedKernel;

static Status created(const void *kernel, size_t size, void **copy) {
  if (!(*copy = malloc(size))) return error(FAILED, "No memory");
  memcpy(*copy, kernel, size);
  return NULL;
}

static Status create_quantized(const void *operator, Object api_, Object info,
                               void **kernel) {
  (void)operator;
  (void)api_;
  QuantizedKernel k;
  RETURN_IF(get_integer(info, "bits", &k.bits));
  RETURN_IF(get_integer(info, "N", &k.outputs));
  RETURN_IF(get_integer(info, "groups_per_scale", &k.groups_per_scale));
  RETURN_IF(get_integer(info, "gated", &k.gated));
  return created(&k, sizeof k, kernel);
}

static void round_rows(const void *product, int64_t first, int64_t end) {
  round_inputs(product, first, end);
}
static void multiply_quantized(const void *product, int64_t first, int64_t end) {
  multiply_tiles(product, first, end);
}

static Status multiply_rounded(Object context, QuantizedProduct *product) {
  int64_t groups = product->rows * product->groups;
  char *memory = malloc(groups * (GROUP + sizeof(float) + sizeof(int32_t)));
  if (!memory) return error(FAILED, "No memory for the rounded inputs");
  product->input_scales = (float *)memory;
  product->corrections = (int32_t *)(product->input_scales + groups);
  product->rounded = (int8_t *)(product->corrections + groups);
  Status status = run_rows(context, product, product->rows, round_rows);
  if (!status)
    status = run(context, product, number_of_tiles(product), multiply_quantized);
  free(memory);
  return status;
}

static Status compute_quantized(void *kernel, void *context) {
  const QuantizedKernel *k = kernel;
  Tensor x, words, scales;
  RETURN_IF(get_input(context, 0, 0, &x));
  RETURN_IF(get_input(context, 1, 3, &words));
  RETURN_IF(get_input(context, 2, 3, &scales));
  QuantizedProduct product = {
      .num_inputs = x.shape[x.dimensions - 1] / (k->gated ? 2 : 1),
      .num_outputs = k->outputs,
      .bits = (int)k->bits,
      .groups = words.shape[1],
      .groups_per_scale = k->groups_per_scale,
      .scales_per_output = scales.shape[1],
      .words = words.data,
      .scales = scales.data,
  };
  if (product.num_inputs > product.groups * GROUP ||
      words.shape[0] != number_of_tiles(&product))
    return error(INVALID_ARGUMENT, "x and words have other sizes");
  if (words.shape[2] != 4 * lanes() * product.bits || scales.shape[2] != lanes() ||
      scales.shape[0] != words.shape[0] || product.groups_per_scale < 1 ||
      product.scales_per_output * product.groups_per_scale < product.groups)
    return error(INVALID_ARGUMENT, "words and scales have other sizes");
  RETURN_IF(get_output(context, &x, product.num_outputs, &product.outputs));
  Inputs inputs;
  Status status = get_inputs(context, &x, k->gated, &inputs);
  product.inputs = inputs.rows;
  product.rows = inputs.count;
  if (!status && product.rows) status = multiply_rounded(context, &product);
  free(inputs.memory);
  return status;
}

typedef struct {
  int64_t gated;
} DenseKernel;

static Status create_dense(const void *operator, Object api_, Object info,
                           void **kernel) {
  (void)operator;
  (void)api_;
  DenseKernel k;
  RETURN_IF(get_integer(info, "gated", &k.gated));
  return created(&k, sizeof k, kernel);
}

static void convert_rows(const void *product, int64_t first, int64_t end) {
  convert_inputs(product, first, end);
}
static void multiply_dense(const void *product, int64_t first, int64_t end) {
  multiply_blocks(product, first, end);
}

static Status multiply_converted(Object context, DenseProduct *product) {
  product->words = words_of_a_row(product->num_inputs);
  product->x = malloc(product->rows * product->words * sizeof *product->x);
  if (!product->x) return error(FAILED, "No memory for the inputs");
  Status status = run_rows(context, product, product->rows, convert_rows);
  if (!status)
    status = run(context, product, number_of_blocks(product), multiply_dense);
  free(product->x);
  return status;
}

static Status get_matrices(Object context, DenseProduct *product) {
  size_t count;
  RETURN_IF(count_inputs(context, &count));
  for (size_t i = 1; i < count; i++) {
    Tensor weights;
    RETURN_IF(get_input(context, i, 2, &weights));
    if (weights.shape[1] != product->num_inputs)
      return error(INVALID_ARGUMENT, "x and weights have other sizes");
    product->matrices[i - 1] = (DenseMatrix){weights.data, weights.shape[0]};
    product->num_outputs += weights.shape[0];
  }
  return NULL;
}

static Status compute_dense(void *kernel, void *context) {
  const DenseKernel *k = kernel;
  Tensor x;
  RETURN_IF(get_input(context, 0, 0, &x));
  DenseProduct product = {
      .num_inputs = x.shape[x.dimensions - 1] / (k->gated ? 2 : 1),
  };
  RETURN_IF(get_matrices(context, &product));
  RETURN_IF(get_output(context, &x, product.num_outputs, &product.outputs));
  Inputs inputs;
  Status status = get_inputs(context, &x, k->gated, &inputs);
  product.inputs = inputs.rows;
  product.rows = inputs.count;
  if (!status && product.rows) status = multiply_converted(context, &product);
  free(inputs.memory);
  return status;
}

typedef struct {
  int64_t heads, kv_heads;
} AttentionKernel;

static Status create_attention(const void *operator, Object api_, Object info,
                               void **kernel) {
  (void)operator;
  (void)api_;
  AttentionKernel k;
  RETURN_IF(get_integer(info, "num_heads", &k.heads));
  RETURN_IF(get_integer(info, "kv_num_heads", &k.kv_heads));
  return created(&k, sizeof k, kernel);
}

static void write_cache(const void *attention, int64_t first, int64_t end) {
  write_heads(attention, first, end);
}
static void attend(const void *attention, int64_t first, int64_t end) {
  attend_blocks(attention, first, end);
}
static void write_and_attend(const void *attention, int64_t first, int64_t end) {
  write_heads(attention, first, end);
  attend_blocks(attention, first, end);
}

static Status attend_written(Object context, CachedAttention *a, int64_t most_keys) {
  int no_memory = 0;
  int64_t heads = a->batch * a->kv_heads, blocks = heads * blocks_of_a_head(a);
  int64_t rows = a->batch * a->heads * a->length;
  a->no_memory = &no_memory;
  a->words = words_of_a_query(a);
  a->queries = malloc(rows * a->words * sizeof *a->queries);
  if (!a->queries) return error(FAILED, "No memory for the queries");
  Status status = NULL;
  if (rows * most_keys * a->head_dim < PRODUCTS_OF_ONE_THREAD) {
    write_heads(a, 0, heads);
    attend_blocks(a, 0, blocks);
  } else if (blocks == heads) {
    status = run(context, a, heads, write_and_attend);
  } else { /* The blocks of a head need all of its keys. */
    status = run(context, a, heads, write_cache);
    if (!status) status = run(context, a, blocks, attend);
  }
  free(a->queries);
  if (!status && no_memory) status = error(FAILED, "No memory for attention");
  return status;
}

/* The cache's scales and type. */
static Status get_cache_type(Object context, const Tensor *keys, const Tensor *values,
                             CachedAttention *a) {
  Tensor scales[2];
  size_t count;
  if (values->type != keys->type)
    return error(INVALID_ARGUMENT, "keys and values are of different types");
  a->type = keys->type == BFLOAT16 ? CACHE_BFLOAT16 : CACHE_FLOAT16;
  if (keys->type == BFLOAT16 || keys->type == FLOAT16) return NULL;
  RETURN_IF(count_inputs(context, &count));
  if (keys->type != INT8 || count != 8)
    return error(INVALID_ARGUMENT,
                 "the cache is neither float16 nor bfloat16, nor int8 with scales");
  for (size_t i = 0; i < 2; i++) {
    RETURN_IF(get_input(context, 6 + i, 3, &scales[i]));
    for (size_t axis = 0; axis < 3; axis++)
      if (scales[i].shape[axis] != keys->shape[axis])
        return error(INVALID_ARGUMENT, "the cache and its scales have other sizes");
  }
  a->type = CACHE_INT8;
  a->key_scales = scales[0].data;
  a->value_scales = scales[1].data;
  return NULL;
}

static Status compute_attention(void *kernel, void *context) {
  const AttentionKernel *k = kernel;
  Tensor qkv, keys, values, last, cosines, sines;
  RETURN_IF(get_input(context, 0, 3, &qkv));
  RETURN_IF(get_input(context, 1, 4, &keys));
  RETURN_IF(get_input(context, 2, 4, &values));
  RETURN_IF(get_input(context, 3, 1, &last));
  RETURN_IF(get_input(context, 4, 2, &cosines));
  RETURN_IF(get_input(context, 5, 2, &sines));
  CachedAttention a = {
      .batch = qkv.shape[0],
      .length = qkv.shape[1],
      .heads = k->heads,
      .kv_heads = k->kv_heads,
      .head_dim = keys.shape[3],
      .columns = keys.shape[2],
      .qkv = qkv.data,
      .keys = keys.data,
      .values = values.data,
      .last_positions = last.data,
      .cosines = cosines.data,
      .sines = sines.data,
  };
  int64_t most_keys = 0;
  for (size_t i = 0; i < 4; i++)
    if (keys.shape[i] != values.shape[i])
      return error(INVALID_ARGUMENT, "keys and values have other sizes");
  RETURN_IF(get_cache_type(context, &keys, &values, &a));
  if (a.kv_heads < 1 || a.heads % a.kv_heads ||
      qkv.shape[2] != (a.heads + 2 * a.kv_heads) * a.head_dim ||
      keys.shape[0] != a.batch || keys.shape[1] != a.kv_heads ||
      last.shape[0] != a.batch || cosines.shape[1] * 2 != a.head_dim ||
      sines.shape[0] != cosines.shape[0] || sines.shape[1] != cosines.shape[1])
    return error(INVALID_ARGUMENT, "qkv, the cache and the tables have other sizes");
  for (int64_t i = 0; i < a.batch; i++) {
    int64_t count = a.last_positions[i] + 1;
    if (count < a.length || count > a.columns || count > cosines.shape[0])
      return error(INVALID_ARGUMENT, "a position is outside of the cache or the tables");
    if (count > most_keys) most_keys = count;
  }
  RETURN_IF(get_output(context, &qkv, a.heads * a.head_dim, &a.context));
  return a.batch && a.length ? attend_written(context, &a, most_keys) : NULL;
}

static const char *quantized_name(const void *operator) {
  (void)operator;
  return "QuantizedProduct";
}
static const char *dense_name(const void *operator) {
  (void)operator;
  return "DenseProduct";
}
static const char *attention_name(const void *operator) {
  (void)operator;
  return "CachedAttention";
}
static const char *get_provider(const void *operator) {
  (void)operator;
  return NULL; /* The CPU. */
}
static int quantized_type(const void *operator, size_t index) {
  (void)operator;
  static const int types[] = {FLOAT32, UINT8, FLOAT16};
  return types[index];
}
static int dense_type(const void *operator, size_t index) {
  (void)operator;
  return index ? BFLOAT16 : FLOAT32;
}
static int attention_type(const void *operator, size_t index) {
  (void)operator;
  static const int types[] = {FLOAT32, ANY_TYPE, ANY_TYPE, INT32};
  return index < 4 ? types[index] : FLOAT32;
}
static size_t quantized_inputs(const void *operator) {
  (void)operator;
  return 3;
}
static size_t dense_inputs(const void *operator) {
  (void)operator;
  return 1 + MAX_MATRICES;
}
static size_t attention_inputs(const void *operator) {
  (void)operator;
  return 8;
}
static int get_output_type(const void *operator, size_t index) {
  (void)operator;
  (void)index;
  return FLOAT32;
}
static size_t count_outputs(const void *operator) {
  (void)operator;
  return 1;
}
static int is_required(const void *operator, size_t index) {
  (void)operator;
  (void)index;
  return 0; /* Neither optional nor variadic. */
}
static int is_further_matrix(const void *operator, size_t index) {
  (void)operator;
  return index > 1; /* Those are optional. */
}
static int is_scale(const void *operator, size_t index) {
  (void)operator;
  return index >= 6; /* Those are optional. */
}
static int get_memory_type(const void *operator, size_t index) {
  (void)operator;
  (void)index;
  return 0; /* That of the provider. */
}

#define OPERATOR(kind, optional)             \
  {                                          \
      .version = OPERATOR_VERSION,           \
      .name = kind##_name,                   \
      .provider = get_provider,              \
      .input_type = kind##_type,             \
      .num_inputs = kind##_inputs,           \
      .output_type = get_output_type,        \
      .num_outputs = count_outputs,          \
      .destroy = free,                       \
      .input_characteristic = optional,      \
      .output_characteristic = is_required,  \
      .input_memory_type = get_memory_type,  \
      .create_with_status = create_##kind,   \
      .compute_with_status = compute_##kind, \
  }

static const Operator operators[] = {
    OPERATOR(quantized, is_required),
    OPERATOR(dense, is_further_matrix),
    OPERATOR(attention, is_scale),
};

/* ONNX Runtime calls this when a session registers the library. */
Status RegisterCustomOps(void *options, const ApiBase *base) {
  void *domain;
  api = base->get_api(API_VERSION);
  RETURN_IF(create_domain("keras_openllama", &domain));
  for (size_t i = 0; i < sizeof operators / sizeof *operators; i++)
    RETURN_IF(add_operator(domain, operators + i));
  return add_domain(options, domain);
}
