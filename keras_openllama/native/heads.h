/* Tensors of attention heads in memory. */

#ifndef HEADS_H
#define HEADS_H

#include <stdint.h>

/* A tensor (sequences, heads, positions, head_dim): the numbers of elements from one
   sequence, head and position to the next. The elements of a head are contiguous. */
typedef struct {
  float *data;
  int64_t sequence, head, position;
} Heads;

static inline float *row_of(Heads x, int64_t sequence, int64_t head, int64_t position) {
  return x.data + sequence * x.sequence + head * x.head + position * x.position;
}

#endif
