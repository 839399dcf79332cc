/* Products with matrices in bfloat16: outputs = inputs times the transposed weights. */

#ifndef DENSE_PRODUCT_H
#define DENSE_PRODUCT_H

#include <stdint.h>

enum { MAX_MATRICES = 3 };

typedef struct {
  const uint16_t *weights; /* bfloat16 (outputs, inputs) */
  int64_t outputs;
} DenseMatrix;

typedef struct {
  int64_t rows, num_inputs, num_outputs;
  DenseMatrix matrices[MAX_MATRICES]; /* Their outputs follow each other. */
  const float *inputs;     /* (rows, num_inputs) */
  float *outputs;          /* (rows, num_outputs) */
  /* The inputs as the instructions read them: two of bfloat16 in 32 bits, or one of
     float32; (rows, words), filled up by zeros. */
  uint32_t *x;
  int64_t words;
} DenseProduct;

/* Number of words that a row of inputs takes, and of parts that outputs divide into. */
int64_t words_of_a_row(int64_t num_inputs);
int64_t number_of_blocks(const DenseProduct *product);

void convert_inputs(const DenseProduct *product, int64_t first_row, int64_t end_row);

/* Computes the outputs of some blocks, for all rows. */
void multiply_blocks(const DenseProduct *product, int64_t first_block, int64_t end_block);

#endif
