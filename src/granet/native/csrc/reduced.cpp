// The steps of a compiled program at reduced precision, and which of their kernels this processor runs.
#include "reduced.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "program.h"

namespace granet {

using torch::stable::parallel_for;

namespace {

// From the plainest to the most capable; granet.native.REDUCED has the same order.
using Table = const ReducedKernels& (*)();
#if defined(__x86_64__)
constexpr Table kTables[] = {reduced_generic, reduced_avx2,       reduced_avxvnni,
                             reduced_avx512,  reduced_avx512vnni, reduced_avx512bf16};
#else
constexpr Table kTables[] = {reduced_generic};
#endif

bool runs(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  if (std::strcmp(name, "avx2") == 0) return avx2;
  if (std::strcmp(name, "avxvnni") == 0) return avx2 && __builtin_cpu_supports("avxvnni");
  if (std::strcmp(name, "avx512") == 0) return avx512;
  if (std::strcmp(name, "avx512vnni") == 0) return vnni;
  if (std::strcmp(name, "avx512bf16") == 0) return vnni && __builtin_cpu_supports("avx512bf16");
#endif
  return std::strcmp(name, "generic") == 0;
}

// An instruction set that the float32 kernels do not know by this name is one of their width (see granet.native).
int64_t choose() {
  const char* forced = std::getenv("GRANET_ISA");
  const bool any = forced == nullptr || *forced == 0;
  int64_t best = 0;
  for (int64_t i = 0; i < static_cast<int64_t>(std::size(kTables)); ++i) {
    const ReducedKernels& table = kTables[i]();
    if (table.width == kernels().width && (any || std::strcmp(forced, table.name) == 0) && runs(table.name)) best = i;
  }
  return best;
}

int64_t chosen() {
  static const int64_t index = choose();
  return index;
}

std::vector<int64_t> reduced_cpu() { return {chosen(), reduced().width, reduced().max_vectors}; }

// Calls body(word plane, the float planes of its channels, null where there is none) for all of them.
template <typename Body>
void each_word(const Slot& narrow, const Slot& wide, const Body& body) {
  const int64_t channels = channels_per_word(narrow.precision);
  parallel_for(0, narrow.blocks * narrow.planes, std::max<int64_t>(1, 16384 / narrow.layout.stride),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t block = i / narrow.planes, plane = i % narrow.planes;
                   float* floats[4] = {};
                   for (int64_t c = 0; c < channels && plane * channels + c < wide.planes; ++c) {
                     floats[c] = wide.block(block) + (plane * channels + c) * wide.layout.stride;
                   }
                   body(words(narrow.block(block)) + plane * narrow.layout.stride, floats);
                 }
               });
}

}  // namespace

const ReducedKernels& reduced() { return kTables[chosen()](); }

// Planes of one precision from those of another; one of the two is float32. Zeros stay zeros, so whole planes are
// converted, with all that is around their positions.
void run_convert(const Machine& m, const ConvertStep& s) {
  const Slot& in = m.slot(s.source);
  const Slot& out = m.slot(s.out);
  const bool narrows = in.precision == kFloat32;
  const Slot& narrow = narrows ? out : in;
  const Slot& wide = narrows ? in : out;
  STD_TORCH_CHECK(wide.precision == kFloat32 && narrow.precision != kFloat32 && in.layout.stride == out.layout.stride,
                  "granet: malformed program");
  const int64_t n = in.layout.stride;
  const ReducedKernels& k = reduced();
  if (narrow.precision == kBfloat16) {
    return each_word(narrow, wide,
                     [&](int32_t* w, float** f) { narrows ? k.to_bfloat16(f, n, w) : k.from_bfloat16(w, n, f); });
  }
  const float* const factors = m.floats(s.factors);
  std::atomic<bool> finite{true};
  each_word(narrow, wide, [&](int32_t* w, float** f) {
    if (!narrows) return k.from_int8(w, n, factors[0], factors[1], f);
    if (!k.to_int8(f, n, factors[0], factors[1], w)) finite.store(false, std::memory_order_relaxed);
  });
  STD_TORCH_CHECK(finite.load(), "granet: an input holds NaN or infinite values, which int8 cannot represent");
}

void run_reduced_avg_pool(const Machine& m, const AvgPoolStep& s) {
  const Slot& in = m.slot(s.source);
  const Slot& out = m.slot(s.out);
  STD_TORCH_CHECK(out.precision == kFloat32, "granet: malformed program");
  const int64_t nb = in.layout.batch, channels = channels_per_word(in.precision);
  const bool bytes = in.precision == kInt8;
  const float zero = bytes ? m.floats(s.factors)[1] : 0.0f;
  const float scale = (bytes ? m.floats(s.factors)[0] : 1.0f) / static_cast<float>(in.layout.height * in.layout.width);
  each_word(in, out, [&](int32_t* from, float** planes) {
    from += in.layout.front;
    for (int64_t c = 0; c < channels; ++c) {
      if (!planes[c]) continue;
      std::memset(planes[c], 0, sizeof(float) * out.layout.stride);
      float* to = planes[c] + out.layout.front;
      for (int64_t n = 0; n < nb; ++n) {
        float sum = 0;
        for (int64_t y = 0; y < in.layout.height; ++y) {
          for (int64_t x = 0; x < in.layout.width; ++x) {
            const int32_t word = from[(y * in.layout.pitch + x) * nb + n];
            if (bytes) {
              sum += static_cast<float>((word >> (8 * c)) & 255) - zero;
            } else {
              const int32_t bits = c ? word & static_cast<int32_t>(0xffff0000) : word << 16;
              float value;
              std::memcpy(&value, &bits, sizeof(float));
              sum += value;
            }
          }
        }
        to[n] = sum * scale;
      }
    }
  });
}

// The slots share one geometry; what is around the positions is computed, too, and comes out as the output's zeros.
void run_reduced_add(const Machine& m, const AddStep& s) {
  const Slot& a = m.slot(s.source);
  const Slot& out = m.slot(s.out);
  const int32_t* const other = s.other >= 0 ? words(m.slot(s.other).data) : nullptr;
  const int64_t total = out.blocks * out.planes * out.layout.stride;
  const float* const f = m.floats(s.factors);
  const auto activation = static_cast<int32_t>(s.activation);
  parallel_for(0, total / 16, 1024, [&](int64_t begin, int64_t end) {
    const int64_t at = 16 * begin, n = 16 * (end - begin);
    const int32_t* const b = other ? other + at : nullptr;
    if (out.precision == kInt8) {
      reduced().add_int8(words(a.data) + at, b, words(out.data) + at, n, f[0], f[1], f[2], activation, f[3], f[4]);
    } else {
      reduced().add_bfloat16(words(a.data) + at, b, words(out.data) + at, n, activation);
    }
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(granet, m) { m.def("reduced_cpu() -> int[]"); }

STABLE_TORCH_LIBRARY_IMPL(granet, CompositeExplicitAutograd, m) { m.impl("reduced_cpu", TORCH_BOX(&reduced_cpu)); }

}  // namespace granet
