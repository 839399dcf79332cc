/* Operators of ONNX Runtime in the domain `keras_openllama`.

   QuantizedProduct
   inputs     x float32 (..., inputs), words uint8 (tiles, groups, bytes), scales
              float16 (tiles, scales of an output, lanes)
   attributes bits, N (outputs), groups_per_scale
   output     float32 (..., outputs)

   DenseProduct
   inputs     x float32 (..., inputs), weights bfloat16 (outputs, inputs)
   output     float32 (..., outputs)

   ONNX Runtime's Python package has no header files. The functions that are used here,
   by their place in its table, have been there since version 1.17, and a table only
   grows at its end.
   Source: https://onnxruntime.ai/docs/reference/operators/add-custom-op.html */

#include <stddef.h>
#include <stdlib.h>

#include "dense_product.h"
#include "quantized_product.h"

typedef void *Status; /* Null for success. */
typedef const void *Object;

typedef struct {
  const void *const *(*get_api)(uint32_t version);
  const char *(*get_version)(void);
} ApiBase;

enum {
  API_VERSION = 17,
  OPERATOR_VERSION = 16, /* Of the structure `Operator`. */
  INVALID_ARGUMENT = 2,
  FAILED = 1,
  FLOAT32 = 1,
  UINT8 = 2,
  FLOAT16 = 10,
  BFLOAT16 = 16,
  MAX_DIMENSIONS = 8
};

static const void *const *api;

#define CALL(place, types, ...) ((Status(*) types)api[place])(__VA_ARGS__)
#define RETURN_IF(expression)                \
  do {                                       \
    Status returned = expression;            \
    if (returned) return returned;           \
  } while (0)

static Status error(int code, const char *message) {
  return CALL(0, (int, const char *), code, message);
}
static Status create_domain(const char *name, void **domain) {
  return CALL(26, (const char *, void **), name, domain);
}
static Status add_operator(void *domain, Object operator) {
  return CALL(27, (void *, Object), domain, operator);
}
static Status add_domain(void *options, void *domain) {
  return CALL(28, (void *, void *), options, domain);
}
static Status get_data(Object tensor, void *data) {
  return CALL(51, (Object, void *), tensor, data);
}
static Status get_shape(Object tensor, int64_t *shape, size_t *count) {
  void *info;
  RETURN_IF(CALL(65, (Object, void **), tensor, &info));
  Status status = CALL(61, (Object, size_t *), info, count);
  if (!status && *count <= MAX_DIMENSIONS)
    status = CALL(62, (Object, int64_t *, size_t), info, shape, *count);
  ((void (*)(void *))api[99])(info);
  return status;
}
static Status get_integer(Object info, const char *name, int64_t *value) {
  return CALL(86, (Object, const char *, int64_t *), info, name, value);
}
static Status get_input(Object context, size_t index, void **tensor) {
  return CALL(90, (Object, size_t, void **), context, index, tensor);
}
static Status get_output(Object context, const int64_t *shape, size_t count,
                         void **tensor) {
  return CALL(91, (Object, size_t, const int64_t *, size_t, void **), context, 0, shape,
              count, tensor);
}
static Status run_parts(Object context, void (*part)(void *, size_t), size_t parts,
                        void *argument) {
  return CALL(274, (Object, void (*)(void *, size_t), size_t, size_t, void *), context,
              part, parts, 0, argument);
}

/* The input `x`, how many rows it has, and the output of this size. */
static Status get_rows(Object context, int64_t *shape, size_t *count, int64_t *rows,
                       void *data) {
  void *x;
  RETURN_IF(get_input(context, 0, &x));
  RETURN_IF(get_shape(x, shape, count));
  if (*count < 1 || *count > MAX_DIMENSIONS)
    return error(INVALID_ARGUMENT, "x has no axes, or too many");
  *rows = 1;
  for (size_t i = 0; i + 1 < *count; i++) *rows *= shape[i];
  return get_data(x, data);
}

static Status get_rows_of_output(Object context, int64_t *shape, size_t count,
                                 int64_t outputs, void *data) {
  void *y;
  shape[count - 1] = outputs;
  RETURN_IF(get_output(context, shape, count, &y));
  return get_data(y, data);
}

/* Heuristics: parts that the work is divided into, for threads of unequal speed, and
   rows from which on several threads convert the inputs. */
enum { PARTS = 64, ROWS_OF_ONE_THREAD = 16 };

typedef struct {
  const void *product;
  void (*work)(const void *product, int64_t first, int64_t end);
  int64_t count, parts;
} Work;

static void do_part(void *argument, size_t i) {
  const Work *work = argument;
  work->work(work->product, work->count * (int64_t)i / work->parts,
             work->count * ((int64_t)i + 1) / work->parts);
}

/* Does work for `count` rows or blocks on the threads of ONNX Runtime. */
static Status run(Object context, const void *product, int64_t count,
                  void (*work)(const void *, int64_t, int64_t)) {
  Work argument = {product, work, count, count < PARTS ? count : PARTS};
  return run_parts(context, do_part, argument.parts, &argument);
}

static Status run_rows(Object context, const void *product, int64_t rows,
                       void (*work)(const void *, int64_t, int64_t)) {
  if (rows >= ROWS_OF_ONE_THREAD) return run(context, product, rows, work);
  work(product, 0, rows);
  return NULL;
}

typedef struct {
  int64_t bits, outputs, groups_per_scale;
} Kernel;

static Status create_kernel(const void *operator, Object api_, Object info,
                            void **created) {
  (void)operator;
  (void)api_;
  Kernel kernel;
  RETURN_IF(get_integer(info, "bits", &kernel.bits));
  RETURN_IF(get_integer(info, "N", &kernel.outputs));
  RETURN_IF(get_integer(info, "groups_per_scale", &kernel.groups_per_scale));
  if (!(*created = malloc(sizeof kernel))) return error(FAILED, "No memory");
  *(Kernel *)*created = kernel;
  return NULL;
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

static Status compute_quantized(void *kernel_, void *context) {
  const Kernel *kernel = kernel_;
  void *words, *scales;
  int64_t shape[MAX_DIMENSIONS], words_shape[MAX_DIMENSIONS], scales_shape[MAX_DIMENSIONS];
  size_t count, words_count, scales_count;
  QuantizedProduct product = {
      .num_outputs = kernel->outputs,
      .bits = (int)kernel->bits,
      .groups_per_scale = kernel->groups_per_scale,
  };
  RETURN_IF(get_rows(context, shape, &count, &product.rows, &product.inputs));
  RETURN_IF(get_input(context, 1, &words));
  RETURN_IF(get_input(context, 2, &scales));
  RETURN_IF(get_shape(words, words_shape, &words_count));
  RETURN_IF(get_shape(scales, scales_shape, &scales_count));
  if (words_count != 3 || scales_count != 3)
    return error(INVALID_ARGUMENT, "words or scales have another number of axes");
  product.num_inputs = shape[count - 1];
  product.groups = words_shape[1];
  product.scales_per_output = scales_shape[1];
  if (product.num_inputs > product.groups * GROUP ||
      words_shape[0] != number_of_tiles(&product))
    return error(INVALID_ARGUMENT, "x and words have other sizes");
  if (words_shape[2] != 4 * lanes() * product.bits || scales_shape[2] != lanes() ||
      scales_shape[0] != words_shape[0] || product.groups_per_scale < 1 ||
      product.scales_per_output * product.groups_per_scale < product.groups)
    return error(INVALID_ARGUMENT, "words and scales have other sizes");
  RETURN_IF(get_data(words, &product.words));
  RETURN_IF(get_data(scales, &product.scales));
  RETURN_IF(get_rows_of_output(context, shape, count, product.num_outputs,
                               &product.outputs));
  return product.rows ? multiply_rounded(context, &product) : NULL;
}

static Status create_nothing(const void *operator, Object api_, Object info,
                             void **created) {
  (void)operator;
  (void)api_;
  (void)info;
  *created = malloc(1);
  return *created ? NULL : error(FAILED, "No memory");
}

static void convert_rows(const void *product, int64_t first, int64_t end) {
  convert_inputs(product, first, end);
}
static void multiply_dense(const void *product, int64_t first, int64_t end) {
  multiply_blocks(product, first, end);
}

static Status compute_dense(void *kernel, void *context) {
  (void)kernel;
  void *weights;
  int64_t shape[MAX_DIMENSIONS], weights_shape[MAX_DIMENSIONS];
  size_t count, weights_count;
  DenseProduct product;
  RETURN_IF(get_rows(context, shape, &count, &product.rows, &product.inputs));
  RETURN_IF(get_input(context, 1, &weights));
  RETURN_IF(get_shape(weights, weights_shape, &weights_count));
  if (weights_count != 2 || weights_shape[1] != shape[count - 1])
    return error(INVALID_ARGUMENT, "x and weights have other sizes");
  product.num_outputs = weights_shape[0];
  product.num_inputs = weights_shape[1];
  product.words = words_of_a_row(product.num_inputs);
  RETURN_IF(get_data(weights, &product.weights));
  RETURN_IF(get_rows_of_output(context, shape, count, product.num_outputs,
                               &product.outputs));
  if (!product.rows) return NULL;
  product.x = malloc(product.rows * product.words * sizeof *product.x);
  if (!product.x) return error(FAILED, "No memory for the inputs");
  Status status = run_rows(context, &product, product.rows, convert_rows);
  if (!status)
    status = run(context, &product, number_of_blocks(&product), multiply_dense);
  free(product.x);
  return status;
}

static const char *quantized_name(const void *operator) {
  (void)operator;
  return "QuantizedProduct";
}
static const char *dense_name(const void *operator) {
  (void)operator;
  return "DenseProduct";
}
static const char *get_provider(const void *operator) {
  (void)operator;
  return NULL; /* The CPU. */
}
static int quantized_input_type(const void *operator, size_t index) {
  (void)operator;
  static const int types[] = {FLOAT32, UINT8, FLOAT16};
  return types[index];
}
static int dense_input_type(const void *operator, size_t index) {
  (void)operator;
  return index == 1 ? BFLOAT16 : FLOAT32;
}
static size_t quantized_inputs(const void *operator) {
  (void)operator;
  return 3;
}
static size_t dense_inputs(const void *operator) {
  (void)operator;
  return 2;
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
static int get_memory_type(const void *operator, size_t index) {
  (void)operator;
  (void)index;
  return 0; /* That of the provider. */
}

/* In the order of ONNX Runtime. The first versions of creation and computation, which
   report no errors, and what belongs to variadic operators are null. */
typedef struct {
  uint32_t version;
  Object create;
  const char *(*name)(const void *);
  const char *(*provider)(const void *);
  int (*input_type)(const void *, size_t);
  size_t (*num_inputs)(const void *);
  int (*output_type)(const void *, size_t);
  size_t (*num_outputs)(const void *);
  Object compute;
  void (*destroy)(void *);
  int (*input_characteristic)(const void *, size_t);
  int (*output_characteristic)(const void *, size_t);
  int (*input_memory_type)(const void *, size_t);
  Object variadic[4];
  Status (*create_with_status)(const void *, Object, Object, void **);
  Status (*compute_with_status)(void *, void *);
} Operator;

#define OPERATOR(kind, create_kind)          \
  {                                          \
      .version = OPERATOR_VERSION,           \
      .name = kind##_name,                   \
      .provider = get_provider,              \
      .input_type = kind##_input_type,       \
      .num_inputs = kind##_inputs,           \
      .output_type = get_output_type,        \
      .num_outputs = count_outputs,          \
      .destroy = free,                       \
      .input_characteristic = is_required,   \
      .output_characteristic = is_required,  \
      .input_memory_type = get_memory_type,  \
      .create_with_status = create_kind,     \
      .compute_with_status = compute_##kind, \
  }

static const Operator operators[] = {
    OPERATOR(quantized, create_kernel),
    OPERATOR(dense, create_nothing),
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
