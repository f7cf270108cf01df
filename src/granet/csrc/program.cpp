// Compiled inference: a list of steps over planes, run in one call, so that activations stay in the kernels' layout
// and in the cache from layer to layer. granet.engine.program writes the list; the two files share its encoding.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <limits>
#include <memory>

#include "planes.h"

namespace granet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::parallel_for;

namespace {

constexpr int64_t kRow = 24;  // integers per slot and per step

enum Op : int64_t { kPack = 0, kUnpack, kConv, kSplit, kMaxPool, kAvgPool, kAdd, kOps };
enum Kind : int64_t { kSparse = 0, kBlock = 1, kVector = 2 };

// A set of planes in the arena: `blocks` times `planes` planes.
struct Slot {
  float* data;
  int64_t planes, blocks, images;
  Planes layout;

  float* block(int64_t b) const { return data + b * planes * layout.stride; }
  // The zeros around plane p's positions, which the consumers' taps rely on.
  void clear_front(int64_t b, int64_t p) const {
    std::memset(block(b) + p * layout.stride, 0, sizeof(float) * layout.front);
  }
  void clear_back(int64_t b, int64_t p, int64_t written) const {
    std::memset(block(b) + p * layout.stride + layout.front + written, 0,
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

std::vector<Phase> phases_of(const Machine& m, int64_t index) {
  const Tensor& t = m.constant(index);
  const int32_t* p = t.const_data_ptr<int32_t>();
  std::vector<Phase> result;
  for (int64_t i = 0; i + 1 < t.numel(); i += 2) result.push_back({p[i], p[i + 1]});
  return result;
}

// Calls body(block, first channel, last channel) for all channels of all blocks, several at a time: a thread that
// transposes needs neighbouring channels, or it would touch a cache line for every number.
template <typename Body>
void each_channels(const Slot& slot, int64_t channels, int64_t positions, const Body& body) {
  const int64_t grain = std::max<int64_t>(16, 16384 / (positions * slot.layout.batch) / 16 * 16);
  const int64_t groups = (channels + grain - 1) / grain;
  parallel_for(0, slot.blocks * groups, 1, [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; ++i) {
      const int64_t first = i % groups * grain;
      body(i / groups, first, std::min(channels, first + grain));
    }
  });
}

// step: op, input, slot, channels, height, width, phases, sy, sx
void run_pack(const Machine& m, const int64_t* s, const std::vector<Tensor>& inputs) {
  STD_TORCH_CHECK(s[1] >= 0 && s[1] < static_cast<int64_t>(inputs.size()), "granet: no input ", s[1]);
  const Tensor& x = inputs[s[1]];
  const Slot& out = m.slot(s[2]);
  const int64_t channels = s[3], height = s[4], width = s[5];
  const std::vector<Phase> phases = phases_of(m, s[6]);
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == ScalarType::Float && x.is_contiguous(),
                  "granet: the input must be a contiguous float32 tensor on the CPU");
  STD_TORCH_CHECK(x.numel() == out.images * channels * height * width, "granet: the input has the wrong shape");
  const int64_t image = channels * height * width;
  const float* from = x.const_data_ptr<float>();
  each_channels(out, channels, height * width, [&](int64_t block, int64_t begin, int64_t end) {
    const int64_t first = block * out.layout.batch;
    pack(from + first * image, {channels, height, width, std::min(out.layout.batch, out.images - first), image},
         out.block(block), out.layout, phases.data(), phases.size(), s[7], s[8], begin, end);
  });
}

// step: op, slot, channels, height, width, dimensions of the result
Tensor run_unpack(const Machine& m, const int64_t* s, const Tensor& like) {
  const Slot& in = m.slot(s[1]);
  const int64_t channels = s[2], height = s[3], width = s[4];
  Tensor y = s[5] == 2   ? torch::stable::new_empty(like, {in.images, channels})
             : s[5] == 3 ? torch::stable::new_empty(like, {in.images, channels, width})
                         : torch::stable::new_empty(like, {in.images, channels, height, width});
  const Phase whole[1] = {{0, 0}};
  const int64_t image = channels * height * width;
  float* to = y.mutable_data_ptr<float>();
  each_channels(in, channels, height * width, [&](int64_t block, int64_t begin, int64_t end) {
    const int64_t first = block * in.layout.batch;
    unpack(in.block(block), in.layout, to + first * image,
           {channels, height, width, std::min(in.layout.batch, in.images - first), image}, whole, 1, 1, 1, begin, end);
  });
  return y;
}

// Calls body(i) for every i below `count`, once. A thread takes its own share in order, which it finds in its cache from
// layer to layer, then what others have left: processors of a shared machine are seldom equally fast.
template <typename Body>
void for_each(int64_t count, const Body& body) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const std::unique_ptr<Share[]> shares(new Share[threads]);
  for (int64_t t = 0; t < threads; ++t) {
    shares[t].next = count * t / threads;
    shares[t].end = count * (t + 1) / threads;
  }
  parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t other = 0; other < threads; ++other) {
        Share& share = shares[(t + other) % threads];
        for (int64_t i; (i = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) body(i);
      }
    }
  });
}

// step: op, in, out, residual, ptr, id, offset, value, bias, keep, chunks, column blocks, activation, kind, tile
struct Convolution {
  const Slot& in;
  const Slot& out;
  const Slot* residual;
  Rows matrix;
  const float* bias;
  const int32_t* keep;
  int64_t chunks, column_blocks, kind, rows, longest;
  int32_t activation;

  Convolution(const Machine& m, const int64_t* s)
      : in(m.slot(s[1])),
        out(m.slot(s[2])),
        residual(s[3] >= 0 ? &m.slot(s[3]) : nullptr),
        matrix{m.ints(s[4]), m.ints(s[5]), m.ints(s[6]), m.floats(s[7])},
        bias(m.floats(s[8])),
        keep(m.ints(s[9])),
        chunks(s[10]),
        column_blocks(s[11]),
        kind(s[13]),
        rows(m.constant(s[5]).numel() / (chunks * column_blocks)),
        longest(std::clamp<int64_t>(s[14] / kernels().width, 1,
                                    kind == kBlock ? kernels().max_block_vectors : kernels().max_vectors)),
        activation(static_cast<int32_t>(s[12])) {}

  // One position per plane: the planes are gathered into a plain vector first.
  void run_vector() const {
    float* const x = scratch(0, in.planes);
    float* const y = scratch(1, 2 * out.planes);
    const int64_t share = std::max<int64_t>(1, rows / (4 * torch::stable::get_num_threads()));
    for (int64_t b = 0; b < out.blocks; ++b) {
      for (int64_t p = 0; p < in.planes; ++p) x[p] = in.block(b)[p * in.layout.stride + in.layout.front];
      Epilogue e{};
      e.bias = bias;
      e.activation = activation;
      e.last = true;
      if (residual) {
        float* const r = y + out.planes;
        for (int64_t p = 0; p < out.planes; ++p) r[p] = residual->block(b)[p * out.layout.stride + out.layout.front];
        e.residual = r;
        e.residual_stride = 1;
      }
      for_each((rows + share - 1) / share, [&](int64_t i) {
        const int64_t last = std::min(rows, (i + 1) * share);
        kernels().spmv(matrix, static_cast<int32_t>(i * share), static_cast<int32_t>(last), x, y, e);
      });
      for (int64_t p = 0; p < out.planes; ++p) {
        out.clear_front(b, p);
        out.block(b)[p * out.layout.stride + out.layout.front] = y[p];
        out.clear_back(b, p, 1);
      }
    }
  }

  // The tiles of one block of images.
  std::vector<Tile> cut() const {
    const int64_t threads = torch::stable::get_num_threads(), width = kernels().width;
    // Tiles for every thread, unless that leaves them too short to keep the arithmetic units busy.
    const int64_t vectors = (out.layout.positions() + width - 1) / width;
    int64_t count = (vectors + longest - 1) / longest;
    if (out.blocks < threads && vectors >= 6 * threads) count = (count + threads - 1) / threads * threads;
    return tiles(out.layout.positions(), static_cast<int32_t>(longest), count);
  }

  // Row chunks first..last of tile t of a block of images.
  void run_tile(int64_t block, const std::vector<Tile>& cut, int64_t t, int64_t first_chunk, int64_t last_chunk) const {
    const Kernels& k = kernels();
    const Tile& tile = cut[t];
    const int64_t tile_count = cut.size();
    const float* x = in.block(block) + in.layout.front + tile.start;
    float* y = out.block(block) + out.layout.front + tile.start;
    Epilogue e{};
    e.bias = bias;
    e.residual = residual ? residual->block(block) + residual->layout.front + tile.start : nullptr;
    e.residual_stride = residual ? residual->layout.stride : 0;
    e.keep = keep ? keep + tile.start : nullptr;
    e.activation = activation;
    const float* const addend = e.residual;
    for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
      for (int64_t b = 0; b < column_blocks; ++b) {
        const int32_t first = static_cast<int32_t>((chunk * column_blocks + b) * rows);
        e.accumulate = b > 0;
        e.last = b + 1 == column_blocks;
        e.residual = b == 0 ? addend : nullptr;  // before anything is written: the output may lie in its place
        (kind == kBlock ? k.spmm_block : k.spmm)(matrix, first, first + static_cast<int32_t>(rows), x, y,
                                                 out.layout.stride, tile.vectors, e);
      }
      if (t > 0 && t + 1 < tile_count) continue;
      const int64_t first = chunk * column_blocks * rows, written = cut.back().start + cut.back().vectors * k.width;
      for (int64_t r = first; r < first + rows; ++r) {
        for (int64_t p = matrix.id[r]; p < matrix.id[r] + (kind == kBlock ? 4 : 1); ++p) {
          if (t == 0) out.clear_front(block, p);
          if (t + 1 == tile_count) out.clear_back(block, p, written);
        }
      }
    }
  }
};

// `count` convolutions of which each but the first reads, at every position, only that position of the one before: a
// tile goes through all of them while it is in the cache.
void run_convolutions(const Machine& m, const int64_t* s, int64_t count) {
  std::vector<Convolution> chain;
  for (int64_t i = 0; i < count; ++i) chain.emplace_back(m, s + i * kRow);
  const Convolution& first = chain.front();
  if (first.kind == kVector) return first.run_vector();
  const std::vector<Tile> cut = first.cut();
  const int64_t tile_count = cut.size(), threads = torch::stable::get_num_threads();
  if (count > 1 && first.out.blocks * tile_count < threads) {
    for (int64_t i = 0; i < count; ++i) run_convolutions(m, s + i * kRow, 1);
    return;
  }
  // Threads take tiles; chunks of rows only where there are too few tiles.
  const bool by_row = count == 1 && first.out.blocks * tile_count < 2 * threads && first.out.blocks * tile_count % threads != 0;
  const int64_t parts = by_row ? first.chunks : 1;
  for_each(first.out.blocks * tile_count * parts, [&](int64_t item) {
    const int64_t block = item / (tile_count * parts), t = item / parts % tile_count, part = item % parts;
    for (const Convolution& c : chain) {
      c.run_tile(block, cut, t, part * c.chunks / parts, (part + 1) * c.chunks / parts);
    }
  });
}

// step: op, in, out, phases, sy, sx: splits every plane into its phases, for a strided layer that follows
void run_split(const Machine& m, const int64_t* s) {
  const Slot& in = m.slot(s[1]);
  const Slot& out = m.slot(s[2]);
  const std::vector<Phase> phases = phases_of(m, s[3]);
  const int64_t count = phases.size(), sy = s[4], sx = s[5], nb = in.layout.batch;
  parallel_for(0, in.blocks * in.planes, std::max<int64_t>(1, 16384 / in.layout.stride), [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; ++i) {
      const int64_t block = i / in.planes, c = i % in.planes;
      const float* from = in.block(block) + c * in.layout.stride + in.layout.front;
      for (int64_t f = 0; f < count; ++f) {
        float* plane = out.block(block) + (c * count + f) * out.layout.stride;
        const int64_t rows = (in.layout.height - phases[f].y + sy - 1) / sy;
        const int64_t columns = (in.layout.width - phases[f].x + sx - 1) / sx;
        if (nb == 1 && sx == 2) {
          // A row's surplus is overwritten by the gap's zeros and the next row, the last one's by the zeros at the end.
          float* to = plane + out.layout.front;
          std::fill(plane, to, 0.0f);
          for (int64_t y = phases[f].y; y < in.layout.height; y += sy, to += out.layout.pitch) {
            kernels().take_even(from + y * in.layout.pitch + phases[f].x, to, columns);
            for (int64_t x = columns; x < out.layout.pitch; ++x) to[x] = 0.0f;
          }
          std::fill(to, plane + out.layout.stride, 0.0f);
          continue;
        }
        clear_around(plane, out.layout, std::max<int64_t>(rows, 0), std::max<int64_t>(columns, 0));
        for (int64_t y = phases[f].y, row = 0; y < in.layout.height; y += sy, ++row) {
          const float* source = from + y * in.layout.pitch * nb;
          float* to = plane + out.layout.front + row * out.layout.pitch * nb;
          if (nb == 1) {
            for (int64_t x = phases[f].x; x < in.layout.width; x += sx) *to++ = source[x];
          } else {
            for (int64_t x = phases[f].x; x < in.layout.width; x += sx, to += nb) {
              std::memcpy(to, source + x * nb, sizeof(float) * nb);
            }
          }
        }
      }
    }
  });
}

// step: op, in, out, kernel y, x, stride y, x, padding y, x
void run_max_pool(const Machine& m, const int64_t* s) {
  const Slot& in = m.slot(s[1]);
  const Slot& out = m.slot(s[2]);
  const int64_t ky = s[3], kx = s[4], sy = s[5], sx = s[6], py = s[7], px = s[8], nb = in.layout.batch;
  const int64_t row = (in.layout.width + 2 * px) * nb, starts = row - (kx - 1) * nb;
  parallel_for(0, in.blocks * in.planes, 1, [&](int64_t b, int64_t e) {
    float* const best = scratch(0, row);         // the maximum over the window's rows, with its padding columns
    float* const window = scratch(1, row);       // the maximum over the window, for every column it can start at
    std::fill_n(best, row, -std::numeric_limits<float>::infinity());
    for (int64_t i = b; i < e; ++i) {
      const int64_t block = i / in.planes, c = i % in.planes;
      const float* from = in.block(block) + c * in.layout.stride + in.layout.front;
      float* plane = out.block(block) + c * out.layout.stride;
      std::memset(plane, 0, sizeof(float) * out.layout.stride);
      for (int64_t oy = 0; oy < out.layout.height; ++oy) {
        const int64_t first = std::max<int64_t>(0, oy * sy - py), last = std::min(in.layout.height, oy * sy - py + ky);
        float* const inner = best + px * nb;
        std::memcpy(inner, from + first * in.layout.pitch * nb, sizeof(float) * in.layout.width * nb);
        for (int64_t y = first + 1; y < last; ++y) {
          kernels().maximum(from + y * in.layout.pitch * nb, inner, in.layout.width * nb);
        }
        std::memcpy(window, best, sizeof(float) * starts);
        for (int64_t x = 1; x < kx; ++x) kernels().maximum(best + x * nb, window, starts);
        float* to = plane + out.layout.front + oy * out.layout.pitch * nb;
        if (nb == 1) {
          for (int64_t ox = 0; ox < out.layout.width; ++ox) to[ox] = window[ox * sx];
        } else {
          for (int64_t ox = 0; ox < out.layout.width; ++ox) {
            std::memcpy(to + ox * nb, window + ox * sx * nb, sizeof(float) * nb);
          }
        }
      }
    }
  });
}

// step: op, in, out: the mean over all positions
void run_avg_pool(const Machine& m, const int64_t* s) {
  const Slot& in = m.slot(s[1]);
  const Slot& out = m.slot(s[2]);
  const int64_t nb = in.layout.batch;
  const float scale = 1.0f / static_cast<float>(in.layout.height * in.layout.width);
  parallel_for(0, in.blocks * in.planes, 16, [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; ++i) {
      const int64_t block = i / in.planes, c = i % in.planes;
      const float* from = in.block(block) + c * in.layout.stride + in.layout.front;
      float* plane = out.block(block) + c * out.layout.stride;
      std::memset(plane, 0, sizeof(float) * out.layout.stride);
      float* to = plane + out.layout.front;
      for (int64_t y = 0; y < in.layout.height; ++y) {
        const float* source = from + y * in.layout.pitch * nb;
        if (nb == 1) {
          float sum = 0;
          for (int64_t x = 0; x < in.layout.width; ++x) sum += source[x];
          to[0] += sum;
        } else {
          for (int64_t x = 0; x < in.layout.width; ++x) kernels().add(to, source + x * nb, to, nb, kIdentity);
        }
      }
      for (int64_t n = 0; n < nb; ++n) to[n] *= scale;
    }
  });
}

// step: op, a, out, b or -1, activation; the slots share one geometry, gaps hold zeros and every activation keeps 0
void run_add(const Machine& m, const int64_t* s) {
  const Slot& a = m.slot(s[1]);
  const Slot& out = m.slot(s[2]);
  const float* other = s[3] >= 0 ? m.slot(s[3]).data : nullptr;
  const int64_t total = out.blocks * out.planes * out.layout.stride;
  parallel_for(0, total, 16384, [&](int64_t b, int64_t e) {
    kernels().add(a.data + b, other ? other + b : nullptr, out.data + b, e - b, static_cast<int32_t>(s[4]));
  });
}

std::vector<Tensor> run(std::vector<Tensor> inputs, std::vector<Tensor> constants, const Tensor& arena,
                        const Tensor& program, bool time) {
  STD_TORCH_CHECK(program.scalar_type() == ScalarType::Long && program.is_contiguous() && program.numel() >= 2,
                  "granet: malformed program");
  STD_TORCH_CHECK(arena.scalar_type() == ScalarType::Float && arena.is_contiguous(), "granet: malformed arena");
  STD_TORCH_CHECK(!inputs.empty(), "granet: a program needs an input");
  const int64_t* numbers = program.const_data_ptr<int64_t>();
  const int64_t slot_count = numbers[0], step_count = numbers[1];
  STD_TORCH_CHECK(program.numel() == 2 + kRow * (slot_count + step_count), "granet: malformed program");
  Machine machine{constants, {}};
  float* const memory = arena.mutable_data_ptr<float>();
  for (int64_t i = 0; i < slot_count; ++i) {
    const int64_t* s = numbers + 2 + kRow * i;
    const Slot slot{memory + s[0], s[1], s[2], s[3], {s[4], s[5], s[6], s[7], s[8], s[9]}};
    STD_TORCH_CHECK(s[0] >= 0 && s[0] + slot.planes * slot.blocks * slot.layout.stride <= arena.numel(),
                    "granet: slot ", i, " reaches outside the arena");
    machine.slots.push_back(slot);
  }
  std::vector<Tensor> outputs;
  Tensor spent;
  int64_t* nanoseconds = nullptr;
  if (time) {
    spent = torch::stable::new_empty(program, {step_count});
    nanoseconds = spent.mutable_data_ptr<int64_t>();
  }
  int64_t taken = 1;  // the steps done in one go
  for (int64_t i = 0; i < step_count; i += taken) {
    const int64_t* s = numbers + 2 + kRow * (slot_count + i);
    taken = 1 + s[kRow - 1];
    STD_TORCH_CHECK(taken >= 1 && i + taken <= step_count, "granet: malformed program");
    const auto start = std::chrono::steady_clock::now();
    switch (s[0]) {
      case kPack: run_pack(machine, s, inputs); break;
      case kUnpack: outputs.push_back(run_unpack(machine, s, inputs[0])); break;
      case kConv: run_convolutions(machine, s, taken); break;
      case kSplit: run_split(machine, s); break;
      case kMaxPool: run_max_pool(machine, s); break;
      case kAvgPool: run_avg_pool(machine, s); break;
      case kAdd: run_add(machine, s); break;
      default: STD_TORCH_CHECK(false, "granet: no operation ", s[0]);
    }
    if (time) {
      std::fill_n(nanoseconds + i, taken, 0);
      nanoseconds[i] =
          std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - start).count();
    }
  }
  if (time) outputs.push_back(spent);
  return outputs;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(granet, m) {
  m.def("run(Tensor[] inputs, Tensor[] constants, Tensor(a!) arena, Tensor program, bool time) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(granet, CPU, m) { m.impl("run", TORCH_BOX(&run)); }

}  // namespace granet
