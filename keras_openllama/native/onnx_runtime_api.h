/* The functions and structures of ONNX Runtime that operators need.

   ONNX Runtime's Python package has no header files. The functions that are used here,
   by their place in its table, have been there since version 1.17, and a table only
   grows at its end.
   Source: https://onnxruntime.ai/docs/reference/operators/add-custom-op.html */

#ifndef ONNX_RUNTIME_API_H
#define ONNX_RUNTIME_API_H

#include <stddef.h>
#include <stdint.h>

typedef void *Status; /* Null for success. */
typedef const void *Object;

typedef struct {
  const void *const *(*get_api)(uint32_t version);
  const char *(*get_version)(void);
} ApiBase;

enum {
  API_VERSION = 17,
  OPERATOR_VERSION = 16, /* Of the structure `Operator`. */
  FAILED = 1,
  INVALID_ARGUMENT = 2,
  ANY_TYPE = 0,
  FLOAT32 = 1,
  UINT8 = 2,
  INT8 = 3,
  INT32 = 6,
  FLOAT16 = 10,
  BFLOAT16 = 16,
  MAX_DIMENSIONS = 8
};

static const void *const *api; /* Set when a library is registered. */

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
typedef struct {
  void *data;
  int type;
  int64_t shape[MAX_DIMENSIONS];
  size_t dimensions;
} Tensor;

/* An input with as many dimensions as it should have; 0: any number. */
static Status get_input(Object context, size_t index, size_t dimensions, Tensor *tensor) {
  void *value, *info;
  RETURN_IF(CALL(90, (Object, size_t, void **), context, index, &value));
  RETURN_IF(CALL(51, (Object, void *), value, &tensor->data));
  RETURN_IF(CALL(65, (Object, void **), value, &info));
  Status status = CALL(60, (Object, int *), info, &tensor->type);
  if (!status) status = CALL(61, (Object, size_t *), info, &tensor->dimensions);
  if (!status && tensor->dimensions <= MAX_DIMENSIONS)
    status = CALL(62, (Object, int64_t *, size_t), info, tensor->shape, tensor->dimensions);
  ((void (*)(void *))api[99])(info);
  int wrong = dimensions ? tensor->dimensions != dimensions
                         : tensor->dimensions < 1 || tensor->dimensions > MAX_DIMENSIONS;
  if (!status && wrong)
    return error(INVALID_ARGUMENT, "an input has another number of dimensions");
  return status;
}

/* The only output, of the shape of `like` but for the last dimension. */
static Status get_output(Object context, const Tensor *like, int64_t last, float **data) {
  int64_t shape[MAX_DIMENSIONS];
  void *value;
  for (size_t i = 0; i < like->dimensions; i++) shape[i] = like->shape[i];
  shape[like->dimensions - 1] = last;
  RETURN_IF(CALL(91, (Object, size_t, const int64_t *, size_t, void **), context, 0, shape,
                 like->dimensions, &value));
  return CALL(51, (Object, void *), value, (void *)data);
}
static Status get_integer(Object info, const char *name, int64_t *value) {
  return CALL(86, (Object, const char *, int64_t *), info, name, value);
}
static Status count_inputs(Object context, size_t *count) {
  return CALL(88, (Object, size_t *), context, count);
}
static Status run_parts(Object context, void (*part)(void *, size_t), size_t parts,
                        void *argument) {
  return CALL(274, (Object, void (*)(void *, size_t), size_t, size_t, void *), context,
              part, parts, 0, argument);
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

#endif
