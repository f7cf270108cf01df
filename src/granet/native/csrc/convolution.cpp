// The convolutions of a compiled program, tile by tile. Linear layers are 1x1 convolutions of one position.
#include <algorithm>
#include <atomic>
#include <memory>

#include "program.h"

namespace granet {

using torch::stable::parallel_for;

namespace {

// Calls body(i) once for every i below `count`. A thread first takes its own share, in order, because the data is in
// its cache from the layer before. Then it helps the others: processors of a shared machine are seldom equally fast.
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

// A step, with pointers to the memory that it names.
struct Convolution {
  const Slot& in;
  const Slot& out;
  const Slot* residual;
  Rows matrix;
  const float* bias;
  const int32_t* keep;
  int64_t chunks, column_blocks, kind, rows, longest;
  int32_t activation;
  WordRows groups{};         // at reduced precision
  WordEpilogue finishing{};  // at reduced precision

  Convolution(const Machine& m, const ConvStep& s)
      : in(m.slot(s.source)),
        out(m.slot(s.out)),
        residual(s.residual >= 0 ? &m.slot(s.residual) : nullptr),
        matrix(s.kind == kWords ? Rows{} : Rows{m.ints(s.ptr), m.ints(s.id), m.ints(s.offset), m.floats(s.value)}),
        bias(m.floats(s.bias)),
        keep(m.ints(s.keep)),
        chunks(s.chunks),
        column_blocks(s.blocks),
        kind(s.kind),
        rows(m.constant(s.id).numel() / (chunks * column_blocks)),
        longest(std::clamp<int64_t>(s.tile / kernels().width, 1,
                                    kind == kBlock ? kernels().max_block_vectors : kernels().max_vectors)),
        activation(static_cast<int32_t>(s.activation)) {
    if (kind != kWords) return;
    const float* const factors = m.floats(s.factors);
    longest = std::clamp<int64_t>(s.tile / reduced().width, 1, reduced().max_vectors);
    groups = {m.ints(s.ptr), m.ints(s.id), m.ints(s.offset), m.ints(s.value)};
    finishing.scale = m.floats(s.scale);
    finishing.shift = bias;
    finishing.residual_stride = residual ? residual->layout.stride : 0;
    finishing.residual_scale = factors[0];
    finishing.out_scale = factors[1];
    finishing.out_zero = factors[2];
    finishing.requantise = factors[1] != 0.0f;
    finishing.fill = static_cast<int32_t>(0x01010101u * static_cast<uint32_t>(out.fill));
    finishing.activation = activation;
    finishing.to_float = out.precision == kFloat32;
    finishing.channels = out.planes;
  }

  // There is one position per plane, so the planes are first gathered into a vector.
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

  // Returns the tiles of one block of images.
  std::vector<Tile> cut() const {
    const int64_t threads = torch::stable::get_num_threads(), width = kernels().width;
    // There are tiles for every thread, unless they would be too short to keep the arithmetic units busy.
    const int64_t vectors = (out.layout.positions() + width - 1) / width;
    int64_t count = (vectors + longest - 1) / longest;
    if (out.blocks < threads && vectors >= 6 * threads) count = (count + threads - 1) / threads * threads;
    return tiles(out.layout.positions(), static_cast<int32_t>(longest), count);
  }

  // Computes the row chunks first..last of tile t, for one block of images.
  void run_tile(int64_t block, const std::vector<Tile>& cut, int64_t t, int64_t first_chunk, int64_t last_chunk) const {
    if (kind == kWords) return run_word_tile(block, cut, t, first_chunk, last_chunk);
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
        e.residual = b == 0 ? addend : nullptr;  // read before anything is written, because the output may overwrite it
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

  // The same at reduced precision.
  void run_word_tile(int64_t block, const std::vector<Tile>& cut, int64_t t, int64_t first_chunk,
                     int64_t last_chunk) const {
    const ReducedKernels& k = reduced();
    const Tile& tile = cut[t];
    const int32_t* x = words(in.block(block) + in.layout.front + tile.start);
    float* y = out.block(block) + out.layout.front + tile.start;
    WordEpilogue e = finishing;
    e.residual = residual ? words(residual->block(block) + residual->layout.front + tile.start) : nullptr;
    e.keep = keep ? keep + tile.start : nullptr;
    const auto first = static_cast<int32_t>(first_chunk * rows), last = static_cast<int32_t>(last_chunk * rows);
    (in.precision == kInt8 ? k.spmm_int8 : k.spmm_bfloat16)(groups, first, last, x, y, out.layout.stride, tile.vectors,
                                                            e);
    const int64_t tile_count = cut.size(), written = cut.back().start + cut.back().vectors * k.width;
    if (t > 0 && t + 1 < tile_count) return;
    const int64_t planes = e.to_float ? channels_per_word(in.precision) : 1;
    for (int64_t g = first; g < last; ++g) {
      for (int64_t p = planes * groups.id[g]; p < std::min(planes * (groups.id[g] + 1), out.planes); ++p) {
        if (t == 0) out.clear_front(block, p);
        if (t + 1 == tile_count) out.clear_back(block, p, written);
      }
    }
  }
};

}  // namespace

void run_convolutions(const Machine& m, const int64_t* s, int64_t count) {
  std::vector<Convolution> chain;
  for (int64_t i = 0; i < count; ++i) chain.emplace_back(m, read<ConvStep>(s + i * kRow));
  const Convolution& first = chain.front();
  if (first.kind == kVector) return first.run_vector();
  const std::vector<Tile> cut = first.cut();
  const int64_t tile_count = cut.size(), threads = torch::stable::get_num_threads();
  if (count > 1 && first.out.blocks * tile_count < threads) {
    for (int64_t i = 0; i < count; ++i) run_convolutions(m, s + i * kRow, 1);
    return;
  }
  // Threads share the tiles, and chunks of rows only if there are too few tiles.
  const bool by_row =
      count == 1 && first.out.blocks * tile_count < 2 * threads && first.out.blocks * tile_count % threads != 0;
  const int64_t parts = by_row ? first.chunks : 1;
  for_each(first.out.blocks * tile_count * parts, [&](int64_t item) {
    const int64_t block = item / (tile_count * parts), t = item / parts % tile_count, part = item % parts;
    for (const Convolution& c : chain) {
      c.run_tile(block, cut, t, part * c.chunks / parts, (part + 1) * c.chunks / parts);
    }
  });
}

}  // namespace granet
