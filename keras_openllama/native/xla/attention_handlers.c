/* Causal attention as functions that XLA calls on a CPU. Tensors are row-major. Queries,
   keys and their gradients are (sequences, heads, length, head_dim), as XLA writes what
   it rotates. Values, outputs and their gradients are (sequences, length, heads,
   head_dim), as projections write and read them. XLA checks nothing: the shapes are
   those that `layers/compiled_attention_jax.py` gives. */

#include <stddef.h>

#include "../causal_attention.h"
#include "xla/ffi/api/c_api.h"

/* XLA asks a handler when it is registered for which version it was compiled. */
static int answers_metadata(XLA_FFI_CallFrame *frame) {
  XLA_FFI_Extension_Base *first = frame->extension_start;
  if (first == NULL || first->type != XLA_FFI_Extension_Metadata) return 0;
  XLA_FFI_Metadata *metadata = ((XLA_FFI_Metadata_Extension *)first)->metadata;
  metadata->api_version.major_version = XLA_FFI_API_MAJOR;
  metadata->api_version.minor_version = XLA_FFI_API_MINOR;
  metadata->traits = 0;
  return 1;
}

static XLA_FFI_Buffer *argument(XLA_FFI_CallFrame *frame, int number) {
  return frame->args.args[number];
}

static Heads heads_first(const XLA_FFI_Buffer *buffer) {
  int64_t *dims = buffer->dims, head = dims[2] * dims[3];
  return (Heads){buffer->data, dims[1] * head, head, dims[3]};
}

static Heads heads_last(const XLA_FFI_Buffer *buffer) {
  int64_t *dims = buffer->dims, position = dims[2] * dims[3];
  return (Heads){buffer->data, dims[1] * position, dims[3], position};
}

static XLA_FFI_Buffer *result(XLA_FFI_CallFrame *frame, int number) {
  return frame->rets.rets[number];
}

static int64_t number_of_threads(XLA_FFI_CallFrame *frame) {
  int64_t threads = 1;
  XLA_FFI_ThreadPool_NumThreads_Args arguments = {
      .struct_size = XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE,
      .ctx = frame->ctx,
      .num_threads = &threads,
  };
  XLA_FFI_Error *error = frame->api->XLA_FFI_ThreadPool_NumThreads(&arguments);
  if (error) {
    XLA_FFI_Error_Destroy_Args destroyed = {
        .struct_size = XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, .error = error};
    frame->api->XLA_FFI_Error_Destroy(&destroyed);
  }
  return threads;
}

/* The attention of the first four arguments: query, key, value and mask. */
static CausalAttention attention_of(XLA_FFI_CallFrame *frame) {
  int64_t *query = argument(frame, 0)->dims, *key = argument(frame, 1)->dims;
  XLA_FFI_Buffer *mask = argument(frame, 3);
  return (CausalAttention){
      .sequences = query[0],
      .heads = key[1],
      .group = query[1] / key[1],
      .length = query[2],
      .head_dim = query[3],
      .threads = number_of_threads(frame),
      .mask = mask->data,
      .mask_sequence = mask->dims[0] == 1 ? 0 : query[2] * query[2],
      .query = heads_first(argument(frame, 0)),
      .key = heads_first(argument(frame, 1)),
      .value = heads_last(argument(frame, 2)),
  };
}

static XLA_FFI_Error *error_unless(XLA_FFI_CallFrame *frame, int has_failed) {
  if (!has_failed) return NULL;
  XLA_FFI_Error_Create_Args arguments = {
      .struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE,
      .message = "There is not enough memory for causal attention.",
      .errc = XLA_FFI_Error_Code_RESOURCE_EXHAUSTED,
  };
  return frame->api->XLA_FFI_Error_Create(&arguments);
}

/* (query, key, value, mask) to (output, log_sums). */
XLA_FFI_Error *xla_causal_attention_forward(XLA_FFI_CallFrame *frame) {
  if (answers_metadata(frame)) return NULL;
  CausalAttention a = attention_of(frame);
  a.output = heads_last(result(frame, 0));
  a.log_sums = result(frame, 1)->data;
  return error_unless(frame, causal_attention_forward(&a));
}

/* (query, key, value, mask, output, log_sums, output_gradient) to the gradients of
   query, key and value. */
XLA_FFI_Error *xla_causal_attention_backward(XLA_FFI_CallFrame *frame) {
  if (answers_metadata(frame)) return NULL;
  CausalAttention a = attention_of(frame);
  a.output = heads_last(argument(frame, 4));
  a.log_sums = argument(frame, 5)->data;
  a.output_gradient = heads_last(argument(frame, 6));
  a.query_gradient = heads_first(result(frame, 0));
  a.key_gradient = heads_first(result(frame, 1));
  a.value_gradient = heads_last(result(frame, 2));
  return error_unless(frame, causal_attention_backward(&a));
}
