/* Products with quantized matrices: outputs = inputs times the transposed weights. */

#ifndef QUANTIZED_PRODUCT_H
#define QUANTIZED_PRODUCT_H

#include <stdint.h>

#define GROUP 32 /* Inputs that are rounded with one scale. */

typedef struct {
  int64_t rows, num_inputs, num_outputs;
  int bits;                 /* Of a weight: 4 or 8. */
  int64_t groups;           /* Groups of inputs. */
  int64_t groups_per_scale; /* Groups of inputs that a scale of the weights has. */
  int64_t scales_per_output;
  const uint32_t *words; /* (tiles, groups, bits, LANES): 32 bits of weights each. */
  const uint16_t *scales; /* float16 (tiles, scales of an output, LANES) */
  const float *inputs;   /* (rows, num_inputs) */
  float *outputs;        /* (rows, num_outputs) */
  /* The inputs in 8 bits, (rows, groups, GROUP), and for each group its scale and what
     is added to its sums because zero is stored as 8 or 128. */
  int8_t *rounded;
  float *input_scales;
  int32_t *corrections;
} QuantizedProduct;

/* Outputs of a tile. */
int lanes(void);

int64_t number_of_tiles(const QuantizedProduct *product);

/* Rounds the inputs of some rows to 8 bits. */
void round_inputs(const QuantizedProduct *product, int64_t first_row, int64_t end_row);

/* Computes the outputs of some tiles, for all rows. */
void multiply_tiles(const QuantizedProduct *product, int64_t first_tile, int64_t end_tile);

#endif
