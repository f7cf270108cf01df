// What the operators of one layer have in common: their geometry, their index structures, and checks of tensors.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "planes.h"

namespace granet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The integers of granet.engine.geometry.Geometry.as_list(), in order.
struct Geometry {
  int64_t n, c, h, w, o, ho, wo, sy, sx, pitch, batch, front, stride, tile, chunks, forward_blocks, backward_blocks;
  std::vector<Phase> phases;

  explicit Geometry(const std::vector<int64_t>& g) {
    STD_TORCH_CHECK(g.size() >= 19 && (g.size() - 17) % 2 == 0, "granet: malformed geometry");
    n = g[0], c = g[1], h = g[2], w = g[3], o = g[4], ho = g[5], wo = g[6], sy = g[7], sx = g[8], pitch = g[9];
    batch = g[10], front = g[11], stride = g[12], tile = g[13], chunks = g[14];
    forward_blocks = g[15], backward_blocks = g[16];
    for (size_t i = 17; i < g.size(); i += 2) phases.push_back({g[i], g[i + 1]});
    STD_TORCH_CHECK(n >= 0 && c > 0 && h > 0 && w > 0 && o > 0 && ho > 0 && wo > 0 && sy > 0 && sx > 0 && batch > 0 &&
                        chunks > 0 && o % chunks == 0 && planes() % chunks == 0 && tile > 0 && front % 16 == 0,
                    "granet: malformed geometry");
    const int64_t longest = std::max(input().positions(), output().positions());
    STD_TORCH_CHECK(pointwise() ? panel() > 0 : stride >= 2 * front + longest, "granet: malformed geometry");
  }
  // A position of the output reads that position of the input alone, so that positions may be taken in any portions.
  bool pointwise() const {
    return batch == 1 && front == 0 && phases.size() == 1 && sy == 1 && sx == 1 && ho == h && wo == w && pitch == w &&
           h * w % kernels().width == 0;
  }
  // Positions of a pointwise layer that are packed at a time: as many as fit between two planes.
  int64_t panel() const { return std::min(h * w, stride / kernels().width * kernels().width); }
  int64_t panels() const { return (h * w + panel() - 1) / panel(); }
  int64_t planes() const { return c * static_cast<int64_t>(phases.size()); }
  int64_t blocks() const { return (n + batch - 1) / batch; }
  Planes input() const { return {(h + sy - 1) / sy, (w + sx - 1) / sx, pitch, batch, front, stride}; }
  Planes output() const { return {ho, wo, pitch, batch, front, stride}; }
  Image image(int64_t block) const { return {c, h, w, std::min(batch, n - block * batch), c * h * w}; }
  Image result(int64_t block) const { return {o, ho, wo, std::min(batch, n - block * batch), o * ho * wo}; }
  int32_t longest_tile() const {
    return static_cast<int32_t>(std::clamp<int64_t>(tile / kernels().width, 1, kernels().max_vectors));
  }
};

inline void check_float(const Tensor& t, int64_t numel, const char* what) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float && t.is_contiguous(), "granet: ", what,
                  " must be a contiguous float32 tensor on the CPU");
  STD_TORCH_CHECK(t.numel() == numel, "granet: ", what, " has ", t.numel(), " elements, expected ", numel);
}

inline const int32_t* ints(const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Int && t.is_contiguous(),
                  "granet: an index must be a contiguous int32 tensor on the CPU");
  return t.const_data_ptr<int32_t>();
}

// The index structure of a sparse matrix as the operators take it: see granet.engine.index.
struct IndexStructure {
  const int32_t *ptr, *id, *offset, *index;
  int64_t rows, nonzeros;

  IndexStructure(const Tensor& p, const Tensor& i, const Tensor& off, const Tensor& ind, int64_t expected)
      : ptr(ints(p)), id(ints(i)), offset(ints(off)), index(ints(ind)), rows(expected), nonzeros(off.numel()) {
    STD_TORCH_CHECK(p.numel() == rows + 1 && i.numel() == rows && ind.numel() == nonzeros && ptr[rows] == nonzeros,
                    "granet: the index structure does not fit the geometry");
  }
};

// The only phase of an output.
inline constexpr Phase kWhole[1] = {{0, 0}};

}  // namespace granet
