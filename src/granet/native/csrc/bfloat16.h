// Kernels of training in bfloat16. Activations lie in planes as they do in float32 (planes.h), with images innermost,
// but a position takes two bytes. Weights are rounded to bfloat16 as well; sums are taken in float32.
//
// Only plain C here, for the reason given in kernels.h.
#pragma once
#include <cstdint>

#include "kernels.h"

namespace granet {

// A sparse matrix in compressed rows, as Rows: offsets count bfloat16 numbers.
struct Bfloat16Rows {
  const int32_t* ptr;
  const int32_t* id;
  const int32_t* offset;
  const uint16_t* value;
};

// The sums of rows whose columns are cut into blocks: where they are kept between one block and the next, in an order
// of positions that only the kernels know.
struct Bfloat16Sums {
  const float* bias;  // per output plane, or null
  float* kept;        // of output plane id: the row id / step
  int64_t stride;     // floats from one row to the next
  int32_t step;
  bool first;  // start from the bias instead of what is kept
  bool last;   // round to the output instead of keeping
};

struct Bfloat16Kernels {
  const char* name;
  int32_t width;         // bfloat16 numbers in a vector
  int32_t max_vectors;   // longest tile of spmm, in vectors
  int32_t max_gradient;  // longest tile of sddmm, in vectors
  // out[id[r]][p] = bias + sum_k value[k] * x[p + offset[k]] for rows r0..r1 and `vectors` vectors of positions.
  void (*spmm)(const Bfloat16Rows& rows, int32_t r0, int32_t r1, const uint16_t* x, uint16_t* out, int64_t out_stride,
               int32_t vectors, const Bfloat16Sums& sums);
  // grad[k] += sum_p dy[id[r]][p] * x[p + offset[k]] for the non-zeros of rows r0..r1.
  void (*sddmm)(const Bfloat16Rows& rows, int32_t r0, int32_t r1, const uint16_t* x, const uint16_t* dy,
                int64_t dy_stride, int32_t vectors, float* grad);
  // to[c * to_stride + r] = from[r * from_stride + c] for a rows x columns block.
  void (*transpose)(const uint16_t* from, int64_t from_stride, uint16_t* to, int64_t to_stride, int64_t rows,
                    int64_t columns);
  void (*round)(const float* from, int64_t n, uint16_t* to);
};

const Bfloat16Kernels& bfloat16_generic();
const Bfloat16Kernels& bfloat16_avx2();
const Bfloat16Kernels& bfloat16_avx512();
const Bfloat16Kernels& bfloat16_avx512bf16();

// The table for this processor, or the one that GRANET_ISA names.
const Bfloat16Kernels& bfloat16();

}  // namespace granet
