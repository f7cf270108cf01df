// A check, by samples, whether the weights of a compiled model are still those it was packed from.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>

namespace granet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// Returns whether the 32-bit words at `addresses` equal `expected`. The caller keeps the memory there alive.
bool words_are(const Tensor& addresses, const Tensor& expected) {
  STD_TORCH_CHECK(addresses.is_cpu() && addresses.scalar_type() == ScalarType::Long && addresses.is_contiguous() &&
                      expected.is_cpu() && expected.scalar_type() == ScalarType::Int && expected.is_contiguous() &&
                      expected.numel() == addresses.numel(),
                  "granet: words_are takes as many int32 words as int64 addresses");
  const int64_t* const at = addresses.const_data_ptr<int64_t>();
  const int32_t* const words = expected.const_data_ptr<int32_t>();
  int32_t differing = 0;
  for (int64_t i = 0; i < addresses.numel(); ++i) {
    int32_t word;
    std::memcpy(&word, reinterpret_cast<const void*>(at[i]), sizeof(word));
    differing |= word ^ words[i];
  }
  return differing == 0;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(granet, m) { m.def("words_are(Tensor addresses, Tensor expected) -> bool"); }

STABLE_TORCH_LIBRARY_IMPL(granet, CPU, m) { m.impl("words_are", TORCH_BOX(&words_are)); }

}  // namespace granet
