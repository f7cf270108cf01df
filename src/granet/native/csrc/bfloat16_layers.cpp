// The operators of one layer in bfloat16: forward, and both gradients. Images lie innermost in the planes, and tensors
// are read and written with their channels innermost (NHWC), so both ways are transposes of images and channels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <memory>
#include <optional>
#include <tuple>

#include "bfloat16.h"
#include "layers.h"
#include "reduced.h"

namespace granet {

namespace {

const Bfloat16Kernels& choose() {
#if defined(__x86_64__)
  if (std::strcmp(reduced().name, "avx512bf16") == 0) return bfloat16_avx512bf16();
  if (kernels().width == 16) return bfloat16_avx512();
  if (kernels().width == 8) return bfloat16_avx2();
#endif
  return bfloat16_generic();
}

const uint16_t* halves(const Tensor& t, int64_t numel, const char* what) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::BFloat16 && t.is_contiguous(), "granet: ", what,
                  " must be a contiguous bfloat16 tensor on the CPU");
  STD_TORCH_CHECK(t.numel() == numel, "granet: ", what, " has ", t.numel(), " elements, expected ", numel);
  return static_cast<const uint16_t*>(t.const_data_ptr());
}

uint16_t* scratch16(int slot, int64_t numbers) { return reinterpret_cast<uint16_t*>(scratch(slot, (numbers + 1) / 2)); }

// The weights in the order of the structure, rounded.
std::unique_ptr<uint16_t[]> gather16(const float* weight, const IndexStructure& structure) {
  std::unique_ptr<uint16_t[]> values(new uint16_t[std::max<int64_t>(structure.nonzeros, 1)]);
  uint16_t* const to = values.get();
  torch::stable::parallel_for(0, structure.nonzeros, 32768, [&](int64_t begin, int64_t end) {
    constexpr int64_t kPiece = 256;
    float piece[kPiece];
    for (int64_t k = begin; k < end; k += kPiece) {
      const int64_t count = std::min(kPiece, end - k);
      for (int64_t i = 0; i < count; ++i) piece[i] = weight[structure.index[k + i]];
      bfloat16().round(piece, count, to + k);
    }
  });
  return values;
}

constexpr int64_t kChannels = 32;  // a cache line of them

// Fills planes[c * phases + f] with every sy-th row and sx-th column of channel c from phase f on, and the rest with 0.
void pack(const uint16_t* from, const Image& image, uint16_t* planes, const Planes& layout,
          const std::vector<Phase>& phases, int64_t sy, int64_t sx) {
  const int64_t count = static_cast<int64_t>(phases.size());
  for (int64_t p = 0; p < image.channels * count; ++p) {
    const Phase& phase = phases[p % count];
    if (image.images == layout.batch) {
      clear_around(planes + p * layout.stride, layout, steps(image.height, phase.y, sy),
                   steps(image.width, phase.x, sx));
    } else {
      std::memset(planes + p * layout.stride, 0, sizeof(uint16_t) * layout.stride);
    }
  }
  for (int64_t c = 0; c < image.channels; c += kChannels) {
    for (int64_t f = 0; f < count; ++f) {
      uint16_t* const plane = planes + (c * count + f) * layout.stride + layout.front;
      for (int64_t y = phases[f].y, row = 0; y < image.height; y += sy, ++row) {
        for (int64_t x = phases[f].x, column = 0; x < image.width; x += sx, ++column) {
          bfloat16().transpose(from + (y * image.width + x) * image.channels + c, image.image_stride,
                               plane + (row * layout.pitch + column) * layout.batch, count * layout.stride,
                               image.images, std::min(kChannels, image.channels - c));
        }
      }
    }
  }
}

// The inverse of `pack` for positions first..last of the planes.
void unpack(const uint16_t* planes, const Planes& layout, uint16_t* to, const Image& image,
            const std::vector<Phase>& phases, int64_t sy, int64_t sx, int64_t first, int64_t last) {
  const int64_t count = static_cast<int64_t>(phases.size());
  for (int64_t p = first; p < last; ++p) {
    const int64_t row = p / layout.pitch, column = p % layout.pitch;
    for (int64_t f = 0; f < count; ++f) {
      const int64_t y = phases[f].y + row * sy, x = phases[f].x + column * sx;
      if (y >= image.height || x >= image.width) continue;
      for (int64_t c = 0; c < image.channels; c += kChannels) {
        bfloat16().transpose(planes + (c * count + f) * layout.stride + layout.front + p * layout.batch,
                             count * layout.stride, to + (y * image.width + x) * image.channels + c, image.image_stride,
                             std::min(kChannels, image.channels - c), image.images);
      }
    }
  }
}

// A part of the positions of a plane, cut into tiles.
struct Part {
  int64_t first, last;  // positions
  std::vector<Tile> cut;

  // Part i of `count`, whose tiles are at most `longest` vectors long.
  Part(const Planes& planes, int64_t i, int64_t count, int64_t longest) {
    const int64_t positions = planes.positions() / planes.batch, width = bfloat16().width;
    first = i * positions / count, last = (i + 1) * positions / count;
    const int64_t vectors = (last - first) * planes.batch / width;
    const int64_t tiles = (vectors + longest - 1) / longest;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t begin = t * vectors / tiles, end = (t + 1) * vectors / tiles;
      cut.push_back({first * planes.batch + begin * width, static_cast<int32_t>(end - begin)});
    }
  }
};

// Multiplies all rows, over all tiles.
void multiply(const IndexStructure& structure, const uint16_t* values, int64_t chunks, int64_t blocks,
              const std::vector<Tile>& cut, const uint16_t* x, uint16_t* out, int64_t out_stride, const float* bias) {
  const int64_t rows = structure.rows / (chunks * blocks), width = bfloat16().width;
  const Bfloat16Rows matrix{structure.ptr, structure.id, structure.offset, values};
  float* const kept = scratch(2, rows * bfloat16().max_vectors * width);
  for (const Tile& tile : cut) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      for (int64_t block = 0; block < blocks; ++block) {
        const int32_t first = static_cast<int32_t>((chunk * blocks + block) * rows);
        const Bfloat16Sums sums{
            bias, kept, tile.vectors * width, static_cast<int32_t>(chunks), block == 0, block + 1 == blocks};
        bfloat16().spmm(matrix, first, first + static_cast<int32_t>(rows), x + tile.start, out + tile.start, out_stride,
                        tile.vectors, sums);
      }
    }
  }
}

// How the work on a layer is shared among threads: by blocks of images, and by parts of the positions where there are
// fewer blocks than threads.
struct Work {
  const Geometry& g;
  int64_t parts;

  explicit Work(const Geometry& geometry) : g(geometry) {
    STD_TORCH_CHECK(g.batch % bfloat16().width == 0 && g.phases.size() > 0, "granet: malformed geometry");
    const int64_t threads = torch::stable::get_num_threads(), blocks = std::max<int64_t>(g.blocks(), 1);
    const int64_t positions = std::min(g.input().positions(), g.output().positions()) / g.batch;
    parts = std::min((threads + blocks - 1) / blocks, std::max<int64_t>(positions, 1));
  }
  int64_t items() const { return g.blocks() * parts; }
  int64_t longest(int64_t most) const { return std::clamp<int64_t>(g.tile / bfloat16().width, 1, most); }
};

Tensor conv_forward_bfloat16(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                             const Tensor& ptr, const Tensor& id, const Tensor& offset, const Tensor& index,
                             std::vector<int64_t> numbers) {
  const Geometry g(numbers);
  const Work work(g);
  const uint16_t* const from = halves(x, g.n * g.c * g.h * g.w, "the input");
  check_float(weight, weight.numel(), "the weight");
  if (bias) check_float(*bias, g.o, "the bias");
  const IndexStructure structure(ptr, id, offset, index, g.o * g.forward_blocks);
  const Tensor y =
      x.dim() == 2 ? torch::stable::new_empty(x, {g.n, g.o}) : torch::stable::new_empty(x, {g.n, g.ho, g.wo, g.o});
  if (g.n == 0) return y;
  const auto values = gather16(weight.const_data_ptr<float>(), structure);
  const float* const bias_data = bias ? bias->const_data_ptr<float>() : nullptr;
  uint16_t* const to = static_cast<uint16_t*>(y.mutable_data_ptr());
  torch::stable::parallel_for(0, work.items(), 1, [&](int64_t begin, int64_t end) {
    uint16_t* const input = scratch16(0, g.planes() * g.stride);
    uint16_t* const output = scratch16(1, g.o * g.stride);
    int64_t packed = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t block = item / work.parts;
      if (packed != block) {
        pack(from + block * g.batch * g.c * g.h * g.w, g.image(block), input, g.input(), g.phases, g.sy, g.sx);
        packed = block;
      }
      const Part part(g.output(), item % work.parts, work.parts, work.longest(bfloat16().max_vectors));
      multiply(structure, values.get(), g.chunks, g.forward_blocks, part.cut, input + g.front, output + g.front,
               g.stride, bias_data);
      unpack(output, g.output(), to + block * g.batch * g.o * g.ho * g.wo, g.result(block), {kWhole[0]}, 1, 1,
             part.first, part.last);
    }
  });
  return y;
}

std::tuple<Tensor, Tensor> conv_backward_bfloat16(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                  const Tensor& ptr, const Tensor& id, const Tensor& offset,
                                                  const Tensor& index, const Tensor& back_ptr, const Tensor& back_id,
                                                  const Tensor& back_offset, const Tensor& back_index,
                                                  std::vector<int64_t> numbers, bool need_x, bool need_weight) {
  const Geometry g(numbers);
  const Work work(g);
  const uint16_t* const from = halves(dy, g.n * g.o * g.ho * g.wo, "the gradient");
  const uint16_t* const inputs = halves(x, g.n * g.c * g.h * g.w, "the input");
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
  std::unique_ptr<uint16_t[]> values;
  if (need_x) values = gather16(weight.const_data_ptr<float>(), backward);
  uint16_t* const to = need_x ? static_cast<uint16_t*>(dx.mutable_data_ptr()) : nullptr;
  const Bfloat16Rows matrix{forward.ptr, forward.id, forward.offset, nullptr};

  // Every share sums its own gradient, so the result depends on the number of threads alone.
  const int64_t items = work.items(), shares = std::min<int64_t>(items, torch::stable::get_num_threads());
  std::vector<std::unique_ptr<float[]>> sums(need_weight ? shares : 0);
  torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    uint16_t* const gradient = scratch16(0, g.o * g.stride);
    uint16_t* const planes = scratch16(1, g.planes() * g.stride);  // of the input's gradient, then of the input
    for (int64_t share = begin; share < end; ++share) {
      if (need_weight) sums[share].reset(new float[std::max<int64_t>(forward.nonzeros, 1)]());
      for (int64_t item = share * items / shares; item < (share + 1) * items / shares; ++item) {
        const int64_t block = item / work.parts, i = item % work.parts;
        pack(from + block * g.batch * g.o * g.ho * g.wo, g.result(block), gradient, g.output(), {kWhole[0]}, 1, 1);
        const int64_t first = block * g.batch * g.c * g.h * g.w;
        if (need_x) {
          const Part part(g.input(), i, work.parts, work.longest(bfloat16().max_vectors));
          multiply(backward, values.get(), g.chunks, g.backward_blocks, part.cut, gradient + g.front, planes + g.front,
                   g.stride, nullptr);
          unpack(planes, g.input(), to + first, g.image(block), g.phases, g.sy, g.sx, part.first, part.last);
        }
        if (need_weight) {
          pack(inputs + first, g.image(block), planes, g.input(), g.phases, g.sy, g.sx);
          for (const Tile& tile : Part(g.output(), i, work.parts, bfloat16().max_gradient).cut) {
            bfloat16().sddmm(matrix, 0, static_cast<int32_t>(forward.rows), planes + g.front + tile.start,
                             gradient + g.front + tile.start, g.stride, tile.vectors, sums[share].get());
          }
        }
      }
    }
  });
  if (need_weight) {
    float* const total = dw.mutable_data_ptr<float>();
    torch::stable::parallel_for(0, forward.nonzeros, 32768, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        float sum = 0;
        for (const auto& share : sums) sum += share[k];
        total[k] = sum;
      }
    });
  }
  return {dx, dw};
}

std::vector<int64_t> bfloat16_cpu() { return {bfloat16().width, bfloat16().max_vectors}; }

}  // namespace

const Bfloat16Kernels& bfloat16() {
  static const Bfloat16Kernels& chosen = choose();
  return chosen;
}

STABLE_TORCH_LIBRARY_FRAGMENT(granet, m) {
  m.def(
      "conv_forward_bfloat16(Tensor x, Tensor weight, Tensor? bias, Tensor ptr, Tensor id, Tensor offset, "
      "Tensor index, int[] geometry) -> Tensor");
  m.def(
      "conv_backward_bfloat16(Tensor dy, Tensor x, Tensor weight, Tensor ptr, Tensor id, Tensor offset, Tensor index, "
      "Tensor back_ptr, Tensor back_id, Tensor back_offset, Tensor back_index, int[] geometry, bool need_x, "
      "bool need_weight) -> (Tensor, Tensor)");
  m.def("bfloat16_cpu() -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(granet, CPU, m) {
  m.impl("conv_forward_bfloat16", TORCH_BOX(&conv_forward_bfloat16));
  m.impl("conv_backward_bfloat16", TORCH_BOX(&conv_backward_bfloat16));
}

STABLE_TORCH_LIBRARY_IMPL(granet, CompositeExplicitAutograd, m) { m.impl("bfloat16_cpu", TORCH_BOX(&bfloat16_cpu)); }

}  // namespace granet
