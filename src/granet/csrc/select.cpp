// One pass of the selection of the n best scores: what lies above the bracket is chosen, what lies inside is listed.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#if defined(__x86_64__)
#define GRANET_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define GRANET_CLONES
#endif

namespace granet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int64_t kBlock = 256;

// Writes which of n scores are chosen (above high) and which lie between; returns how many are chosen, or -1 if a score
// is not finite.
GRANET_CLONES int64_t compare(const float* scores, const uint8_t* among, int64_t n, float low, float high,
                              uint8_t* chosen, uint8_t* between) {
  constexpr float kLargest = std::numeric_limits<float>::max();
  int32_t above = 0, bad = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float s = scores[i];
    const int32_t candidate = among[i];
    const int32_t over = static_cast<int32_t>(s > high) & candidate;
    const int32_t within = static_cast<int32_t>(s >= low) & candidate & (over ^ 1);
    bad |= static_cast<int32_t>(!(std::fabs(s) <= kLargest));
    above += over;
    chosen[i] = static_cast<uint8_t>(over);
    between[i] = static_cast<uint8_t>(within);
  }
  return bad ? -1 : above;
}

// The places (flat index) and values of the scores inside the bracket, how many are above it, and whether all scores
// are finite. `chosen` is overwritten with those above.
std::tuple<Tensor, Tensor, int64_t, bool> select_pass(const Tensor& scores, const Tensor& among, double low, double high,
                                                      const Tensor& chosen) {
  const int64_t n = scores.numel();
  STD_TORCH_CHECK(scores.scalar_type() == ScalarType::Float && among.scalar_type() == ScalarType::Bool &&
                      chosen.scalar_type() == ScalarType::Bool,
                  "granet: select_pass takes float32 scores and bool masks");
  STD_TORCH_CHECK(scores.is_contiguous() && among.is_contiguous() && chosen.is_contiguous() && among.numel() == n &&
                      chosen.numel() == n,
                  "granet: select_pass takes contiguous tensors of one size");
  const float* values = scores.const_data_ptr<float>();
  const uint8_t* flags = static_cast<const uint8_t*>(among.const_data_ptr());
  uint8_t* out = static_cast<uint8_t*>(chosen.mutable_data_ptr());
  std::vector<int64_t> places;
  int64_t above = 0;
  bool finite = true;
  alignas(64) uint8_t between[kBlock];
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t length = std::min(kBlock, n - start);
    const int64_t more = compare(values + start, flags + start, length, static_cast<float>(low),
                                 static_cast<float>(high), out + start, between);
    if (more < 0) finite = false;
    above += more;
    for (int64_t i = 0; i < length; i += 8) {
      uint64_t eight = 0;
      std::memcpy(&eight, between + i, static_cast<size_t>(std::min<int64_t>(8, length - i)));
      for (; eight; eight &= eight - 1) places.push_back(start + i + __builtin_ctzll(eight) / 8);
    }
  }
  const int64_t found = static_cast<int64_t>(places.size());
  Tensor at = torch::stable::new_empty(scores, {found}, ScalarType::Long);
  Tensor inside = torch::stable::new_empty(scores, {found});
  float* kept = inside.mutable_data_ptr<float>();
  if (found) std::memcpy(at.mutable_data_ptr<int64_t>(), places.data(), places.size() * sizeof(int64_t));
  for (int64_t i = 0; i < found; ++i) kept[i] = values[places[static_cast<size_t>(i)]];
  return {at, inside, above, finite};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(granet, m) {
  m.def(
      "select_pass(Tensor scores, Tensor among, float low, float high, Tensor(a!) chosen) -> (Tensor, Tensor, int, "
      "bool)");
}

STABLE_TORCH_LIBRARY_IMPL(granet, CPU, m) { m.impl("select_pass", TORCH_BOX(&select_pass)); }

}  // namespace granet
