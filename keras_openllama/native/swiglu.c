#include "swiglu.h"

#include "vectors.h"

void swiglu(const float *gate_up, int64_t count, float *outputs) {
  for (int64_t i = 0; i < count; i += LANES) {
    Floats gate = load_some(gate_up + i, count - i);
    Floats up = load_some(gate_up + count + i, count - i);
    /* Not a number stays so. */
    Floats power = at_most(fill_float(126), multiply(gate, fill_float(-1.44269504f)));
    Floats decay = power_of_two(power);
    Floats silu = divide(gate, add(fill_float(1), decay));
    store(outputs + i, multiply(silu, up), count - i);
  }
}
