/* Rotary position embedding in the half-split layout, in float32. */

#ifndef ROTATION_H
#define ROTATION_H

#include "heads.h"

typedef struct {
  int64_t sequences, heads, length, head_dim, threads;
  /* (sequences, length, head_dim / 2), or one for all sequences if `table_sequence`, the
     number of elements from one to the next, is 0. */
  const float *cosines, *sines;
  int64_t table_sequence;
  float direction; /* 1, or -1 to rotate back. */
  Heads from, to;
} Rotation;

void rotate_heads(const Rotation *rotation);

#endif
