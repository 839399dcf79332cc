/* The activation of the feed-forward network. */

#ifndef SWIGLU_H
#define SWIGLU_H

#include <stdint.h>

/* Computes silu(gate) * up of one row, where `gate_up` are `count` values of each.
   Source: arXiv:2002.05202, section 2. */
void swiglu(const float *gate_up, int64_t count, float *outputs);

#endif
