// The index structures of one layer's mask, forward and backward: see granet.engine.index. They are rebuilt after every
// update of the topology, for millions of weights.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

namespace granet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

struct Weight {
  int32_t channel, plane, shift, index;  // output channel, input plane, shift in floats, flat index in the dense weight
};

struct Where {
  int64_t row, column, offset;
};

// How the matrix of one direction is divided: into chunks of rows and blocks of columns.
struct Cut {
  int64_t rows, columns, chunks, blocks, per_block;

  int64_t per_chunk() const { return rows / chunks; }
};

// Appends ptr, id, offset and index to `out`. The weights of a row keep the order in which they are passed.
template <typename Find>
void compress(const Tensor& like, const std::vector<Weight>& weights, const Cut& cut, const Find& where,
              std::vector<Tensor>& out) {
  const int64_t stored = cut.rows * cut.blocks, nonzeros = static_cast<int64_t>(weights.size());
  std::vector<int32_t> length(stored), cursor(stored), order(cut.per_chunk());
  std::vector<int32_t> places(weights.size());
  // A weight belongs to the stored row (chunk * blocks + block) * per_chunk + row within the chunk. Tables hold its
  // parts, because divisions for every weight would take most of the time.
  std::vector<int32_t> of_row(cut.rows), of_column(cut.columns);
  for (int64_t row = 0; row < cut.rows; ++row) {
    of_row[row] = static_cast<int32_t>(row % cut.chunks * cut.blocks * cut.per_chunk() + row / cut.chunks);
  }
  for (int64_t column = 0; column < cut.columns; ++column) {
    of_column[column] = static_cast<int32_t>(column / cut.per_block * cut.per_chunk());
  }
  for (int64_t k = 0; k < nonzeros; ++k) {
    const Where at = where(weights[k]);
    places[k] = of_row[at.row] + of_column[at.column];
    ++length[places[k]];
  }
  Tensor ptr = torch::stable::new_empty(like, {stored + 1}, ScalarType::Int);
  Tensor id = torch::stable::new_empty(like, {stored}, ScalarType::Int);
  Tensor offsets = torch::stable::new_empty(like, {nonzeros}, ScalarType::Int);
  Tensor index = torch::stable::new_empty(like, {nonzeros}, ScalarType::Int);
  int32_t* const start = ptr.mutable_data_ptr<int32_t>();
  int32_t* const ids = id.mutable_data_ptr<int32_t>();
  start[0] = 0;
  for (int64_t group = 0; group < cut.chunks * cut.blocks; ++group) {
    const int64_t first = group * cut.per_chunk();
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return length[first + a] < length[first + b]; });
    for (int64_t i = 0; i < cut.per_chunk(); ++i) {
      cursor[first + order[i]] = start[first + i];
      start[first + i + 1] = start[first + i] + length[first + order[i]];
      ids[first + i] = static_cast<int32_t>(order[i] * cut.chunks + group / cut.blocks);
    }
  }
  int32_t* const to_offset = offsets.mutable_data_ptr<int32_t>();
  int32_t* const to_index = index.mutable_data_ptr<int32_t>();
  for (int64_t k = 0; k < nonzeros; ++k) {
    const int32_t at = cursor[places[k]]++;
    to_offset[at] = static_cast<int32_t>(where(weights[k]).offset);
    to_index[at] = weights[k].index;
  }
  out.insert(out.end(), {ptr, id, offsets, index});
}

// `taps` holds the phase and the shift of every kernel position. The numbers of blocks come from Geometry.blocks().
// With `channels_last`, the dense weight has its input channels innermost in memory.
std::vector<Tensor> index_structures(const Tensor& mask, std::vector<int64_t> taps, int64_t outputs, int64_t channels,
                                     int64_t phases, int64_t plane, int64_t chunks, int64_t forward_blocks,
                                     int64_t backward_blocks, bool channels_last) {
  const int64_t kernel = static_cast<int64_t>(taps.size()) / 2, planes = channels * phases;
  STD_TORCH_CHECK(mask.is_cpu() && mask.scalar_type() == ScalarType::Bool && mask.is_contiguous(),
                  "granet: a mask must be a contiguous bool tensor on the CPU");
  STD_TORCH_CHECK(outputs > 0 && channels > 0 && kernel > 0 && mask.numel() % (outputs * kernel) == 0 &&
                      mask.numel() > 0 && channels % (mask.numel() / (outputs * kernel)) == 0 && chunks > 0 &&
                      outputs % chunks == 0 && planes % chunks == 0 && forward_blocks > 0 && backward_blocks > 0 &&
                      forward_blocks <= channels && backward_blocks <= outputs &&
                      mask.numel() <= std::numeric_limits<int32_t>::max() &&
                      std::max(planes, outputs) * plane <= std::numeric_limits<int32_t>::max(),
                  "granet: the mask does not fit the geometry");
  const int64_t per_group = mask.numel() / (outputs * kernel), groups = channels / per_group;
  STD_TORCH_CHECK(outputs % groups == 0, "granet: the mask does not fit the geometry");
  const auto* const active = static_cast<const uint8_t*>(mask.const_data_ptr());
  std::vector<Weight> weights;
  weights.reserve(std::count(active, active + mask.numel(), uint8_t{1}));
  for (int64_t o = 0; o < outputs; ++o) {
    for (int64_t c = 0; c < per_group; ++c) {
      const int64_t first = (o * per_group + c) * kernel;
      const int64_t channel = o / (outputs / groups) * per_group + c;
      for (int64_t tap = 0; tap < kernel; ++tap) {
        if (!active[first + tap]) continue;
        const int64_t index = channels_last ? (o * kernel + tap) * per_group + c : first + tap;
        weights.push_back({static_cast<int32_t>(o), static_cast<int32_t>(channel * phases + taps[2 * tap]),
                           static_cast<int32_t>(taps[2 * tap + 1]), static_cast<int32_t>(index)});
      }
    }
  }
  const auto share = [](int64_t columns, int64_t blocks) { return (columns + blocks - 1) / blocks; };
  std::vector<Tensor> out;
  compress(  // a channel's phases stay in one block
      mask, weights, Cut{outputs, planes, chunks, forward_blocks, share(channels, forward_blocks) * phases},
      [plane](const Weight& w) { return Where{w.channel, w.plane, w.plane * plane + w.shift}; }, out);
  compress(
      mask, weights, Cut{planes, outputs, chunks, backward_blocks, share(outputs, backward_blocks)},
      [plane](const Weight& w) { return Where{w.plane, w.channel, w.channel * plane - w.shift}; }, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(granet, m) {
  m.def(
      "index_structures(Tensor mask, int[] taps, int outputs, int channels, int phases, int plane, int chunks, "
      "int forward_blocks, int backward_blocks, bool channels_last) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(granet, CPU, m) { m.impl("index_structures", TORCH_BOX(&index_structures)); }

}  // namespace granet
