// The operators of a linear layer whose weight is stored as values at ascending flat positions: nothing else is kept
// of it, neither pointers to its rows nor its transpose. The batch is cut into tiles of a few vectors; a tile of the
// input, transposed, stays in the cache while all rows of the weight pass by.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "layers.h"

namespace granet {

namespace {

constexpr int64_t kCache = 1 << 17;  // floats of a tile of the input: half of the second-level cache of most processors
constexpr int64_t kRows = 64;        // rows whose outputs, or their gradients, are in a tile of their own
enum Slot { kInput, kOutput, kGradient };

// The stored matrix, and where its rows begin. Each row is cut into `parts` ranges of columns.
struct Matrix {
  const int32_t* position;
  const float* value;
  int64_t rows, columns, parts, count;
  std::vector<int32_t> ptr;

  Matrix(const Tensor& values, const Tensor& positions, int64_t outputs, int64_t inputs, int64_t ranges)
      : position(ints(positions)), rows(outputs), columns(inputs), parts(ranges), count(positions.numel()) {
    STD_TORCH_CHECK(values.numel() >= count, "granet: there are ", values.numel(), " values at ", count, " positions");
    check_float(values, values.numel(), "the values");
    STD_TORCH_CHECK(
        outputs > 0 && inputs > 0 && (count == 0 || (position[0] >= 0 && position[count - 1] < outputs * inputs)),
        "granet: the positions do not fit the weight's shape");
    value = values.const_data_ptr<float>();
    ptr.resize(static_cast<size_t>(rows * parts + 1));
    torch::stable::parallel_for(0, rows, std::max<int64_t>(1, 65536 * rows / std::max<int64_t>(count, 1)),
                                [&](int64_t begin, int64_t end) {
                                  int64_t k = std::lower_bound(position, position + count, begin * columns) - position;
                                  for (int64_t i = begin * parts; i < end * parts; ++i) {
                                    const int64_t limit = i / parts * columns + first(i % parts);
                                    while (k < count && position[k] < limit) ++k;
                                    ptr[static_cast<size_t>(i)] = static_cast<int32_t>(k);
                                  }
                                });
    ptr.back() = static_cast<int32_t>(count);
  }

  // The first column of a part.
  int64_t first(int64_t part) const { return part * columns / parts; }
  Stored from(int64_t row, int64_t part) const {
    return {position, value, ptr.data() + row * parts + part, columns, parts};
  }
};

// The batch in tiles.
struct Batch {
  int64_t images, length;
  int32_t vectors;

  Batch(int64_t n, int64_t columns) : images(n) {
    const int64_t width = kernels().width, most = std::max<int64_t>(1, kCache / (columns * width));
    const int64_t all = (n + width - 1) / width, longest = std::min<int64_t>(most, kStoredVectors);
    const int64_t count = std::max<int64_t>(1, (all + longest - 1) / longest);
    vectors = static_cast<int32_t>(std::max<int64_t>(1, (all + count - 1) / count));
    length = vectors * width;
  }

  int64_t tiles() const { return (images + length - 1) / length; }
  int64_t first(int64_t tile) const { return tile * length; }
  int64_t size(int64_t tile) const { return std::min(length, images - tile * length); }
};

// to[c][i] = from[i][c] for the images of a tile, and zeros where it has fewer.
void turn(const Batch& batch, int64_t tile, const float* from, int64_t stride, int64_t count, float* to) {
  const int64_t size = batch.size(tile);
  if (size < batch.length) std::memset(to, 0, sizeof(float) * count * batch.length);
  kernels().transpose(from + batch.first(tile) * stride, stride, to, batch.length, size, count);
}

void turn_back(const Batch& batch, int64_t tile, const float* from, int64_t stride, int64_t count, float* to) {
  kernels().transpose(from, batch.length, to + batch.first(tile) * stride, stride, count, batch.size(tile));
}

Tensor stored_forward(const Tensor& x, const Tensor& values, const Tensor& positions, const std::optional<Tensor>& bias,
                      int64_t outputs) {
  STD_TORCH_CHECK(x.dim() == 2, "granet: the input must have two dimensions");
  const int64_t images = x.size(0), inputs = x.size(1);
  check_float(x, images * inputs, "the input");
  if (bias) check_float(*bias, outputs, "the bias");
  const Matrix weight(values, positions, outputs, inputs, 1);
  const Tensor y = torch::stable::new_empty(x, {images, outputs});
  if (images == 0) return y;
  const Batch batch(images, inputs);
  const float* const from = x.const_data_ptr<float>();
  const float* const start = bias ? bias->const_data_ptr<float>() : nullptr;
  float* const to = y.mutable_data_ptr<float>();
  const int64_t threads = torch::stable::get_num_threads(), groups = (outputs + kRows - 1) / kRows;
  const int64_t parts = std::min(groups, (threads + batch.tiles() - 1) / batch.tiles());
  torch::stable::parallel_for(0, batch.tiles() * parts, 1, [&](int64_t begin, int64_t end) {
    float* const input = scratch(kInput, inputs * batch.length);
    float* const output = scratch(kOutput, kRows * batch.length);
    int64_t turned = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t tile = item / parts, part = item % parts;
      if (tile != turned) turn(batch, tile, from, inputs, inputs, input);
      turned = tile;
      for (int64_t group = groups * part / parts; group < groups * (part + 1) / parts; ++group) {
        const int64_t r0 = group * kRows, r1 = std::min(outputs, r0 + kRows);
        kernels().stored_spmm(weight.from(r0, 0), r0, r1, input, start, output, batch.vectors);
        turn_back(batch, tile, output, outputs, r1 - r0, to + r0);
      }
    }
  });
  return y;
}

// Every thread has a range of columns for itself, so no two write the same sum; and as tiles do not depend on it, sums
// are the same for any number of threads.
std::tuple<Tensor, Tensor> stored_backward(const Tensor& dy, const Tensor& x, const Tensor& values,
                                           const Tensor& positions, bool need_x, bool need_values) {
  STD_TORCH_CHECK(x.dim() == 2 && dy.dim() == 2, "granet: the input and the gradient must have two dimensions");
  const int64_t images = x.size(0), inputs = x.size(1), outputs = dy.size(1);
  check_float(x, images * inputs, "the input");
  check_float(dy, images * outputs, "the gradient");
  const int64_t parts = std::min<int64_t>(inputs, torch::stable::get_num_threads());
  const Matrix weight(values, positions, outputs, inputs, parts);
  Tensor dx = need_x ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor grad = torch::stable::new_empty(values, {need_values ? values.numel() : 0});
  torch::stable::zero_(grad);
  if (images == 0) return {dx, grad};
  const Batch batch(images, inputs);
  const float* const input = x.const_data_ptr<float>();
  const float* const gradient = dy.const_data_ptr<float>();
  float* const to = need_x ? dx.mutable_data_ptr<float>() : nullptr;
  float* const sums = need_values ? grad.mutable_data_ptr<float>() : nullptr;
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t c0 = weight.first(part), count = weight.first(part + 1) - c0;
      float* const in = scratch(kInput, count * batch.length);
      float* const out = scratch(kOutput, kRows * batch.length);
      float* const back = scratch(kGradient, count * batch.length);
      for (int64_t tile = 0; tile < batch.tiles(); ++tile) {
        if (sums) turn(batch, tile, input + c0, inputs, count, in);
        if (to) std::memset(back, 0, sizeof(float) * count * batch.length);
        for (int64_t r0 = 0; r0 < outputs; r0 += kRows) {
          const int64_t r1 = std::min(outputs, r0 + kRows);
          const Stored rows = weight.from(r0, part);
          turn(batch, tile, gradient + r0, outputs, r1 - r0, out);
          if (to) kernels().stored_scatter(rows, r0, r1, out, back - c0 * batch.length, batch.vectors);
          if (sums) kernels().stored_sddmm(rows, r0, r1, out, in - c0 * batch.length, sums, batch.vectors);
        }
        if (to) turn_back(batch, tile, back, inputs, count, to + c0);
      }
    }
  });
  return {dx, grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(granet, m) {
  m.def("stored_forward(Tensor x, Tensor values, Tensor positions, Tensor? bias, int outputs) -> Tensor");
  m.def(
      "stored_backward(Tensor dy, Tensor x, Tensor values, Tensor positions, bool need_x, bool need_values) -> "
      "(Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(granet, CPU, m) {
  m.impl("stored_forward", TORCH_BOX(&stored_forward));
  m.impl("stored_backward", TORCH_BOX(&stored_backward));
}

}  // namespace granet
