// Kernels at reduced precision. Activations lie in planes as they do in float32 (planes.h), but a position of a plane
// is a 32-bit word that holds several consecutive channels: two in bfloat16, four unsigned bytes in int8. One weight
// word meets one activation word in one instruction, so a word of weights is stored where any of its weights is active.
//
// Only plain C here, for the reason given in kernels.h.
#pragma once
#include <cstdint>

#include "kernels.h"

namespace granet {

enum Precision : int64_t { kFloat32 = 0, kBfloat16, kInt8, kPrecisions };

constexpr int32_t channels_per_word(int64_t precision) {
  return precision == kInt8 ? 4 : precision == kBfloat16 ? 2 : 1;
}

// A sparse matrix of words in compressed rows. Stored rows come in groups of as many output channels as an output word
// holds; `id[g]` is the output plane of the g-th group, whose rows are `channels * g + i`.
struct WordRows {
  const int32_t* ptr;
  const int32_t* id;
  const int32_t* offset;  // words from the tile's first input position to this weight word's
  const int32_t* value;   // four signed bytes, or two bfloat16 numbers
};

// What happens to a sum before it is stored. Per output channel: y = sum * scale + shift, then + residual_scale times
// the residual, then the activation. An output in bytes is y rounded to the nearest integer and limited to 0..255; a
// `requantise` of y (y * out_scale + out_zero) comes before that where an activation has to see real numbers.
struct WordEpilogue {
  const float* scale;  // per output channel, padded to whole groups; int8 only
  const float* shift;  // per output channel, padded to whole groups
  const int32_t* residual;
  int64_t residual_stride;
  float residual_scale;
  float out_scale, out_zero;
  const int32_t* keep;  // per position: -1 keeps the word, 0 writes `fill` (the padding columns), or null
  int32_t fill;
  int32_t activation;
  bool requantise;
  bool to_float;     // store float32 planes, one per channel, instead of words
  int64_t channels;  // of the output; rows beyond it are padding
};

struct ReducedKernels {
  const char* name;
  int32_t width;        // words in a vector
  int32_t max_vectors;  // longest tile, in vectors
  // out[word of id[g]][p] = epilogue(sum_k <value[k], x[p + offset[k]]>) for groups g0..g1 and `vectors` vectors.
  void (*spmm_int8)(const WordRows& rows, int32_t g0, int32_t g1, const int32_t* x, void* out, int64_t out_stride,
                    int32_t vectors, const WordEpilogue& epilogue);
  void (*spmm_bfloat16)(const WordRows& rows, int32_t g0, int32_t g1, const int32_t* x, void* out, int64_t out_stride,
                        int32_t vectors, const WordEpilogue& epilogue);
  // words = round(x * scale + zero) in 0..255 of up to four planes of floats (null: none, which stores zero). False if
  // a number is not finite. `n` is a multiple of `width`.
  bool (*to_int8)(const float* const* from, int64_t n, float scale, float zero, int32_t* to);
  void (*to_bfloat16)(const float* const* from, int64_t n, int32_t* to);
  // The reverse, into planes that are not null: (byte - zero) * scale.
  void (*from_int8)(const int32_t* from, int64_t n, float scale, float zero, float* const* to);
  void (*from_bfloat16)(const int32_t* from, int64_t n, float* const* to);
  // out = the larger of each channel's two numbers, over n words.
  void (*maximum_int8)(const int32_t* a, int32_t* out, int64_t n);
  void (*maximum_bfloat16)(const int32_t* a, int32_t* out, int64_t n);
  // out = quantised(activation(a * a_scale + b * b_scale + shift)), b may be null; n is a multiple of `width`.
  void (*add_int8)(const int32_t* a, const int32_t* b, int32_t* out, int64_t n, float a_scale, float b_scale,
                   float shift, int32_t activation, float out_scale, float out_zero);
  void (*add_bfloat16)(const int32_t* a, const int32_t* b, int32_t* out, int64_t n, int32_t activation);
};

const ReducedKernels& reduced_generic();
const ReducedKernels& reduced_avx2();
const ReducedKernels& reduced_avxvnni();
const ReducedKernels& reduced_avx512();
const ReducedKernels& reduced_avx512vnni();
const ReducedKernels& reduced_avx512bf16();

// The table for this processor, or the one that GRANET_ISA names.
const ReducedKernels& reduced();

}  // namespace granet
