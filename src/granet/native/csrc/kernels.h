// The table of kernels that every instruction set provides, and the structures they take. This header is plain C: it is
// compiled once per instruction set, and the linker could otherwise pick an inline function of the standard library
// that was compiled for AVX-512 and use it on every machine.
#pragma once
#include <cstdint>

namespace granet {

enum Activation : int32_t { kIdentity = 0, kRelu = 1, kRelu6 = 2, kSilu = 3, kActivations };

// A sparse matrix in compressed rows. `id[r]` is the output plane of the r-th stored row: rows are sorted by length, so
// that the processor predicts the end of the inner loop.
struct Rows {
  const int32_t* ptr;
  const int32_t* id;
  const int32_t* offset;  // floats from the tile's first input position to this non-zero's
  const float* value;
};

// What is done with an output row after its sum is complete.
struct Epilogue {
  const float* bias;      // per output plane, or null
  const float* residual;  // same geometry as the output, from the tile's first position on, or null
  int64_t residual_stride;
  const int32_t* keep;  // per position: -1 keeps, 0 writes a zero (the padding columns), or null
  int32_t activation;
  bool accumulate;  // add to what the output holds, instead of starting from the bias
  bool last;        // apply residual, activation and keep
};

// A matrix as its values at ascending flat positions; see stored.inc.
struct Stored {
  const int32_t* position;
  const float* value;
  const int32_t* ptr;
  int64_t columns;
  int64_t step;
};

struct Kernels {
  const char* name;
  int32_t width;              // floats in a vector
  int32_t max_vectors;        // longest tile of spmm and sddmm, in vectors
  int32_t max_block_vectors;  // longest tile of spmm_block, in vectors
  // out[id[r]][p] = epilogue(sum_k value[k] * x[p + offset[k]]) for rows r0..r1 and `vectors` vectors of positions.
  void (*spmm)(const Rows& rows, int32_t r0, int32_t r1, const float* x, float* out, int64_t out_stride,
               int32_t vectors, const Epilogue& epilogue);
  // The same with four output planes per stored row that share their offsets; value holds four numbers per offset.
  void (*spmm_block)(const Rows& rows, int32_t r0, int32_t r1, const float* x, float* out, int64_t out_stride,
                     int32_t vectors, const Epilogue& epilogue);
  // grad[k] += sum_p dy[id[r]][p] * x[p + offset[k]] for the non-zeros of rows r0..r1.
  void (*sddmm)(const Rows& rows, int32_t r0, int32_t r1, const float* x, const float* dy, int64_t dy_stride,
                int32_t vectors, float* grad);
  // out[id[r]] = epilogue(sum_k value[k] * x[offset[k]]): a vector instead of a tile of positions.
  void (*spmv)(const Rows& rows, int32_t r0, int32_t r1, const float* x, float* out, const Epilogue& epilogue);
  // out = activation(a + b) over n floats; b may be null.
  void (*add)(const float* a, const float* b, float* out, int64_t n, int32_t activation);
  // out[i] = max(out[i], a[i]).
  void (*maximum)(const float* a, float* out, int64_t n);
  // to[x] = from[2 * x] for x < count. It reads and writes whole vectors, so both need `width` spare floats at the end.
  void (*take_even)(const float* from, float* to, int64_t count);
  // to[c * to_stride + r] = from[r * from_stride + c] for a rows x columns block.
  void (*transpose)(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows,
                    int64_t columns);
  // The product of a stored matrix, and its two gradients: see stored.inc.
  void (*stored_spmm)(const Stored& m, int64_t r0, int64_t r1, const float* x, const float* start, float* y,
                      int32_t vectors);
  void (*stored_scatter)(const Stored& m, int64_t r0, int64_t r1, const float* dy, float* dx, int32_t vectors);
  void (*stored_sddmm)(const Stored& m, int64_t r0, int64_t r1, const float* dy, const float* x, float* grad,
                       int32_t vectors);
};
constexpr int32_t kStoredVectors = 8;  // longest tile of the stored kernels

const Kernels& kernels_generic();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();

}  // namespace granet
