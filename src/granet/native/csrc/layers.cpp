// The operators of one layer: forward, and both gradients. Each block of images is packed into planes that stay in
// the cache, computed, and unpacked; blocks go to torch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>

#include "layers.h"

namespace granet {

using torch::stable::Tensor;

namespace {

std::unique_ptr<float[]> gather(const float* weight, const IndexStructure& structure) {
  std::unique_ptr<float[]> values(new float[std::max<int64_t>(structure.nonzeros, 1)]);
  float* const to = values.get();
  torch::stable::parallel_for(0, structure.nonzeros, 32768, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) to[k] = weight[structure.index[k]];
  });
  return values;
}

// Multiplies chunks first_chunk..last_chunk of the rows, over all tiles.
void multiply(const IndexStructure& structure, const float* values, int64_t chunks, int64_t blocks, int64_t first_chunk,
              int64_t last_chunk, const std::vector<Tile>& cut, const float* x, float* out, int64_t out_stride,
              const float* bias) {
  const int64_t rows = structure.rows / (chunks * blocks);
  const Rows matrix{structure.ptr, structure.id, structure.offset, values};
  for (const Tile& tile : cut) {
    for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
      for (int64_t block = 0; block < blocks; ++block) {
        const int32_t first = static_cast<int32_t>((chunk * blocks + block) * rows);
        Epilogue epilogue{};
        epilogue.bias = bias;
        epilogue.accumulate = block > 0;
        epilogue.last = block + 1 == blocks;
        kernels().spmm(matrix, first, first + static_cast<int32_t>(rows), x + tile.start, out + tile.start, out_stride,
                       tile.vectors, epilogue);
      }
    }
  }
}

// The panels of a pointwise layer, image by image.
struct Panels {
  const Geometry& g;
  std::vector<Tile> whole, rest;

  explicit Panels(const Geometry& geometry)
      : g(geometry),
        whole(tiles(g.panel(), g.longest_tile())),
        rest(tiles(g.h * g.w - (g.panels() - 1) * g.panel(), g.longest_tile())) {}

  int64_t count() const { return g.n * g.panels(); }
  const std::vector<Tile>& cut(int64_t i) const { return i % g.panels() + 1 < g.panels() ? whole : rest; }
  // Where panel i begins in an NCHW tensor of so many channels.
  int64_t start(int64_t i, int64_t channels) const {
    return i / g.panels() * channels * g.h * g.w + i % g.panels() * g.panel();
  }
  void pack(const float* from, int64_t i, int64_t channels, float* to) const {
    const int64_t positions = std::min(g.panel(), g.h * g.w - i % g.panels() * g.panel());
    from += start(i, channels);
    for (int64_t c = 0; c < channels; ++c)
      std::memcpy(to + c * g.stride, from + c * g.h * g.w, sizeof(float) * positions);
  }
};

void pointwise_forward(const Geometry& g, const IndexStructure& structure, const float* values, const float* x,
                       const float* bias, float* y) {
  const Panels panels(g);
  torch::stable::parallel_for(0, panels.count(), 1, [&](int64_t begin, int64_t end) {
    float* const input = scratch(0, g.c * g.stride);
    for (int64_t i = begin; i < end; ++i) {
      panels.pack(x, i, g.c, input);
      multiply(structure, values, g.chunks, g.forward_blocks, 0, g.chunks, panels.cut(i), input,
               y + panels.start(i, g.o), g.h * g.w, bias);
    }
  });
}

Tensor conv_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& ptr,
                    const Tensor& id, const Tensor& offset, const Tensor& index, std::vector<int64_t> numbers) {
  const Geometry g(numbers);
  check_float(x, g.n * g.c * g.h * g.w, "the input");
  check_float(weight, weight.numel(), "the weight");
  if (bias) check_float(*bias, g.o, "the bias");
  const IndexStructure structure(ptr, id, offset, index, g.o * g.forward_blocks);
  const Tensor y =
      x.dim() == 2 ? torch::stable::new_empty(x, {g.n, g.o}) : torch::stable::new_empty(x, {g.n, g.o, g.ho, g.wo});
  if (g.n == 0) return y;
  const auto values = gather(weight.const_data_ptr<float>(), structure);
  const float* const bias_data = bias ? bias->const_data_ptr<float>() : nullptr;
  const float* const from = x.const_data_ptr<float>();
  float* const to = y.mutable_data_ptr<float>();
  if (g.pointwise()) {
    pointwise_forward(g, structure, values.get(), from, bias_data, to);
    return y;
  }
  const std::vector<Tile> cut = tiles(g.output().positions(), g.longest_tile());
  // Rows can be written where they belong when no gap separates them and no vector reaches past the end.
  const bool direct = g.batch == 1 && g.pitch == g.wo && g.ho * g.wo % kernels().width == 0;
  const int64_t parts = g.blocks() >= torch::stable::get_num_threads() ? 1 : g.chunks;
  torch::stable::parallel_for(0, g.blocks() * parts, 1, [&](int64_t begin, int64_t end) {
    float* const input = scratch(0, g.planes() * g.stride);
    int64_t packed = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t block = item / parts;
      const int64_t first = item % parts * g.chunks / parts;
      const int64_t last = (item % parts + 1) * g.chunks / parts;
      if (packed != block) {
        pack(from + block * g.batch * g.c * g.h * g.w, g.image(block), input, g.input(), g.phases.data(),
             g.phases.size(), g.sy, g.sx, 0, g.c);
        packed = block;
      }
      float* const image = to + block * g.batch * g.o * g.ho * g.wo;
      if (direct) {
        multiply(structure, values.get(), g.chunks, g.forward_blocks, first, last, cut, input + g.front, image,
                 g.ho * g.wo, bias_data);
      } else {
        float* const output = scratch(1, g.o * g.stride);
        multiply(structure, values.get(), g.chunks, g.forward_blocks, first, last, cut, input + g.front,
                 output + g.front, g.stride, bias_data);
        // The chunks deal the output channels out one by one: chunk i holds channels i, i + chunks, ...
        for (int64_t c = 0; c < g.o; ++c) {
          const int64_t chunk = c % g.chunks;
          if (chunk < first || chunk >= last) continue;
          if (parts == 1) {
            unpack(output, g.output(), image, g.result(block), kWhole, 1, 1, 1, 0, g.o);
            break;
          }
          unpack(output, g.output(), image, g.result(block), kWhole, 1, 1, 1, c, c + 1);
        }
      }
    }
  });
  return y;
}

// Both gradients of a layer, block by block: a block is `batch` images, or a panel of a pointwise layer.
struct Backward {
  const Geometry& g;
  const IndexStructure& forward;   // rows are output channels: where the weight's gradient is wanted
  const IndexStructure& backward;  // rows are input planes
  const std::optional<Panels> panels;
  const std::vector<Tile> cut, grad_cut;
  const bool direct;             // rows of the input's gradient can be written where they belong
  const float *dy, *x, *values;  // `values` are the weights in the order of `backward`
  float* dx;

  Backward(const Geometry& geometry, const IndexStructure& f, const IndexStructure& b, const float* gradient,
           const float* input, const float* weights, float* result)
      : g(geometry),
        forward(f),
        backward(b),
        panels(g.pointwise() ? std::optional<Panels>(g) : std::nullopt),
        cut(tiles(g.input().positions(), g.longest_tile())),
        grad_cut(tiles(g.output().positions(), std::min(g.longest_tile(), kernels().max_vectors))),
        direct(g.batch == 1 && g.phases.size() == 1 && g.sy == 1 && g.sx == 1 && g.pitch == g.w &&
               g.h * g.w % kernels().width == 0),
        dy(gradient),
        x(input),
        values(weights),
        dx(result) {}

  int64_t blocks() const { return panels ? panels->count() : g.blocks(); }

  // The output's gradient of a block, packed into planes.
  const float* pack_gradient(int64_t block) const {
    float* const gradient = scratch(0, g.o * g.stride);
    if (panels) {
      panels->pack(dy, block, g.o, gradient);
    } else {
      pack(dy + block * g.batch * g.o * g.ho * g.wo, g.result(block), gradient, g.output(), kWhole, 1, 1, 1, 0, g.o);
    }
    return gradient;
  }

  void input_gradient(int64_t block, const float* gradient) const {
    if (panels) {
      multiply(backward, values, g.chunks, g.backward_blocks, 0, g.chunks, panels->cut(block), gradient,
               dx + panels->start(block, g.c), g.h * g.w, nullptr);
      return;
    }
    float* const image = dx + block * g.batch * g.c * g.h * g.w;
    if (direct) {
      multiply(backward, values, g.chunks, g.backward_blocks, 0, g.chunks, cut, gradient + g.front, image, g.h * g.w,
               nullptr);
      return;
    }
    float* const result = scratch(1, g.planes() * g.stride);
    multiply(backward, values, g.chunks, g.backward_blocks, 0, g.chunks, cut, gradient + g.front, result + g.front,
             g.stride, nullptr);
    unpack(result, g.input(), image, g.image(block), g.phases.data(), g.phases.size(), g.sy, g.sx, 0, g.c);
  }

  // Adds the block's share of the weight's gradient, at active places, to `sum`.
  void weight_gradient(int64_t block, const float* gradient, float* sum) const {
    float* const input = scratch(1, g.planes() * g.stride);
    if (panels) {
      panels->pack(x, block, g.c, input);
    } else {
      pack(x + block * g.batch * g.c * g.h * g.w, g.image(block), input, g.input(), g.phases.data(), g.phases.size(),
           g.sy, g.sx, 0, g.c);
    }
    const Rows matrix{forward.ptr, forward.id, forward.offset, nullptr};
    for (const Tile& tile : panels ? panels->cut(block) : grad_cut) {
      kernels().sddmm(matrix, 0, static_cast<int32_t>(forward.rows), input + g.front + tile.start,
                      gradient + g.front + tile.start, g.stride, tile.vectors, sum);
    }
  }
};

// Writes the values to their places in a dense tensor, and leaves the rest of it as it is.
void place_values(const Tensor& out, const Tensor& values, const Tensor& index) {
  check_float(out, out.numel(), "the gradient");
  check_float(values, index.numel(), "the values");
  const int32_t* const places = ints(index);
  const float* const from = values.const_data_ptr<float>();
  float* const to = out.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, index.numel(), 32768, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) to[places[k]] = from[k];
  });
}

std::tuple<Tensor, Tensor> conv_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& ptr,
                                         const Tensor& id, const Tensor& offset, const Tensor& index,
                                         const Tensor& back_ptr, const Tensor& back_id, const Tensor& back_offset,
                                         const Tensor& back_index, std::vector<int64_t> numbers, bool need_x,
                                         bool need_weight) {
  const Geometry g(numbers);
  check_float(dy, g.n * g.o * g.ho * g.wo, "the gradient");
  check_float(x, g.n * g.c * g.h * g.w, "the input");
  check_float(weight, weight.numel(), "the weight");
  const IndexStructure forward(ptr, id, offset, index, g.o * g.forward_blocks);
  const IndexStructure backward(back_ptr, back_id, back_offset, back_index, g.planes() * g.backward_blocks);
  Tensor dx = need_x ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor dw = torch::stable::new_empty(weight, {need_weight ? forward.nonzeros : 0});
  const bool covered = static_cast<int64_t>(g.phases.size()) == g.sy * g.sx;
  if (need_x && !covered) torch::stable::zero_(dx);
  if (g.n == 0) {
    if (need_weight) torch::stable::zero_(dw);
    return {dx, dw};
  }

  std::unique_ptr<float[]> values;
  if (need_x) values = gather(weight.const_data_ptr<float>(), backward);
  const Backward work(g, forward, backward, dy.const_data_ptr<float>(), x.const_data_ptr<float>(), values.get(),
                      need_x ? dx.mutable_data_ptr<float>() : nullptr);
  // Every part sums its own gradient, so the result depends on the number of threads alone.
  const int64_t blocks = work.blocks(), parts = std::min<int64_t>(blocks, torch::stable::get_num_threads());
  std::vector<std::unique_ptr<float[]>> sums(need_weight ? parts : 0);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      if (need_weight) sums[part].reset(new float[std::max<int64_t>(forward.nonzeros, 1)]());
      for (int64_t block = part * blocks / parts; block < (part + 1) * blocks / parts; ++block) {
        const float* const gradient = work.pack_gradient(block);
        if (need_x) work.input_gradient(block, gradient);
        if (need_weight) work.weight_gradient(block, gradient, sums[part].get());
      }
    }
  });
  if (need_weight) {
    float* const total = dw.mutable_data_ptr<float>();
    torch::stable::parallel_for(0, forward.nonzeros, 32768, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        float sum = 0;
        for (const auto& part : sums) sum += part[k];
        total[k] = sum;
      }
    });
  }
  return {dx, dw};
}

std::vector<int64_t> cpu() { return {kernels().width, kernels().max_vectors, kernels().max_block_vectors}; }

}  // namespace

STABLE_TORCH_LIBRARY(granet, m) {
  m.def(
      "conv_forward(Tensor x, Tensor weight, Tensor? bias, Tensor ptr, Tensor id, Tensor offset, Tensor index, "
      "int[] geometry) -> Tensor");
  m.def(
      "conv_backward(Tensor dy, Tensor x, Tensor weight, Tensor ptr, Tensor id, Tensor offset, Tensor index, "
      "Tensor back_ptr, Tensor back_id, Tensor back_offset, Tensor back_index, int[] geometry, bool need_x, "
      "bool need_weight) -> (Tensor, Tensor)");
  m.def("place_values(Tensor(a!) out, Tensor values, Tensor index) -> ()");
  m.def("cpu() -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(granet, CPU, m) {
  m.impl("conv_forward", TORCH_BOX(&conv_forward));
  m.impl("conv_backward", TORCH_BOX(&conv_backward));
  m.impl("place_values", TORCH_BOX(&place_values));
}

STABLE_TORCH_LIBRARY_IMPL(granet, CompositeExplicitAutograd, m) { m.impl("cpu", TORCH_BOX(&cpu)); }

}  // namespace granet
