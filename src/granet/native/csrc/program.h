// The data that the steps of a compiled program share: slots of planes, and constants. Programs are written by
// granet.engine.program, in the encoding below.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <vector>

#include "planes.h"
#include "reduced.h"

namespace granet {

using torch::stable::Tensor;

constexpr int64_t kRow = 24;  // integers per slot and per step; a step's last one counts the steps computed with it

enum Op : int64_t { kPack = 0, kUnpack, kConv, kSplit, kMaxPool, kAvgPool, kAdd, kConvert, kOps };
enum Kind : int64_t { kSparse = 0, kBlock, kVector, kWords, kKinds };

// The rows of a program. granet.engine.encoding has the same names and fields in the same order. `encoding()` returns
// how many there are, so that a library of another version is noticed when it is loaded. Slots and constants are
// referred to by number; -1 stands for none.
struct SlotRow {
  int64_t place, planes, blocks, images, height, width, pitch, batch, front, stride, precision, fill;
};
struct PackStep {
  int64_t op, input, out, channels, height, width, phases, stride_y, stride_x;
};
struct UnpackStep {
  int64_t op, source, channels, height, width, dimensions;
};
struct ConvStep {
  int64_t op, source, out, residual, ptr, id, offset, value, bias, keep, chunks, blocks, activation, kind, tile, scale,
      factors;
};
struct SplitStep {
  int64_t op, source, out, phases, stride_y, stride_x;
};
struct MaxPoolStep {
  int64_t op, source, out, kernel_y, kernel_x, stride_y, stride_x, padding_y, padding_x;
};
struct AvgPoolStep {
  int64_t op, source, out, factors;
};
struct AddStep {
  int64_t op, source, out, other, activation, factors;
};
struct ConvertStep {
  int64_t op, source, out, factors;
};

template <typename Row>
Row read(const int64_t* numbers) {
  static_assert(sizeof(Row) <= sizeof(int64_t) * (kRow - 1) && sizeof(Row) % sizeof(int64_t) == 0);
  Row row;
  std::memcpy(&row, numbers, sizeof(Row));
  return row;
}

// A set of planes in the arena: `blocks` times `planes` planes.
struct Slot {
  float* data;  // or words of the same size, see reduced.h
  int64_t planes, blocks, images;
  Planes layout;
  int64_t precision;
  int fill;  // the byte that stands for zero

  float* block(int64_t b) const { return data + b * planes * layout.stride; }
  // The zeros around plane p's positions, which the consumers' taps rely on.
  void clear_front(int64_t b, int64_t p) const {
    std::memset(block(b) + p * layout.stride, fill, sizeof(float) * layout.front);
  }
  void clear_back(int64_t b, int64_t p, int64_t written) const {
    std::memset(block(b) + p * layout.stride + layout.front + written, fill,
                sizeof(float) * (layout.stride - layout.front - written));
  }
};

struct Machine {
  const std::vector<Tensor>& constants;
  std::vector<Slot> slots;

  const Slot& slot(int64_t i) const {
    STD_TORCH_CHECK(i >= 0 && i < static_cast<int64_t>(slots.size()), "granet: no slot ", i);
    return slots[i];
  }
  const Tensor& constant(int64_t i) const {
    STD_TORCH_CHECK(i >= 0 && i < static_cast<int64_t>(constants.size()), "granet: no constant ", i);
    return constants[i];
  }
  const float* floats(int64_t i) const { return i < 0 ? nullptr : constant(i).const_data_ptr<float>(); }
  const int32_t* ints(int64_t i) const { return i < 0 ? nullptr : constant(i).const_data_ptr<int32_t>(); }
};

inline int32_t* words(float* p) { return reinterpret_cast<int32_t*>(p); }
inline const int32_t* words(const float* p) { return reinterpret_cast<const int32_t*>(p); }

inline std::vector<Phase> phases_of(const Machine& m, int64_t index) {
  const Tensor& t = m.constant(index);
  const int32_t* p = t.const_data_ptr<int32_t>();
  std::vector<Phase> result;
  for (int64_t i = 0; i + 1 < t.numel(); i += 2) result.push_back({p[i], p[i + 1]});
  return result;
}

// Runs `count` convolutions, tile by tile: a tile goes through all of them while it is in the cache. An output position
// of each but the first depends only on the same position of the one before it.
void run_convolutions(const Machine& m, const int64_t* s, int64_t count);

// At reduced precision: see reduced.cpp.
void run_convert(const Machine& m, const ConvertStep& s);
void run_reduced_avg_pool(const Machine& m, const AvgPoolStep& s);
void run_reduced_add(const Machine& m, const AddStep& s);

}  // namespace granet
