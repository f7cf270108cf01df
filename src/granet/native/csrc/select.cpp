// One pass of the selection of the n best scores: scores above a bracket are chosen, those inside it are listed.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <bit>
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
constexpr int64_t kShare = 1 << 15;  // scores per thread, at least

// Writes which of n scores are chosen (above high) and which lie between; returns how many are chosen, or -1 if a score
// is not finite.
GRANET_CLONES int64_t compare(const float* scores, const uint8_t* among, int64_t n, bool absolute, float low,
                              float high, uint8_t* chosen, uint8_t* between) {
  constexpr float kLargest = std::numeric_limits<float>::max();
  const uint32_t sign = absolute ? 0x7fffffffu : 0xffffffffu;
  int32_t above = 0, bad = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float s = std::bit_cast<float>(std::bit_cast<uint32_t>(scores[i]) & sign);
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

// The result for one share of the scores: how many lie above the bracket, and the flat indices of those inside it.
struct Share {
  std::vector<int64_t> inside;
  int64_t above = 0;
  bool finite = true;
};

void search(const float* values, const uint8_t* flags, int64_t begin, int64_t end, bool absolute, float low, float high,
            uint8_t* out, Share& share) {
  alignas(64) uint8_t between[kBlock] = {};
  for (int64_t start = begin; start < end; start += kBlock) {
    const int64_t length = std::min(kBlock, end - start);
    const int64_t more = compare(values + start, flags + start, length, absolute, low, high, out + start, between);
    if (more < 0) share.finite = false;
    share.above += more;
    if (length < kBlock) std::memset(between + length, 0, static_cast<size_t>(kBlock - length));
    for (int64_t i = 0; i < kBlock; i += 8) {
      uint64_t eight;
      std::memcpy(&eight, between + i, 8);
      for (; eight; eight &= eight - 1) share.inside.push_back(start + i + __builtin_ctzll(eight) / 8);
    }
  }
}

// Returns the flat indices and values of the scores inside the bracket, how many are above it, and whether all scores
// are finite. `chosen` is overwritten with those above. With `absolute`, scores are absolute values.
std::tuple<Tensor, Tensor, int64_t, bool> select_pass(const Tensor& scores, const Tensor& among, bool absolute,
                                                      double low, double high, const Tensor& chosen) {
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
  // Every share lists its own indices in order, so that the result does not depend on the threads.
  const int64_t count = std::clamp<int64_t>(n / kShare, 1, torch::stable::get_num_threads());
  std::vector<Share> shares(static_cast<size_t>(count));
  torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) {
      const int64_t begin = n / kBlock * k / count * kBlock;
      const int64_t end = k + 1 == count ? n : n / kBlock * (k + 1) / count * kBlock;
      search(values, flags, begin, end, absolute, static_cast<float>(low), static_cast<float>(high), out,
             shares[static_cast<size_t>(k)]);
    }
  });
  int64_t above = 0, total = 0;
  bool finite = true;
  for (const Share& share : shares) {
    above += share.above;
    finite = finite && share.finite;
    total += static_cast<int64_t>(share.inside.size());
  }
  Tensor indices = torch::stable::new_empty(scores, {total}, ScalarType::Long);
  Tensor inside = torch::stable::new_empty(scores, {total});
  int64_t* next_index = indices.mutable_data_ptr<int64_t>();
  float* next_value = inside.mutable_data_ptr<float>();
  for (const Share& share : shares) {
    for (const int64_t i : share.inside) {
      *next_index++ = i;
      *next_value++ = absolute ? std::fabs(values[i]) : values[i];
    }
  }
  return {indices, inside, above, finite};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(granet, m) {
  m.def(
      "select_pass(Tensor scores, Tensor among, bool absolute, float low, float high, Tensor(a!) chosen) -> (Tensor, "
      "Tensor, int, bool)");
}

STABLE_TORCH_LIBRARY_IMPL(granet, CPU, m) { m.impl("select_pass", TORCH_BOX(&select_pass)); }

}  // namespace granet
