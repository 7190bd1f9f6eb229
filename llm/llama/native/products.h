/* Products of rows with a matrix of weights. Called by all threads of a team, which share the work, and wait for each
   other at its end. */

#pragma once

#include "vectors.h"

/* A matrix of `outputs` x `inputs`, in panels of 16 outputs, an even number of them. Narrow weights lie in words of
   32 bits, one word an output with inputs that follow one another from its low end up: they are unpacked by shifts
   alone.
   F32    [panel][input][16]
   BF16   [panel][input / 2][16]
   INT8   [panel][input / 4][16], scales [panel][group][16]; weight = scale * q
   INT4   [panel][input / 8][16], scales [panel][group][2][16]; weight = scale * q + minimum
   Scales are float16. */
typedef struct {
    const uint32_t *weights;
    const uint16_t *scales;
    const float *bias; /* or NULL */
    int64_t outputs, inputs;
    int64_t kind;
} Linear;

/* What becomes of a product. */
enum then { SET, ADD, GATE }; /* y = p; y += p; y = silu(gate) * up */

/* y = x w', in float32: every row's sums are added up in the same order, whatever rows there are. */
void multiply(const Linear *w, enum then then, int64_t rows, const float *x, float *y, int64_t y_stride);

/* The same for the many rows of a prompt, filled up to a multiple of TOKENS. x is of `kind_of_inputs`, and so is what
   GATE makes, which is the next product's x; else y is float32. A thread unpacks into its own `room`: LANES * inputs. */
void multiply_prompt(const Linear *w, enum then then, int kind, int64_t rows, const void *x, void *y, int64_t y_stride,
                     uint32_t *room);

/* bfloat16 where keys and values are, if this machine has instructions for its products; else float32. */
INLINE int kind_of_inputs(int kv_kind) {
#ifdef __AVX512BF16__
    return kv_kind;
#else
    (void)kv_kind;
    return F32;
#endif
}
