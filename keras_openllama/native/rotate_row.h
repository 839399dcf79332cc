/* The rotation of one head at one position. */

#ifndef ROTATE_ROW_H
#define ROTATE_ROW_H

#include <stdint.h>

/* `direction` is 1, or -1 to rotate back. */
static inline void rotate_row(float *restrict to, const float *restrict from,
                              const float *restrict cosines, const float *restrict sines,
                              int64_t half, float direction) {
  for (int64_t i = 0; i < half; i++) {
    float sine = direction * sines[i];
    to[i] = from[i] * cosines[i] - from[half + i] * sine;
    to[half + i] = from[half + i] * cosines[i] + from[i] * sine;
  }
}

#endif
