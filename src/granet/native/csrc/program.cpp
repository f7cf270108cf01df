// Compiled inference: a list of steps over planes runs in one call, so that activations stay in the kernels' layout and
// in the cache from layer to layer.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <limits>

#include "program.h"

namespace granet {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;

namespace {

// Calls body(block, first channel, last channel) for all channels of all blocks, several at a time: a thread transposes
// neighbouring channels, because it would otherwise touch a cache line for every number.
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

void run_pack(const Machine& m, const PackStep& s, const std::vector<Tensor>& inputs) {
  STD_TORCH_CHECK(s.input >= 0 && s.input < static_cast<int64_t>(inputs.size()), "granet: no input ", s.input);
  const Tensor& x = inputs[s.input];
  const Slot& out = m.slot(s.out);
  const int64_t channels = s.channels, height = s.height, width = s.width;
  const std::vector<Phase> phases = phases_of(m, s.phases);
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == ScalarType::Float && x.is_contiguous(),
                  "granet: the input must be a contiguous float32 tensor on the CPU");
  STD_TORCH_CHECK(x.numel() == out.images * channels * height * width, "granet: the input has the wrong shape");
  const int64_t image = channels * height * width;
  const float* from = x.const_data_ptr<float>();
  each_channels(out, channels, height * width, [&](int64_t block, int64_t begin, int64_t end) {
    const int64_t first = block * out.layout.batch;
    pack(from + first * image, {channels, height, width, std::min(out.layout.batch, out.images - first), image},
         out.block(block), out.layout, phases.data(), phases.size(), s.stride_y, s.stride_x, begin, end);
  });
}

Tensor run_unpack(const Machine& m, const UnpackStep& s, const Tensor& like) {
  const Slot& in = m.slot(s.source);
  const int64_t channels = s.channels, height = s.height, width = s.width;
  Tensor y = s.dimensions == 2   ? torch::stable::new_empty(like, {in.images, channels})
             : s.dimensions == 3 ? torch::stable::new_empty(like, {in.images, channels, width})
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

// Splits every plane into its phases, for the strided layer that follows.
void run_split(const Machine& m, const SplitStep& s) {
  const Slot& in = m.slot(s.source);
  const Slot& out = m.slot(s.out);
  const std::vector<Phase> phases = phases_of(m, s.phases);
  const int64_t count = phases.size(), sy = s.stride_y, sx = s.stride_x, nb = in.layout.batch;
  parallel_for(0, in.blocks * in.planes, std::max<int64_t>(1, 16384 / in.layout.stride), [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; ++i) {
      const int64_t block = i / in.planes, c = i % in.planes;
      const float* from = in.block(block) + c * in.layout.stride + in.layout.front;
      for (int64_t f = 0; f < count; ++f) {
        float* plane = out.block(block) + (c * count + f) * out.layout.stride;
        const int64_t rows = (in.layout.height - phases[f].y + sy - 1) / sy;
        const int64_t columns = (in.layout.width - phases[f].x + sx - 1) / sx;
        if (nb == 1 && sx == 2) {
          // What is written too far is overwritten by the gap and the next row, or by the zeros at the end.
          float* to = plane + out.layout.front;
          std::memset(plane, in.fill, sizeof(float) * (to - plane));
          for (int64_t y = phases[f].y; y < in.layout.height; y += sy, to += out.layout.pitch) {
            kernels().take_even(from + y * in.layout.pitch + phases[f].x, to, columns);
            std::memset(to + columns, in.fill, sizeof(float) * (out.layout.pitch - columns));
          }
          std::memset(to, in.fill, sizeof(float) * (plane + out.layout.stride - to));
          continue;
        }
        clear_around(plane, out.layout, std::max<int64_t>(rows, 0), std::max<int64_t>(columns, 0), in.fill);
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

void run_max_pool(const Machine& m, const MaxPoolStep& s) {
  const Slot& in = m.slot(s.source);
  const Slot& out = m.slot(s.out);
  const int64_t ky = s.kernel_y, kx = s.kernel_x, sy = s.stride_y, sx = s.stride_x, py = s.padding_y, px = s.padding_x,
                nb = in.layout.batch;
  const int64_t row = (in.layout.width + 2 * px) * nb, starts = row - (kx - 1) * nb;
  const auto take_maximum = [&](const float* a, float* out, int64_t n) {
    if (in.precision == kFloat32) return kernels().maximum(a, out, n);
    (in.precision == kInt8 ? reduced().maximum_int8 : reduced().maximum_bfloat16)(words(a), words(out), n);
  };
  // The word of which every channel is the least number there is.
  const int32_t least =
      in.precision == kInt8 ? 0 : static_cast<int32_t>(in.precision == kBfloat16 ? 0xff80ff80 : 0xff800000);
  parallel_for(0, in.blocks * in.planes, 1, [&](int64_t b, int64_t e) {
    float* const best = scratch(0, row);    // the maximum over the window's rows, with its padding columns
    float* const window = scratch(1, row);  // the maximum over the window, for every column it can start at
    std::fill_n(words(best), row, least);
    for (int64_t i = b; i < e; ++i) {
      const int64_t block = i / in.planes, c = i % in.planes;
      const float* from = in.block(block) + c * in.layout.stride + in.layout.front;
      float* plane = out.block(block) + c * out.layout.stride;
      std::memset(plane, out.fill, sizeof(float) * out.layout.stride);
      for (int64_t oy = 0; oy < out.layout.height; ++oy) {
        const int64_t first = std::max<int64_t>(0, oy * sy - py), last = std::min(in.layout.height, oy * sy - py + ky);
        float* const inner = best + px * nb;
        std::memcpy(inner, from + first * in.layout.pitch * nb, sizeof(float) * in.layout.width * nb);
        for (int64_t y = first + 1; y < last; ++y) {
          take_maximum(from + y * in.layout.pitch * nb, inner, in.layout.width * nb);
        }
        std::memcpy(window, best, sizeof(float) * starts);
        for (int64_t x = 1; x < kx; ++x) take_maximum(best + x * nb, window, starts);
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

// Computes the mean over all positions.
void run_avg_pool(const Machine& m, const AvgPoolStep& s) {
  if (m.slot(s.source).precision != kFloat32) return run_reduced_avg_pool(m, s);
  const Slot& in = m.slot(s.source);
  const Slot& out = m.slot(s.out);
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

// Adds whole planes: the slots share one geometry, gaps hold zeros, and every activation maps 0 to 0.
void run_add(const Machine& m, const AddStep& s) {
  const Slot& a = m.slot(s.source);
  const Slot& out = m.slot(s.out);
  if (a.precision != kFloat32) return run_reduced_add(m, s);
  const float* other = s.other >= 0 ? m.slot(s.other).data : nullptr;
  const int64_t total = out.blocks * out.planes * out.layout.stride;
  parallel_for(0, total, 16384, [&](int64_t b, int64_t e) {
    kernels().add(a.data + b, other ? other + b : nullptr, out.data + b, e - b, static_cast<int32_t>(s.activation));
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
    const SlotRow s = read<SlotRow>(numbers + 2 + kRow * i);
    const Slot slot{memory + s.place,
                    s.planes,
                    s.blocks,
                    s.images,
                    {s.height, s.width, s.pitch, s.batch, s.front, s.stride},
                    s.precision,
                    static_cast<int>(s.fill)};
    STD_TORCH_CHECK(s.place >= 0 && s.place + slot.planes * slot.blocks * slot.layout.stride <= arena.numel(),
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
  int64_t taken = 1;  // the number of steps computed together
  for (int64_t i = 0; i < step_count; i += taken) {
    const int64_t* s = numbers + 2 + kRow * (slot_count + i);
    taken = 1 + s[kRow - 1];
    STD_TORCH_CHECK(taken >= 1 && i + taken <= step_count, "granet: malformed program");
    const auto start = std::chrono::steady_clock::now();
    switch (s[0]) {
      case kPack: run_pack(machine, read<PackStep>(s), inputs); break;
      case kUnpack: outputs.push_back(run_unpack(machine, read<UnpackStep>(s), inputs[0])); break;
      case kConv: run_convolutions(machine, s, taken); break;
      case kSplit: run_split(machine, read<SplitStep>(s)); break;
      case kMaxPool: run_max_pool(machine, read<MaxPoolStep>(s)); break;
      case kAvgPool: run_avg_pool(machine, read<AvgPoolStep>(s)); break;
      case kAdd: run_add(machine, read<AddStep>(s)); break;
      case kConvert: run_convert(machine, read<ConvertStep>(s)); break;
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

// Returns the encoding's sizes: integers in a row, fields of a slot and of each step, activations, kinds of kernels.
std::vector<int64_t> encoding() {
  constexpr int64_t one = sizeof(int64_t);
  return {kRow,
          sizeof(SlotRow) / one,
          sizeof(PackStep) / one,
          sizeof(UnpackStep) / one,
          sizeof(ConvStep) / one,
          sizeof(SplitStep) / one,
          sizeof(MaxPoolStep) / one,
          sizeof(AvgPoolStep) / one,
          sizeof(AddStep) / one,
          sizeof(ConvertStep) / one,
          kActivations,
          kKinds,
          kPrecisions};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(granet, m) {
  m.def("encoding() -> int[]");
  m.def("run(Tensor[] inputs, Tensor[] constants, Tensor(a!) arena, Tensor program, bool time) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(granet, CPU, m) { m.impl("run", TORCH_BOX(&run)); }

STABLE_TORCH_LIBRARY_IMPL(granet, CompositeExplicitAutograd, m) { m.impl("encoding", TORCH_BOX(&encoding)); }

}  // namespace granet
