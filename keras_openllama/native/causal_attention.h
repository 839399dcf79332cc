/* Causal attention of training and its gradients, in float32. */

#ifndef CAUSAL_ATTENTION_H
#define CAUSAL_ATTENTION_H

#include "heads.h"

/* Each key/value head serves a group of query heads. */
typedef struct {
  int64_t sequences, heads, group, length, head_dim, threads;
  /* (sequences, length, length), not 0 where a query may attend to a key, 0 for later
     keys; or one for all sequences, if `mask_sequence` is 0. */
  const uint8_t *mask;
  int64_t mask_sequence;
  Heads query, key, value, output;
  /* (sequences, heads * group, length): logarithms to base 2 of the sums of the scores'
     exponentials. The forward pass writes them, the backward pass reads them. */
  float *log_sums;
  Heads output_gradient, query_gradient, key_gradient, value_gradient;
} CausalAttention;

/* Both return 0, or 1 if there is not enough memory. A query that may attend to no key
   has the output 0, and no gradient passes through it. Results do not depend on the
   number of threads. */
int causal_attention_forward(const CausalAttention *attention);
int causal_attention_backward(const CausalAttention *attention);

#endif
